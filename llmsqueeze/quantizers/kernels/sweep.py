"""Coordinate descent as a kernel: one pass over the columns of a panel, 4 rows at a time (descent.py, coded.py).

    for each column j: code[j] = the level nearest to w[j] + g[j] / H[j, j];   g[k] -= change * H[j, k]   for k > j

g = (t - w) H in the columns of the panel, one matrix product. A program keeps the panel of its rows in registers, as in
feedback.py: the gradient, the new codes, and the changes, three times [4, 128] floats.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.quantizers.gptq import panels
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.quantizers.kernels.levels import (
    STEPS,
    Levels,
    launch,
    load_panel,
    nearest,
    pick,
    put,
)
from llmsqueeze.quantizers.steps import RoundedToSteps


@triton.jit(do_not_specialize=["rows", "start", "span", "width"])
def sweep_kernel(
    gradient: tl.tensor,
    dense: tl.tensor,
    before: tl.tensor,
    pinned: tl.tensor,
    H: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    col: tl.tensor,
    residual: tl.tensor,
    codes: tl.tensor,
    gradient_row: tl.tensor,
    dense_row: tl.tensor,
    before_row: tl.tensor,
    before_col: tl.tensor,
    pinned_row: tl.tensor,
    pinned_col: tl.tensor,
    H_row: tl.tensor,
    H_col: tl.tensor,
    scale_row: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    span: tl.tensor,
    width: tl.tensor,
    top: tl.tensor,
    kind: tl.constexpr,
    has_pinned: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One pass over the panel whose first column is `start`; all pointers are those of this column. See `descend`."""
    tile, row, column, inside = load_panel(gradient, gradient_row, rows, span, ROWS, COLUMNS)
    there = row < rows
    chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
    changes = tl.zeros((ROWS, COLUMNS), tl.float32)
    origin = tl.zeros((ROWS,), tl.float32)
    for j in range(span):
        if kind == STEPS:
            step = tl.load(scale + row * scale_row, mask=there, other=1.0) * tl.load(col + j)
        else:
            group = (start + j) // width
            step = tl.load(scale + row * scale_row + group, mask=there, other=1.0)
            origin = tl.load(zero + row * scale_row + group, mask=there, other=0.0)
        old = tl.load(dense + row * dense_row + j, mask=there, other=0.0)
        best = old + tl.div_rn(pick(tile, column, j), tl.load(H + j * H_row + j * H_col))
        code, level = nearest(best, step, origin, top, kind)
        if has_pinned:
            outlier = tl.load(pinned + row * pinned_row + j * pinned_col, mask=there, other=0) != 0
            kept = tl.load(before + row * before_row + j * before_col, mask=there, other=0).to(tl.float32)
            code = tl.where(outlier, kept, code)
            level = tl.where(outlier, old, level)
        change = level - old
        after = (column > j) & (column < span)
        factors = tl.load(H + j * H_row + column * H_col, mask=after, other=0.0)
        tile = tile - change[:, None] * factors[None, :]
        changes = put(changes, column, j, change)
        chosen = put(chosen, column, j, code)
    places = row[:, None] * dense_row + column[None, :]
    tl.store(residual + places, tl.load(residual + places, mask=inside, other=0.0) - changes, mask=inside)
    tl.store(codes + places, chosen.to(codes.dtype.element_ty), mask=inside)


def descend(before: Tensor, dense: Tensor, target: Tensor, H: Tensor, levels: Levels, pinned: Tensor | None) -> Tensor:
    """The codes after one pass, of the dtype of `before` [rows, cols] (uint8, or float32 for steps).

    dense float32 [rows, cols]: their weight; target float32 [rows, cols]; H [cols, cols]; pinned bool [rows, cols]:
    entries that keep their code and weight.
    """
    dense = dense.contiguous()
    residual, codes = target - dense, torch.empty_like(before, memory_format=torch.contiguous_format)
    residual = residual.contiguous()
    kinds = {"kind": levels.kind, "has_pinned": pinned is not None}
    for panel in panels(dense.shape[1]):
        gradient, within = residual @ H[:, panel], H[panel, panel]
        mask = gradient if pinned is None else pinned[:, panel]
        inputs = gradient, dense[:, panel], before[:, panel], mask, within, levels.scale, levels.zero
        strides = gradient.stride(0), dense.stride(0), *before.stride(), *mask.stride(), *within.stride()
        sizes = levels.scale.stride(0), len(dense), panel.start, panel.stop - panel.start, levels.width, levels.top
        outcome = residual[:, panel], codes[:, panel]
        launch(sweep_kernel, len(dense), *inputs, levels.col_from(panel.start), *outcome, *strides, *sizes, **kinds)
    return codes


def sweep_grid(rounded: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Rounded:
    """As `descent_on_device.coordinate_descent`: each code becomes the one with the least error."""
    levels = Levels.of_grid(rounded.grid, rounded.scale.float(), rounded.zero.float(), target.shape[1])
    return replace(rounded, codes=descend(rounded.codes, rounded.dense(), target, H, levels, pinned))


def sweep_steps(rounded: RoundedToSteps, target: Tensor, H: Tensor, pinned: Tensor | None) -> RoundedToSteps:
    """As `coded_on_device.coordinate_descent`: each integer becomes the one with the least error; outliers have 0."""
    levels = Levels.of_steps(powers(rounded.row_exponent), powers(rounded.col_exponent))
    return replace(rounded, integers=descend(rounded.integers, rounded.dense(), target, H, levels, pinned))
