"""Integer codes on a uniform grid, with a scale (and a zero) per group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llmsqueeze.parts import bitpack
from llmsqueeze.parts.coding.streams import Streams
from llmsqueeze.parts.grid import Grid, Layout, Spec, dtype_name, mark_rows, onto_rows


@dataclass(frozen=True)
class Affine:
    """Integer codes on a grid, for n rows of the weight; its other rows are zeros.

    codes int32 [n, words]; scale [n, groups]; zero int32 [groups, words of n codes]; rows int32 [words], one bit per
    row of the weight, set for the n rows, or None for all rows. If there are `streams`, the file has them for the
    codes.
    """

    kind: ClassVar[str] = "affine"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: Tensor | None
    shape: tuple[int, int]
    grid: Grid
    streams: Streams | None = None

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rows: Tensor | None = None) -> Affine:
        """codes [n, cols] and zero [n, groups] as integers, not packed; scale [n, groups] in its stored dtype.

        `rows` bool [rows]: the n rows of the weight that these are, in their order; None for all.
        """
        packed_zero = None if grid.symmetric else bitpack.pack(zero.T.to(torch.uint8), grid.bits)
        shape = (len(codes) if rows is None else len(rows), codes.shape[1])
        return cls(bitpack.pack(codes, grid.bits), scale, packed_zero, mark_rows(rows), shape, grid)

    def dense(self) -> Tensor:
        n, cols = len(self.codes), self.shape[1]
        levels = self.symbols().float()
        if self.zero is None:
            levels -= self.grid.fixed_zero
        else:
            levels -= self.grid.expand(bitpack.unpack(self.zero, self.grid.bits, n).T.float(), cols)
        return onto_rows(levels.mul_(self.grid.expand(self.scale.float(), cols)), self.rows, self.shape)

    def symbols(self) -> Tensor:
        """uint8 [n, cols]: the codes, not packed."""
        return bitpack.unpack(self.codes, self.grid.bits, self.shape[1])

    def packed(self) -> Affine:
        """The same part with entropy-coded codes, if they take fewer bytes."""
        return replace(self, streams=Streams.smaller(self.symbols(), self.codes.nbytes))

    def plain(self) -> Affine:
        """The same part with codes of a fixed width."""
        return replace(self, streams=None)

    def tensors(self) -> dict[str, Tensor]:
        codes = {"codes": self.codes} if self.streams is None else self.streams.tensors()
        stored = {**codes, "scale": self.scale, "zero": self.zero, "rows": self.rows}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def spec(self) -> Spec:
        spec = affine_spec(self.grid, self.scale.dtype, None if self.rows is None else len(self.codes))
        return spec if self.streams is None else spec | {"streams": self.streams.spec()}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), grid = shape, affine_grid(spec)
        n = spec.get("rows", rows)
        layout: Layout = {"codes": ((n, bitpack.words(cols, grid.bits)), torch.int32)}
        if "streams" in spec:
            layout = Streams.layout(n, cols, spec["streams"])
        layout["scale"] = ((n, grid.groups(cols)), getattr(torch, spec["dtype"]))
        if not grid.symmetric:
            layout["zero"] = ((grid.groups(cols), bitpack.words(n, grid.bits)), torch.int32)
        if "rows" in spec:
            layout["rows"] = ((bitpack.words(rows, 1),), torch.int32)
        return layout

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Affine:
        zero, rows, grid, streams = tensors.get("zero"), tensors.get("rows"), affine_grid(spec), None
        scale = tensors["scale"]
        if "streams" in spec:
            streams = Streams.restore(spec["streams"], tensors)
            codes = bitpack.pack(streams.symbols(len(scale), shape[1], grid.max_code).to(scale.device), grid.bits)
        else:
            codes = tensors["codes"]
        return cls(codes, scale, zero, rows, shape, grid, streams)


def affine_spec(grid: Grid, dtype: torch.dtype, rows: int | None = None) -> Spec:
    """The spec of an `Affine` part; `rows`: its number of rows, None for all rows of the weight."""
    spec: Spec = {
        "part": Affine.kind,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "dtype": dtype_name(dtype),
    }
    if grid.half:
        spec["half"] = True
    return spec if rows is None else spec | {"rows": rows}


def affine_grid(spec: Spec) -> Grid:
    """The grid of the `Affine` part that `spec` describes."""
    return Grid(spec["bits"], spec["group_size"], spec["symmetric"], spec.get("half", False))
