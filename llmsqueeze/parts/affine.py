"""Integer codes on an even grid, with a scale (and a zero) per group."""

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
    """Integer codes on a grid, of all rows of the weight or of some; the other rows are zeros.

    codes int32 [held, words]; scale [held, groups]; zero int32 [groups, words of held]; rows int32 [words of rows], one
    bit a row, set for the `held` rows that are here, or None for all of them. With `streams` the codes are stored
    entropy-coded.
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
        """codes [held, cols] and zero [held, groups] as plain integers; scale [held, groups] in its stored dtype.

        `rows` bool [rows] marks the rows that these are, in their order.
        """
        packed_zero = None if grid.symmetric else bitpack.pack(zero.T.to(torch.uint8), grid.bits)
        shape = (len(codes) if rows is None else len(rows), codes.shape[1])
        return cls(bitpack.pack(codes, grid.bits), scale, packed_zero, mark_rows(rows), shape, grid)

    def dense(self) -> Tensor:
        held, cols = len(self.codes), self.shape[1]
        levels = self.symbols().float()
        if self.zero is None:
            levels -= self.grid.fixed_zero
        else:
            levels -= self.grid.expand(bitpack.unpack(self.zero, self.grid.bits, held).T.float(), cols)
        return onto_rows(levels.mul_(self.grid.expand(self.scale.float(), cols)), self.rows, self.shape)

    def symbols(self) -> Tensor:
        """uint8 [held, cols]: the codes, one by one."""
        return bitpack.unpack(self.codes, self.grid.bits, self.shape[1])

    def packed(self) -> Affine:
        """The same with entropy-coded codes, where they take fewer bytes so."""
        streams = Streams.smaller(self.symbols(), self.codes.nbytes)
        return replace(self, streams=streams)

    def plain(self) -> Affine:
        """The same with codes of a fixed width."""
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
        held = spec.get("rows", rows)
        layout: Layout = {"codes": ((held, bitpack.words(cols, grid.bits)), torch.int32)}
        if "streams" in spec:
            layout = Streams.layout(held, cols, spec["streams"])
        layout["scale"] = ((held, grid.groups(cols)), getattr(torch, spec["dtype"]))
        if not grid.symmetric:
            layout["zero"] = ((grid.groups(cols), bitpack.words(held, grid.bits)), torch.int32)
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
    """`rows`: how many of the weight's rows the part holds, None for all."""
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
    return Grid(spec["bits"], spec["group_size"], spec["symmetric"], spec.get("half", False))
