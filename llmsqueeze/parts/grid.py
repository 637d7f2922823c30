"""The levels that weights may take, and what parts say of themselves."""

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
    """The levels a weight may take, per row and group of columns: `scale * (code - zero)`, code in 0 .. 2**bits - 1.

    `group_size` columns share a scale; -1 means the whole row, and a row that the size does not divide ends in a
    shorter group. Symmetric grids have the fixed zero 2**(bits - 1) (signed integer levels, as compressed-tensors
    stores them; the scale may be negative) or, if `half`, (2**bits - 1) / 2: levels +-1/2, +-3/2 and so on, none at 0.
    Asymmetric ones have an integer zero per group. A grid of one bit is always a half one. `dual` ones are no
    even steps but the four sums of two scales: alpha2, 0, alpha1 + alpha2 and alpha1, as codes 0 to 3.
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
        """The zero of a symmetric grid: the code of level 0."""
        if self.dual:
            return 1.0
        return self.max_code / 2 if self.half else 2.0 ** (self.bits - 1)

    def __str__(self) -> str:
        """As tables and plans write it: '3 bit g128', '1 bit row half', '4 bit g128 asymmetric'."""
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        kind = " dual" if self.dual else " half" if self.half else "" if self.symmetric else " asymmetric"
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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def mark_rows(rows: Tensor | None) -> Tensor | None:
    """int32 [words], one bit a row, of the bool [rows] that says which rows a part holds; None for all of them."""
    return None if rows is None else bitpack.pack(rows[None].to(torch.uint8), 1)[0]


def onto_rows(held: Tensor, marks: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[rows, cols] with the `held` rows where the marks are set, zeros elsewhere."""
    if marks is None:
        return held
    dense = torch.zeros(shape, dtype=held.dtype, device=held.device)
    dense[bitpack.unpack(marks[None], 1, shape[0])[0].bool()] = held
    return dense
