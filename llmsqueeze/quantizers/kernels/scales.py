"""The fit of a grid to a group of weights as a kernel (grids.py has the formulas): 4 rows at a time.

A program goes over the columns of its group once for the range, and once for each scale that is tried; they come from
the cache. Sums and extremes are taken per column of the tile, and over its columns at the end: Triton 3.7 cannot
compile a sum over columns within a loop if its result is used twice. The scale is rounded to its stored dtype in whole
numbers, so that no GPU does it in another way.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.grids import RATIOS
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
    there = row < rows
    lows, highs = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    sizes, weights = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        mask = there[:, None] & (column < width)[None, :]
        values = tl.load(w + row[:, None] * w_row + column[None, :] * w_col, mask=mask, other=0.0)
        lows, highs = tl.minimum(lows, values), tl.maximum(highs, values)
        if one_bit:
            weight = tl.where(column < width, 1.0, 0.0)
            if weighted:
                weight = tl.load(h + column, mask=column < width, other=0.0)
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
    best = store(base, least, most, drop)
    least_error = tl.zeros((ROWS,), tl.float32) + float("inf")
    for i in range(tries):
        tried = store(base * tl.load(ratios + i), least, most, drop)
        errors = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS).to(tl.int64)
            mask = there[:, None] & (column < width)[None, :]
            values = tl.load(w + row[:, None] * w_row + column[None, :] * w_col, mask=mask, other=0.0)
            weight = tl.load(h + column, mask=column < width, other=0.0)
            if kind == DUAL:
                _, level = nearest(values, 2.0 * tried[:, None], -tried[:, None], top, kind)
            else:
                _, level = nearest(values, tried[:, None], origin[:, None], top, kind)
            errors += (level - values) * (level - values) * weight[None, :]
        error = tl.sum(errors, axis=1)
        best = tl.where(error < least_error, tried, best)
        least_error = tl.minimum(error, least_error)
    if kind == DUAL:
        origin = -best
        best = 2.0 * best
    tl.store(scale + row, best, mask=there)
    tl.store(zero + row, origin, mask=there)


def fit(w: Tensor, h: Tensor | None, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `grids.fit_on_device`: scale and zero float32 [rows] of w float32 [rows, width], any view; h [width]."""
    rows, width = w.shape
    scale, zero = (torch.empty(rows, dtype=torch.float32, device=w.device) for _ in range(2))
    limits, single, top = torch.finfo(dtype), torch.finfo(torch.float32), float(grid.max_code)
    share, last = (1 / 2, limits.max / 4) if grid.dual else (2 / top, single.max)  # alpha1 is twice that
    tried = ratios(grid.symmetric and not grid.half, w.device)
    weights = tried if h is None else h.contiguous()
    least = max(limits.tiny * limits.eps, single.tiny)
    sizes = rows, width, 0 if h is None else len(tried)
    kinds = {
        "kind": DUAL.value if grid.dual else UNIFORM.value,
        "symmetric": grid.symmetric,
        "half": grid.half,
        "one_bit": grid.half and grid.bits == 1,
        "drop": {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}[dtype],
        "weighted": h is not None,
    }
    tensors, numbers = (w, weights, tried, scale, zero), (top, grid.fixed_zero, share, last, least, limits.max)
    launch(fit_kernel, rows, *tensors, *w.stride(), *sizes, *numbers, **kinds)
    return scale, zero


@functools.cache
def ratios(both_signs: bool, device: torch.device) -> Tensor:
    """float32 [tries]: what the scale from the range is multiplied by in a search."""
    signs = [1.0, -1.0] if both_signs else [1.0]
    return torch.tensor([sign * ratio for sign in signs for ratio in RATIOS], dtype=torch.float32, device=device)
