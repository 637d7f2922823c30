"""Flexible dual binarization (quantizers/dual_binary.py has the method): two planes of bits, two scales per group."""

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
class DualBinary:
    """`alpha1 * plane1 + alpha2 * plane2`, for n rows of the weight; its other rows are zeros.

    plane1, plane2 int32 [n, words], one bit per weight; alpha1, alpha2 [n, groups]; rows and streams as in `Affine`.
    """

    kind: ClassVar[str] = "dual_binary"
    plane1: Tensor
    plane2: Tensor
    alpha1: Tensor
    alpha2: Tensor
    rows: Tensor | None
    shape: tuple[int, int]
    grid: Grid
    streams: Streams | None = None

    @classmethod
    def from_codes(
        cls, codes: Tensor, alpha1: Tensor, alpha2: Tensor, grid: Grid, rows: Tensor | None = None
    ) -> DualBinary:
        """codes [n, cols] in 0 .. 3, in the order of the levels (grid.py); alphas [n, groups] of one dtype.

        `rows` bool [rows]: the n rows of the weight that these are, in their order; None for all.
        """
        shape = (len(codes) if rows is None else len(rows), codes.shape[1])
        return cls(*packed_planes(codes), alpha1, alpha2.to(alpha1.dtype), mark_rows(rows), shape, grid)

    def planes(self) -> tuple[Tensor, Tensor]:
        """float32 [n, cols] each, of zeros and ones."""
        cols = self.shape[1]
        return bitpack.unpack(self.plane1, 1, cols).float(), bitpack.unpack(self.plane2, 1, cols).float()

    def dense(self) -> Tensor:
        cols, (first, second) = self.shape[1], self.planes()
        first.mul_(self.grid.expand(self.alpha1.float(), cols))
        return onto_rows(first.add_(second.mul_(self.grid.expand(self.alpha2.float(), cols))), self.rows, self.shape)

    def zero_shares(self) -> tuple[float, float]:
        """The share of zeros in each plane, which a kernel can skip."""
        first, second = self.planes()
        return 1 - float(first.mean()), 1 - float(second.mean())

    def symbols(self) -> Tensor:
        """uint8 [n, cols]: the codes 0 .. 3."""
        first, second = self.planes()
        return torch.where(first.bool(), 3, 1).to(torch.uint8) - second.to(torch.uint8)

    def packed(self) -> DualBinary:
        """The same part with entropy-coded codes, if they take fewer bytes."""
        return replace(self, streams=Streams.smaller(self.symbols(), self.plane1.nbytes + self.plane2.nbytes))

    def plain(self) -> DualBinary:
        """The same part with codes of a fixed width."""
        return replace(self, streams=None)

    def tensors(self) -> dict[str, Tensor]:
        planes = {"plane1": self.plane1, "plane2": self.plane2} if self.streams is None else self.streams.tensors()
        stored = {**planes, "alpha1": self.alpha1, "alpha2": self.alpha2}
        return stored if self.rows is None else stored | {"rows": self.rows}

    def spec(self) -> Spec:
        spec = dual_spec(self.grid, self.alpha1.dtype, None if self.rows is None else len(self.plane1))
        return spec if self.streams is None else spec | {"streams": self.streams.spec()}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), grid = shape, dual_grid(spec)
        n, dtype = spec.get("rows", rows), getattr(torch, spec["dtype"])
        planes, alphas = (n, bitpack.words(cols, 1)), (n, grid.groups(cols))
        layout: Layout = {"plane1": (planes, torch.int32), "plane2": (planes, torch.int32)}
        if "streams" in spec:
            layout = Streams.layout(n, cols, spec["streams"])
        layout |= {"alpha1": (alphas, dtype), "alpha2": (alphas, dtype)}
        return layout | {"rows": ((bitpack.words(rows, 1),), torch.int32)} if "rows" in spec else layout

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> DualBinary:
        alpha1, alpha2, streams = tensors["alpha1"], tensors["alpha2"], None
        if "streams" in spec:
            streams = Streams.restore(spec["streams"], tensors)
            first, second = packed_planes(streams.symbols(len(alpha1), shape[1], 3).to(alpha1.device))
        else:
            first, second = tensors["plane1"], tensors["plane2"]
        return cls(first, second, alpha1, alpha2, tensors.get("rows"), shape, dual_grid(spec), streams)


def packed_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The two planes of codes 0 .. 3, packed as the file stores them."""
    first, second = planes_of(codes)
    return bitpack.pack(first.to(torch.uint8), 1), bitpack.pack(second.to(torch.uint8), 1)


def planes_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The two bool planes of codes 0 .. 3, whose levels are alpha2, 0, alpha1 + alpha2 and alpha1."""
    return codes >= 2, codes % 2 == 0


def dual_spec(grid: Grid, dtype: torch.dtype, rows: int | None = None) -> Spec:
    """The spec of a `DualBinary` part; `rows`: its number of rows, None for all rows of the weight."""
    spec: Spec = {"part": DualBinary.kind, "group_size": grid.group_size, "dtype": dtype_name(dtype)}
    return spec if rows is None else spec | {"rows": rows}


def dual_grid(spec: Spec) -> Grid:
    """The grid of the `DualBinary` part that `spec` describes."""
    return Grid(2, spec["group_size"], symmetric=True, dual=True)
