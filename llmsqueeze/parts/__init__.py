"""A compressed weight is a sum of parts: W ~= sum(part.dense() for part in parts). An entry of a `Sparse` part replaces
the sum of the other parts.

Every part gives its tensors as the file stores them (`tensors`) and the settings that are needed to read them back
(`spec`). From a spec follow the shapes and dtypes of the tensors (`layout`) before any tensor exists. Thus bytes are
counted and not estimated, and a model is laid out before its file is read. Weights are [rows, cols] = [out_features,
in_features].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmsqueeze.parts.affine import Affine, affine_grid, affine_spec
from llmsqueeze.parts.coded import Coded
from llmsqueeze.parts.dual_binary import DualBinary, dual_grid, dual_spec
from llmsqueeze.parts.grid import Grid, Layout, Spec, dtype_name
from llmsqueeze.parts.integers import Integers
from llmsqueeze.parts.lowrank import LowRank, lowrank_spec
from llmsqueeze.parts.sparse import Sparse, sparse_spec
from llmsqueeze.progress.stopwatch import timed

__all__ = [
    "PARTS",
    "Affine",
    "Coded",
    "DualBinary",
    "Grid",
    "Integers",
    "Layout",
    "LowRank",
    "Part",
    "Sparse",
    "Spec",
    "decoded",
    "dense_as",
    "dtype_name",
    "grid_spec",
    "is_coded",
    "layout",
    "layout_nbytes",
    "lowrank_spec",
    "nbytes",
    "of_codes",
    "packed",
    "restore",
    "sparse_spec",
    "spec_grid",
    "sum_of_parts",
    "with_grid",
]


class Part(Protocol):
    """One summand of a weight."""

    kind: ClassVar[str]

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as the file stores them."""
        ...

    def spec(self) -> Spec:
        """The settings that `restore` needs beside the tensors; they are written as JSON."""
        ...


PARTS: dict[str, type[Affine] | type[DualBinary] | type[Coded] | type[Integers] | type[Sparse] | type[LowRank]] = {
    part.kind: part for part in (Affine, DualBinary, Coded, Integers, Sparse, LowRank)
}


def grid_spec(grid: Grid, dtype: torch.dtype, rows: int | None = None) -> Spec:
    """The spec of a part with codes on `grid`; `rows`: its number of rows, None for all rows of the weight."""
    return (dual_spec if grid.dual else affine_spec)(grid, dtype, rows)


def spec_grid(spec: Spec) -> Grid:
    """The grid of the part that `spec` describes, an `Affine` or `DualBinary` one."""
    return (dual_grid if spec["part"] == DualBinary.kind else affine_grid)(spec)


def with_grid(specs: Sequence[Spec]) -> list[Spec]:
    """The specs of `Affine` and `DualBinary` parts, which have codes on a grid."""
    return [spec for spec in specs if spec["part"] in (Affine.kind, DualBinary.kind)]


@timed("pack")
def of_codes(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rows: Tensor | None = None) -> Affine | DualBinary:
    """The part with `codes` [n, cols]; scale and zero [n, groups], for a dual grid alpha1 and alpha2.

    `rows` bool [rows]: the n rows of the weight that these are; None for all.
    """
    kind: type[Affine] | type[DualBinary] = DualBinary if grid.dual else Affine
    return kind.from_codes(codes, scale, zero, grid, rows)


def layout(shape: tuple[int, int], spec: Spec) -> Layout:
    """Tensor name -> (shape, dtype) of the part that `spec` describes, for a weight of `shape`."""
    return PARTS[spec["part"]].layout(shape, spec)


def restore(shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Part:
    """The part that `spec` describes, from its stored tensors. Raises CheckpointError for damaged streams."""
    return PARTS[spec["part"]].restore(shape, spec, tensors)


def layout_nbytes(shape: tuple[int, int], specs: Sequence[Spec]) -> int:
    """Bytes in the file of parts with these specs, for a weight of `shape`."""
    entries = (entry for spec in specs for entry in layout(shape, spec).values())
    return sum(math.prod(size) * dtype.itemsize for size, dtype in entries)


def nbytes(parts: Sequence[Part]) -> int:
    """Bytes of these parts in the file."""
    return sum(tensor.nbytes for part in parts for tensor in part.tensors().values())


def is_coded(spec: Spec) -> bool:
    """Whether the codes or integers of the part are entropy-coded."""
    return spec["part"] == Coded.kind or "streams" in spec


@timed("pack")
def decoded(part: Part) -> Part:
    """The part without entropy coding. Raises CheckpointError for damaged streams."""
    if isinstance(part, Coded):
        return part.decoded()
    return part.plain() if isinstance(part, (Affine, DualBinary)) else part


@timed("pack")
def packed(part: Part) -> Part:
    """The part with entropy-coded codes, if it has codes on a grid and takes fewer bytes with them."""
    return part.packed() if isinstance(part, (Affine, DualBinary)) else part


def sum_of_parts(parts: Sequence[Part]) -> Tensor:
    """float32 [rows, cols]: the weight that the parts represent. Entries of `Sparse` parts replace the sum."""
    total = parts[0].dense()
    for part in parts[1:]:
        if isinstance(part, Sparse):
            part.put(total)
        else:
            total += part.dense()
    return total


def dense_as(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """[rows, cols]: `sum_of_parts` in `dtype`. A single integer part needs no float32 copy of the weight."""
    if len(parts) == 1 and isinstance(parts[0], (Coded, Integers)):
        return parts[0].dense(dtype)
    return sum_of_parts(parts).to(dtype)
