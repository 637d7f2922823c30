"""A compressed weight is a sum of parts: W ~= sum(part.dense() for part in parts), and where a `Sparse` part has an
entry it is that entry.

Every part knows its tensors as they lie in the file (`tensors`), what is needed beside them to read it back
(`spec`), and the shapes and dtypes of its tensors before any exists (`layout`), so that bytes are counted, never
estimated, and a model can be laid out before its file is read. Weights are [rows, cols] = [out_features, in_features].
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
    """What every summand of a weight offers."""

    kind: ClassVar[str]

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...

    def spec(self) -> Spec: ...


PARTS: dict[str, type[Affine] | type[DualBinary] | type[Coded] | type[Integers] | type[Sparse] | type[LowRank]] = {
    part.kind: part for part in (Affine, DualBinary, Coded, Integers, Sparse, LowRank)
}


def grid_spec(grid: Grid, dtype: torch.dtype, rows: int | None = None) -> Spec:
    """The spec of the part that holds codes on `grid`; `rows`: how many of the weight's, None for all."""
    return (dual_spec if grid.dual else affine_spec)(grid, dtype, rows)


def spec_grid(spec: Spec) -> Grid:
    """The grid of a part that has one."""
    return (dual_grid if spec["part"] == DualBinary.kind else affine_grid)(spec)


def with_grid(specs: Sequence[Spec]) -> list[Spec]:
    """Those of the specs whose parts hold codes on a grid."""
    return [spec for spec in specs if spec["part"] in (Affine.kind, DualBinary.kind)]


def of_codes(codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rows: Tensor | None = None) -> Affine | DualBinary:
    """The part that holds `codes` [held, cols]; scale and zero [held, groups], of a dual grid alpha1 and alpha2."""
    made: Affine | DualBinary = (DualBinary if grid.dual else Affine).from_codes(codes, scale, zero, grid, rows)
    return made


def layout(shape: tuple[int, int], spec: Spec) -> Layout:
    """Tensor name -> (shape, dtype) of the part that `spec` describes, for a weight of `shape`."""
    return PARTS[spec["part"]].layout(shape, spec)


def restore(shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Part:
    """The part that `spec` describes, from its stored tensors."""
    return PARTS[spec["part"]].restore(shape, spec, tensors)


def layout_nbytes(shape: tuple[int, int], specs: Sequence[Spec]) -> int:
    """Bytes that parts of these specs take in the file, for a weight of `shape`."""
    stored = (entry for spec in specs for entry in layout(shape, spec).values())
    return sum(math.prod(size) * dtype.itemsize for size, dtype in stored)


def nbytes(parts: Sequence[Part]) -> int:
    """Bytes that these parts take in the file."""
    return sum(tensor.nbytes for part in parts for tensor in part.tensors().values())


def is_coded(spec: Spec) -> bool:
    """Whether the part's codes are entropy-coded."""
    return spec["part"] == Coded.kind or "streams" in spec


def decoded(part: Part) -> Part:
    """The part as it is used: with integers or codes that are not entropy-coded."""
    if isinstance(part, Coded):
        return part.decoded()
    return part.plain() if isinstance(part, (Affine, DualBinary)) else part


def packed(part: Part) -> Part:
    """The part with entropy-coded codes, if it has codes and that takes fewer bytes."""
    return part.packed() if isinstance(part, (Affine, DualBinary)) else part


def sum_of_parts(parts: Sequence[Part]) -> Tensor:
    """float32 [rows, cols]: the weight that the parts stand for; single weights kept exactly stand as they are."""
    total = parts[0].dense()
    for part in parts[1:]:
        if isinstance(part, Sparse):
            part.put(total)
        else:
            total += part.dense()
    return total


def dense_as(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """[rows, cols]: `sum_of_parts` in another dtype, without its float32 form where one part can do that."""
    if len(parts) == 1 and isinstance(parts[0], (Coded, Integers)):
        return parts[0].dense(dtype)
    return sum_of_parts(parts).to(dtype)
