"""Error feedback as a kernel: the columns of a panel are rounded in order, 4 rows at a time (gptq.py, coded.py).

    e[:, j] = (w[:, j] - rounded[:, j]) / U[j, j];   w[:, k] -= e[:, j] * U[j, k]   for k > j in the panel

A program keeps the panel of its rows in registers, [4, 128] floats: right of column j the weights with the feedback so
far, left of it the errors. Triton cannot index registers, so column j is picked by a masked sum, and the outer product
goes over the whole tile, with zeros left of j. The factor's rows come from the cache (64 KB for a panel); shared memory
is not needed, so any GPU has room for it. A launch ends where a group ends: the scales of the next group are fitted to
its weights in memory, with the feedback so far.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.gptq import PANEL, State, panels
from llmsqueeze.quantizers.kernels.levels import (
    DUAL,
    STEPS,
    Levels,
    launch,
    load_panel,
    nearest,
    pick,
    put,
)
from llmsqueeze.quantizers.steps import RoundedToSteps


@triton.jit(do_not_specialize=["rows", "span", "begin", "end", "group"])
def feedback_kernel(
    w: tl.tensor,
    exact: tl.tensor,
    pinned: tl.tensor,
    upper: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    col: tl.tensor,
    codes: tl.tensor,
    error: tl.tensor,
    w_row: tl.tensor,
    exact_row: tl.tensor,
    exact_col: tl.tensor,
    pinned_row: tl.tensor,
    pinned_col: tl.tensor,
    upper_row: tl.tensor,
    upper_col: tl.tensor,
    scale_row: tl.tensor,
    codes_row: tl.tensor,
    error_row: tl.tensor,
    rows: tl.tensor,
    span: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    group: tl.tensor,
    top: tl.tensor,
    kind: tl.constexpr,
    has_pinned: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Rounds the columns begin to end of a panel; all pointers are those of its first column. See `round_columns`."""
    tile, row, column, inside = load_panel(w, w_row, rows, span, ROWS, COLUMNS)
    there = row < rows
    chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
    origin = tl.zeros((ROWS,), tl.float32)
    step = tl.load(scale + row * scale_row + group, mask=there, other=1.0)
    if kind != STEPS:
        origin = tl.load(zero + row * scale_row + group, mask=there, other=0.0)
    for j in range(begin, end):
        of_column = step
        if kind == STEPS:
            of_column = step * tl.load(col + j)
        value = pick(tile, column, j)
        code, level = nearest(value, of_column, origin, top, kind)
        if has_pinned:
            outlier = tl.load(pinned + row * pinned_row + j * pinned_col, mask=there, other=0) != 0
            original = tl.load(exact + row * exact_row + j * exact_col, mask=there, other=0.0)
            level = tl.where(outlier, original, level)
            code = tl.where(outlier, 1.0 if kind == DUAL else origin, code)
        e = tl.div_rn(value - level, tl.load(upper + j * upper_row + j * upper_col))
        after = (column > j) & (column < span)
        factors = tl.load(upper + j * upper_row + column * upper_col, mask=after, other=0.0)
        tile = put(tile - e[:, None] * factors[None, :], column, j, e)
        chosen = put(chosen, column, j, code)
    now = inside & ((column >= begin) & (column < end))[None, :]
    tl.store(w + row[:, None] * w_row + column[None, :], tile, mask=inside & (column >= end)[None, :])
    tl.store(error + row[:, None] * error_row + column[None, :], tile, mask=now)
    code_places = codes + row[:, None] * codes_row + column[None, :]
    tl.store(code_places, chosen.to(codes.dtype.element_ty), mask=now)


def round_columns(
    w: Tensor,
    exact: Tensor,
    pinned: Tensor | None,
    upper: Tensor,
    levels: Levels,
    panel: slice,
    columns: slice,
    codes: Tensor,
    error: Tensor,
) -> None:
    """Rounds these columns, all of one group, of a panel of at most 128 columns.

    w float32 [rows, cols] gets the feedback in the columns of the panel that follow; codes [rows, cols] (uint8, or
    float32 for steps) and error float32 [rows, span of the panel] become theirs. Rows of these three have no gaps
    between columns. pinned bool [rows, cols]: entries that have the value of `exact` float32 [rows, cols]; upper [cols,
    cols] may be any view.
    """
    assert panel.stop - panel.start <= PANEL
    part, factor = w[:, panel], upper[panel, panel]
    originals, mask = (part, part) if pinned is None else (exact[:, panel], pinned[:, panel])
    tensors = part, originals, mask, factor, levels.scale, levels.zero, levels.col_from(panel.start)
    strides = part.stride(0), *originals.stride(), *mask.stride(), *factor.stride(), levels.scale.stride(0)
    begin, end = columns.start - panel.start, columns.stop - panel.start
    sizes = len(w), panel.stop - panel.start, begin, end, columns.start // levels.width, levels.top
    outcome, rows = (codes[:, panel], error), (codes.stride(0), error.stride(0))
    kinds = {"kind": levels.kind, "has_pinned": pinned is not None}
    launch(feedback_kernel, len(w), *tensors, *outcome, *strides, *rows, *sizes, **kinds)


def round_panel(state: State, panel: slice, error: Tensor) -> None:
    """As `gptq.panel_on_device`: rounds the columns of the panel; error [rows, span] becomes theirs."""
    width = state.grid.width(state.w.shape[1])
    for start in range(panel.start, panel.stop, min(width, PANEL)):
        columns = slice(start, min(start + width, panel.stop))
        if width <= PANEL:
            state.fit(start)
        levels = Levels.of_grid(state.grid, state.scale, state.zero, state.w.shape[1])
        round_columns(state.w, state.exact, state.pinned, state.upper, levels, panel, columns, state.codes, error)


def feedback(target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None) -> RoundedToSteps:
    """As `coded_on_device.feedback`: rounds to the steps of `start`; the columns that follow take the error up."""
    rows, cols = target.shape
    levels = Levels.of_steps(powers(start.row_exponent), powers(start.col_exponent))
    w, integers = (target.clone(memory_format=torch.contiguous_format) for _ in range(2))
    errors = torch.empty(rows * PANEL, dtype=w.dtype, device=w.device)
    for panel in panels(cols):
        error = errors[: rows * (panel.stop - panel.start)].view(rows, -1)
        round_columns(w, target, pinned, curvature.upper, levels, panel, panel, integers, error)
        w[:, panel.stop :].addmm_(error, curvature.upper[panel, panel.stop :], alpha=-1)
    return replace(start, integers=integers)
