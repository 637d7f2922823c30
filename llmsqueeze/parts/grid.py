"""The grid: the levels of a weight. The types of a part's spec and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parts import bitpack

Spec = dict[str, Any]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Grid:
    """The levels of a weight, per row and group of columns: `scale * (code - zero)`, code in 0 .. 2**bits - 1.

    `group_size` columns share a scale; -1 is the whole row. If the size does not divide the row, the last group is
    shorter. Symmetric grids have the fixed zero 2**(bits - 1) (signed integer levels, as compressed-tensors stores
    them; the scale can be negative). If they are `half`, it is (2**bits - 1) / 2: the levels are +-1/2, +-3/2 and so
    on, without 0. Asymmetric grids have an integer zero per group. A grid of one bit is always half. The levels of a
    `dual` grid are not uniform: they are the sums of two scales, alpha2, 0, alpha1 + alpha2 and alpha1, codes 0 to 3.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    half: bool = False
    dual: bool = False

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def fixed_zero(self) -> float:
        """The zero of a symmetric grid: the code of level 0. No code has it if the grid is half."""
        if self.dual:
            return 1.0
        return self.max_code / 2 if self.half else 2.0 ** (self.bits - 1)

    def __str__(self) -> str:
        """As in tables and plans: '3 bit g128', '1 bit row half', '4 bit g128 asymmetric'."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        kind = " dual" if self.dual else " half" if self.half else "" if self.symmetric else " asymmetric"
        return f"{self.bits} bit {group}{kind}"

    def width(self, cols: int) -> int:
        """Columns in a full group of a row of `cols`."""
        return cols if self.group_size == -1 else min(self.group_size, cols)

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols`."""
        return -(-cols // self.width(cols))

    def slices(self, cols: int) -> list[slice]:
        """The columns of each group in a row of `cols`."""
        width = self.width(cols)
        return [slice(start, min(start + width, cols)) for start in range(0, cols, width)]

    def expand(self, per_group: Tensor, cols: int) -> Tensor:
        """[rows, groups] -> [rows, cols], each value repeated over its group."""
        return per_group.repeat_interleave(self.width(cols), dim=1)[:, :cols]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in specs: 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def mark_rows(rows: Tensor | None) -> Tensor | None:
    """int32 [words], one bit per row, from bool [rows]: the rows of a part; None for all."""
    return None if rows is None else bitpack.pack(rows[None].to(torch.uint8), 1)[0]


def onto_rows(values: Tensor, marks: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[rows, cols] with `values` [n, cols] in the n rows whose mark is set, and zeros in the others."""
    if marks is None:
        return values
    dense = torch.zeros(shape, dtype=values.dtype, device=values.device)
    dense[bitpack.unpack(marks[None], 1, shape[0])[0].bool()] = values
    return dense
