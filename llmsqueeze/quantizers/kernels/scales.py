"""The fit of a grid to a group of weights as a kernel (grids.py has the formulas): 4 rows at a time.

A program goes over the columns of its group once for the range, and once for each scale that is tried; they come from
the cache. Sums and extremes are taken per column of the tile, and over its columns at the end: Triton 3.7 cannot
compile a sum over columns within a loop if its result is used twice. The scale is rounded to its stored dtype in whole
numbers, so that no GPU does it in another way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.grids import grid_loops
from llmsqueeze.quantizers.kernels.levels import DUAL, UNIFORM, launch, nearest, rint

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
HALF_TINY = tl.constexpr(2.0**-14)  # the least float16 of full precision
SUBNORMALS = tl.constexpr(2.0**24)  # below it float16 has whole numbers of 2^-24


@triton.jit
def store(scale: tl.tensor, least: tl.tensor, most: tl.tensor, drop: tl.constexpr) -> tl.tensor:
    """Scales rounded as `grids.storable` does; their dtype has `drop` mantissa bits less than float32."""
    size = tl.minimum(tl.maximum(tl.abs(scale), least), most)
    if drop == 13:
        size = tl.where(size < HALF_TINY, tl.div_rn(rint(size * SUBNORMALS), SUBNORMALS), size)
    if drop > 0:
        word = size.to(tl.int32, bitcast=True)
        word = (word + ((1 << (drop - 1)) - 1) + ((word >> drop) & 1)) >> drop << drop
        size = word.to(tl.float32, bitcast=True)
    return tl.where(scale == 0, 1.0, tl.where(scale < 0, -size, size))


@triton.jit
def load_columns(
    w: tl.tensor,
    row: tl.tensor,
    w_row: tl.tensor,
    w_col: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The columns of w [rows, width] from `first` on, of the program's rows; their numbers, and which are there."""
    column = first + tl.arange(0, COLUMNS).to(tl.int64)
    there = column < width
    mask = (row < rows)[:, None] & there[None, :]
    return tl.load(w + row[:, None] * w_row + column[None, :] * w_col, mask=mask, other=0.0), column, there


@triton.jit
def search(
    w: tl.tensor,
    h: tl.tensor,
    ratios: tl.tensor,
    base: tl.tensor,
    origin: tl.tensor,
    row: tl.tensor,
    w_row: tl.tensor,
    w_col: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    tries: tl.tensor,
    top: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    kind: tl.constexpr,
    drop: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The best of `ratios` [tries] times the scale from the range, `base` [rows]; `base` itself if none is tried."""
    best = store(base, least, most, drop)
    least_error = tl.zeros((ROWS,), tl.float32) + float("inf")
    for i in range(tries):
        tried = store(base * tl.load(ratios + i), least, most, drop)
        errors = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, width, COLUMNS):
            values, column, there = load_columns(w, row, w_row, w_col, rows, first, width, COLUMNS)
            weight = tl.load(h + column, mask=there, other=0.0)
            if kind == DUAL:
                _, level = nearest(values, 2.0 * tried[:, None], -tried[:, None], top, kind)
            else:
                _, level = nearest(values, tried[:, None], origin[:, None], top, kind)
            errors += (level - values) * (level - values) * weight[None, :]
        error = tl.sum(errors, axis=1)
        best = tl.where(error < least_error, tried, best)
        least_error = tl.minimum(error, least_error)
    return best


@triton.jit(do_not_specialize=["rows", "width", "tries"])
def fit_kernel(
    w: tl.tensor,
    h: tl.tensor,
    ratios: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    w_row: tl.tensor,
    w_col: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    tries: tl.tensor,
    top: tl.tensor,
    middle: tl.tensor,
    share: tl.tensor,
    last: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    kind: tl.constexpr,
    symmetric: tl.constexpr,
    half: tl.constexpr,
    one_bit: tl.constexpr,
    drop: tl.constexpr,
    weighted: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Scale and zero [rows] of w [rows, width]; `ratios` [tries]: what the scale from the range is multiplied by.

    middle: the zero of a symmetric grid; share: of a symmetric grid's base scale, in largest weights; last: the largest
    base scale; least, most: of the scale's dtype. `weighted`: h [width] is given.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lows, highs = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    sizes, weights = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        values, column, there = load_columns(w, row, w_row, w_col, rows, first, width, COLUMNS)
        lows, highs = tl.minimum(lows, values), tl.maximum(highs, values)
        if one_bit:
            weight = tl.where(there, 1.0, 0.0)
            if weighted:
                weight = tl.load(h + column, mask=there, other=0.0)
            sizes += tl.abs(values) * weight[None, :]
            weights += weight
    low, high = tl.min(lows, axis=1), tl.max(highs, axis=1)
    origin = tl.zeros((ROWS,), tl.float32) + middle
    if symmetric:
        base = tl.minimum(tl.maximum(-low, high) * share, last)
        if one_bit:
            base = tl.div_rn(tl.sum(sizes, axis=1) * 2.0, tl.maximum(tl.sum(weights, axis=0), TINY))
        if half:
            base = tl.maximum(base, TINY)
    else:
        base = tl.div_rn(high - low, top)
        code = rint(tl.div_rn(-low, tl.where(base > 0, base, 1.0)))
        origin = tl.where(base > 0, tl.minimum(tl.maximum(code, 0.0), top), 0.0)
    best = search(
        w, h, ratios, base, origin, row, w_row, w_col, rows, width, tries, top, least, most, kind, drop, ROWS, COLUMNS
    )
    if kind == DUAL:
        origin = -best
        best = 2.0 * best
    tl.store(scale + row, best, mask=row < rows)
    tl.store(zero + row, origin, mask=row < rows)


def fit(w: Tensor, h: Tensor | None, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `grids.fit_on_device`: scale and zero float32 [rows] of w float32 [rows, width], any view; h [width]."""
    rows, width = w.shape
    scale, zero = (torch.empty(rows, dtype=torch.float32, device=w.device) for _ in range(2))
    ratios, levels, stored = settings(grid, dtype, h is not None, w.device)
    weights = ratios if h is None else h.contiguous()
    sizes = rows, width, 0 if h is None else len(ratios)
    numbers = map(float, (levels.top, levels.zero, levels.span, levels.last, stored.least, stored.most))
    kinds = {
        "kind": DUAL.value if levels.dual else UNIFORM.value,
        "symmetric": levels.symmetric,
        "half": levels.half,
        "one_bit": levels.one_bit,
        "drop": stored.drop,
        "weighted": h is not None,
    }
    launch(fit_kernel, rows, w, weights, ratios, scale, zero, *w.stride(), *sizes, *numbers, **kinds)
    return scale, zero


@functools.cache
def settings(grid: Grid, dtype: torch.dtype, search: bool, device: torch.device) -> tuple[Tensor, Any, Any]:
    """Those of the compiled loops (loops/grids.py), the ratios [tries] on a device."""
    ratios, levels, stored = grid_loops().settings(grid, dtype, search)
    return torch.from_numpy(ratios).to(device), levels, stored
