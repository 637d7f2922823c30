"""A compressed weight is a sum of parts: W ~= sum(part.dense() for part in parts), and where a `Sparse` part has an
entry it is that entry.

Every part knows its tensors as they lie in the file (`tensors`), what is needed beside them to read it back
(`spec`), and the shapes and dtypes of its tensors before any exists (`layout`), so that bytes are counted, never
estimated, and a model can be laid out before its file is read. Weights are [rows, cols] = [out_features, in_features].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmsqueeze import bitpack

Spec = dict[str, Any]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Grid:
    """The levels a weight may take: `scale * (code - zero)`, code in 0 .. 2**bits - 1, per row and group of columns.

    `group_size` columns share a scale; -1 means the whole row, and a row that the size does not divide ends in a
    shorter group. Symmetric grids have the fixed zero 2**(bits - 1) (signed integer levels, as compressed-tensors
    stores them; the scale may be negative) or, if `half`, (2**bits - 1) / 2: levels +-1/2, +-3/2 and so on, none at 0.
    Asymmetric ones have an integer zero per group. A grid of one bit is always a half one.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    half: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def fixed_zero(self) -> float:
        """The zero of a symmetric grid."""
        return self.max_code / 2 if self.half else 2.0 ** (self.bits - 1)

    def __str__(self) -> str:
        """As tables and plans write it: '3 bit g128', '1 bit row half', '4 bit g128 asymmetric'."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        kind = " half" if self.half else "" if self.symmetric else " asymmetric"
        return f"{self.bits} bit {group}{kind}"

    def width(self, cols: int) -> int:
        """Columns in a full group of a row of `cols`."""
        return cols if self.group_size == -1 else min(self.group_size, cols)

    def groups(self, cols: int) -> int:
        return -(-cols // self.width(cols))

    def slices(self, cols: int) -> list[slice]:
        """The columns of each group."""
        width = self.width(cols)
        return [slice(start, min(start + width, cols)) for start in range(0, cols, width)]

    def expand(self, per_group: Tensor, cols: int) -> Tensor:
        """[rows, groups] -> [rows, cols], each value repeated over its group."""
        return per_group.repeat_interleave(self.width(cols), dim=1)[:, :cols]


class Part(Protocol):
    """What every summand of a weight offers."""

    kind: ClassVar[str]

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...

    def spec(self) -> Spec: ...


@dataclass(frozen=True)
class Affine:
    """Integer codes on a grid, of all rows of the weight or of some; the other rows are zeros.

    codes int32 [held, words]; scale [held, groups]; zero int32 [groups, words of held]; rows int32 [words of rows], one
    bit a row, set for the `held` rows that are here, or None for all of them.
    """

    kind: ClassVar[str] = "affine"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: Tensor | None
    shape: tuple[int, int]
    grid: Grid

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rows: Tensor | None = None) -> Affine:
        """codes [held, cols] and zero [held, groups] as plain integers; scale [held, groups] in its stored dtype.

        `rows` bool [rows] marks the rows that these are, in their order.
        """
        packed_zero = None if grid.symmetric else bitpack.pack(zero.T.to(torch.uint8), grid.bits)
        packed_rows = None if rows is None else bitpack.pack(rows[None].to(torch.uint8), 1)[0]
        shape = (len(codes) if rows is None else len(rows), codes.shape[1])
        return cls(bitpack.pack(codes, grid.bits), scale, packed_zero, packed_rows, shape, grid)

    def dense(self) -> Tensor:
        held, cols = len(self.codes), self.shape[1]
        levels = bitpack.unpack(self.codes, self.grid.bits, cols).float()
        if self.zero is None:
            levels -= self.grid.fixed_zero
        else:
            levels -= self.grid.expand(bitpack.unpack(self.zero, self.grid.bits, held).T.float(), cols)
        levels.mul_(self.grid.expand(self.scale.float(), cols))
        if self.rows is None:
            return levels
        dense = torch.zeros(self.shape, device=levels.device)
        dense[bitpack.unpack(self.rows[None], 1, self.shape[0])[0].bool()] = levels
        return dense

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "rows": self.rows}
        return {name: tensor for name, tensor in stored.items() if tensor is not None}

    def spec(self) -> Spec:
        return affine_spec(self.grid, self.scale.dtype, None if self.rows is None else len(self.codes))

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), grid = shape, spec_grid(spec)
        held = spec.get("rows", rows)
        layout: Layout = {
            "codes": ((held, bitpack.words(cols, grid.bits)), torch.int32),
            "scale": ((held, grid.groups(cols)), getattr(torch, spec["dtype"])),
        }
        if not grid.symmetric:
            layout["zero"] = ((grid.groups(cols), bitpack.words(held, grid.bits)), torch.int32)
        if "rows" in spec:
            layout["rows"] = ((bitpack.words(rows, 1),), torch.int32)
        return layout

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Affine:
        zero, rows = tensors.get("zero"), tensors.get("rows")
        return cls(tensors["codes"], tensors["scale"], zero, rows, shape, spec_grid(spec))


@dataclass(frozen=True)
class Sparse:
    """Single weights at full precision, row by row: column index [count], how many in each row [rows], value [count].

    Index and row counts are unsigned 16-bit numbers kept in int16 tensors (int32 for rows of 65 536 or more
    columns): 32 bits an outlier with its 16-bit value.
    """

    kind: ClassVar[str] = "sparse"
    index: Tensor
    row_count: Tensor
    value: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, weight: Tensor) -> Sparse:
        """The entries of `weight` [rows, cols] where the bool `mask` is set, in the weight's own dtype."""
        rows, cols = weight.shape
        dtype = _index_dtype(cols)
        index, row_count = mask.nonzero()[:, 1], mask.sum(dim=1)
        return cls(_wrap(index, dtype), _wrap(row_count, dtype), weight[mask], (rows, cols))

    def dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.value.device)
        self.put(dense)
        return dense

    def put(self, dense: Tensor) -> None:
        """Sets the entries in `dense` [rows, cols]."""
        row = torch.arange(self.shape[0], device=dense.device).repeat_interleave(_unwrap(self.row_count))
        dense[row, _unwrap(self.index)] = self.value.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "row_count": self.row_count, "value": self.value}

    def spec(self) -> Spec:
        return sparse_spec(len(self.value), self.value.dtype)

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), count = shape, spec["count"]
        dtype = _index_dtype(cols)
        value = getattr(torch, spec["dtype"])
        return {"index": ((count,), dtype), "row_count": ((rows,), dtype), "value": ((count,), value)}

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Sparse:
        return cls(tensors["index"], tensors["row_count"], tensors["value"], shape)


@dataclass(frozen=True)
class LowRank:
    """A product of two thin 8-bit factors: left int8 [rows, rank], right int8 [rank, cols], scale [rank] for both."""

    kind: ClassVar[str] = "lowrank"
    left: Tensor
    right: Tensor
    scale: Tensor

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        """Rounds float factors [rows, rank] and [rank, cols]; `dtype` is the scale's in the file."""
        tiny = torch.finfo(torch.float32).tiny
        most_left, most_right = left.abs().amax(dim=0).clamp(min=tiny), right.abs().amax(dim=1).clamp(min=tiny)
        # of the products' size, not of a step's: float16 has no room for that
        scale = (most_left * most_right).clamp(max=torch.finfo(dtype).max).to(dtype)
        codes = left / most_left * 127, right / most_right[:, None] * 127
        return cls(codes[0].round().to(torch.int8), codes[1].round().to(torch.int8), scale)

    def dense(self) -> Tensor:
        return self.left.float() @ (self.right.float() * (self.scale.float() / 127**2)[:, None])

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "scale": self.scale}

    def spec(self) -> Spec:
        return lowrank_spec(len(self.scale), self.scale.dtype)

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), rank = shape, spec["rank"]
        dtype = getattr(torch, spec["dtype"])
        return {
            "left": ((rows, rank), torch.int8),
            "right": ((rank, cols), torch.int8),
            "scale": ((rank,), dtype),
        }

    @classmethod
    def restore(cls, _shape: tuple[int, int], _spec: Spec, tensors: Mapping[str, Tensor]) -> LowRank:
        return cls(tensors["left"], tensors["right"], tensors["scale"])


PARTS: dict[str, type[Affine] | type[Sparse] | type[LowRank]] = {part.kind: part for part in (Affine, Sparse, LowRank)}


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


def sparse_spec(count: int, dtype: torch.dtype) -> Spec:
    return {"part": Sparse.kind, "count": count, "dtype": dtype_name(dtype)}


def lowrank_spec(rank: int, dtype: torch.dtype) -> Spec:
    return {"part": LowRank.kind, "rank": rank, "dtype": dtype_name(dtype)}


def spec_grid(spec: Spec) -> Grid:
    return Grid(spec["bits"], spec["group_size"], spec["symmetric"], spec.get("half", False))


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


def sum_of_parts(parts: Sequence[Part]) -> Tensor:
    """float32 [rows, cols]: the weight that the parts stand for; single weights kept exactly stand as they are."""
    total = parts[0].dense()
    for part in parts[1:]:
        if isinstance(part, Sparse):
            part.put(total)
        else:
            total += part.dense()
    return total


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _index_dtype(cols: int) -> torch.dtype:
    return torch.int16 if cols < 1 << 16 else torch.int32


def _wrap(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(torch.int32).to(dtype) if dtype == torch.int16 else values.to(dtype)


def _unwrap(stored: Tensor) -> Tensor:
    values = stored.to(torch.int64)
    return values & 0xFFFF if stored.dtype == torch.int16 else values
