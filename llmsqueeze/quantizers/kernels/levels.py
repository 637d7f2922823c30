"""What the kernels share: the level nearest to a value, on a tile of rows.

Every operation rounds as torch's does: divisions are IEEE's (`div_rn`), no product is fused with a sum (`OPTIONS`), and
half-way cases go to the even number.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.gptq import PANEL

# a tile is one warp's, whose lanes have its columns side by side: no warp waits for another. Three tiles of 8 rows take
# all registers that a thread can have
ROWS = 4
OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}

# kinds of levels
UNIFORM = tl.constexpr(0)
DUAL = tl.constexpr(1)
STEPS = tl.constexpr(2)
WHOLE = tl.constexpr(8388608.0)  # 2^23: from here on float32 has whole numbers only


@dataclass(frozen=True)
class Levels:
    """The levels of a weight [rows, cols]. Of a grid: scale, zero float32 [rows, groups] with `width` columns each, and
    the last code `top`. Of steps: scale [rows, 1] times col [cols], both float32."""

    kind: int
    scale: Tensor
    zero: Tensor
    col: Tensor
    width: int
    top: float = 0.0

    @classmethod
    def of_grid(cls, grid: Grid, scale: Tensor, zero: Tensor, cols: int) -> Levels:
        """scale, zero float32 [rows, groups]; for a dual grid they are alpha1 and alpha2."""
        kind = DUAL.value if grid.dual else UNIFORM.value
        return cls(kind, scale.contiguous(), zero.contiguous(), scale, grid.width(cols), float(grid.max_code))

    @classmethod
    def of_steps(cls, row: Tensor, col: Tensor) -> Levels:
        """row [rows], col [cols]: the step of a weight is their product."""
        return cls(STEPS.value, row[:, None].contiguous(), row, col.contiguous(), len(col))

    def col_from(self, start: int) -> Tensor:
        """The steps of the columns from `start` on. For a grid anything: its kernels do not read it."""
        return self.col[start:] if self.kind == STEPS.value else self.col


def launch(kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
    """Starts a kernel, one program for each tile of `rows`, on the GPU of its first argument."""
    first: Tensor = arguments[0]
    # Triton takes the current GPU; its interpreter has tensors on the CPU
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(triton.cdiv(rows, ROWS),)](*arguments, **constants, ROWS=ROWS, COLUMNS=PANEL, **OPTIONS)


@triton.jit
def load_panel(
    values: tl.tensor, stride: tl.tensor, rows: tl.tensor, span: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """The program's tile [ROWS, COLUMNS] of a panel [rows, span] without gaps between columns; the numbers of its rows,
    int64, and of its columns, and which of both are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < span)[None, :]
    tile = tl.load(values + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    return tile, row, column, inside


@triton.jit
def rint(x: tl.tensor) -> tl.tensor:
    """The nearest whole number, half-way cases to the even one. The interpreter has no libdevice."""
    size = tl.abs(x)
    whole = (size + WHOLE) - WHOLE
    return tl.where(size < WHOLE, tl.where(x < 0, -whole, whole), x)


@triton.jit
def pick(tile: tl.tensor, column: tl.tensor, j: tl.tensor) -> tl.tensor:
    """[rows]: column j of a tile [rows, span], exact: all other terms of the sum are zeros."""
    return tl.sum(tl.where(column[None, :] == j, tile, 0.0), axis=1)


@triton.jit
def put(tile: tl.tensor, column: tl.tensor, j: tl.tensor, values: tl.tensor) -> tl.tensor:
    """The tile [rows, span] with `values` [rows] as column j."""
    return tl.where(column[None, :] == j, values[:, None], tile)


@triton.jit
def nearest(value: tl.tensor, scale: tl.tensor, zero: tl.tensor, top: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """The code of the level nearest to `value`, and that level; all shapes broadcast."""
    if kind == DUAL:
        sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
        first = (value - (scale + zero) * 0.5) * sign >= 0
        upper = tl.where(first, scale, 0.0)
        second = (upper + zero * 0.5 - value) * sign >= 0
        code = tl.where(first, 3.0, 1.0) - tl.where(second, 1.0, 0.0)
        level = upper + tl.where(second, zero, 0.0)
    elif kind == STEPS:
        code = rint(tl.div_rn(value, scale))
        level = code * scale
    else:
        code = tl.minimum(tl.maximum(rint(tl.div_rn(value, scale) + zero), 0.0), top)
        level = (code - zero) * scale
    return code, level
