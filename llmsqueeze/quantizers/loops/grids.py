"""The loops of grids.py and gptq.py, compiled by numba: a panel of columns, tile after tile of rows.

A tile is transposed, [columns, TILE rows], and stays in cache: the innermost loops run over its rows, or over the
scales that are tried, which processors do eight or sixteen at a time. Every weight sees the same operations in the same
order as in the torch forms, so codes and scales are equal bit by bit but for the order of the sums in the search.
Constants are float32: numba would turn the product of a float32 and a plain number into a float64.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmsqueeze.parallel.threads import TILE
from llmsqueeze.parts import Grid
from llmsqueeze.parts.compiled import compiled
from llmsqueeze.quantizers.grids import RATIOS

Floats = NDArray[np.floating[Any]]
Number = Any  # a float of the weight's dtype
Flag = Any

ZERO, HALF, ONE, TWO, THREE = (np.float32(value) for value in (0, 0.5, 1, 2, 3))
TINY = np.finfo(np.float32).tiny
HALF_TINY = np.float32(2.0**-14)  # the least float16 of full precision
SUBNORMALS = np.float32(2.0**24)  # below it float16 has whole numbers of 2^-24


class Levels(NamedTuple):
    """A grid, as the loops take it. top: the last code; zero: of a symmetric grid; span: of a symmetric grid's base
    scale, in largest weights; last: the largest base scale."""

    top: Number
    zero: Number
    span: Number
    last: Number
    symmetric: bool
    half: bool
    one_bit: bool
    dual: bool


class Stored(NamedTuple):
    """The dtype of scales: mantissa bits that float32 has more, the least and the largest scale."""

    drop: int
    least: Number
    most: Number


@functools.cache
def settings(grid: Grid, dtype: torch.dtype, search: bool) -> tuple[Floats, Levels, Stored]:
    """The ratios that are tried (only 1 without search), the grid, and the dtype of the scales."""
    limits, single, top = torch.finfo(dtype), torch.finfo(torch.float32), grid.max_code
    span = np.float32(1 / 2 if grid.dual else 2 / top)
    last = np.float32(limits.max / 4 if grid.dual else single.max)  # alpha1 is twice that
    kind = grid.symmetric, grid.half, grid.half and grid.bits == 1, grid.dual
    levels = Levels(np.float32(top), np.float32(grid.fixed_zero), span, last, *kind)
    drop = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}[dtype]
    stored = Stored(drop, np.float32(max(limits.tiny * limits.eps, single.tiny)), np.float32(limits.max))
    signs = [1.0, -1.0] if grid.symmetric and not grid.half else [1.0]
    ratios = [sign * ratio for sign in signs for ratio in RATIOS] if search else []
    # whole vectors: the ratio 1 again and again, which is never better than the first
    filled = ratios + [1.0] * (-len(ratios) % 32 or not search)
    return np.array(filled, np.float32), levels, stored


@compiled
def nearest(w: Number, scale: Number, zero: Number, top: Number, dual: Flag) -> tuple[Number, Number]:
    """The code of the level nearest to `w`, and that level."""
    if dual:
        sign = np.sign(scale)
        first = (w - (scale + zero) * HALF) * sign >= ZERO
        upper = scale if first else ZERO
        second = (upper + zero * HALF - w) * sign >= ZERO
        return (THREE if first else ONE) - (ONE if second else ZERO), upper + (zero if second else ZERO)
    code = min(max(np.rint(w / scale + zero), ZERO), top)
    return code, (code - zero) * scale


@compiled
def store(scales: Floats, stored: Stored) -> None:
    """Rounds scales (float32) in place to values of their dtype, as `grids.storable` does."""
    words = scales.view(np.int32)
    for c in range(len(scales)):
        value = scales[c]
        size = min(max(abs(value), stored.least), stored.most)
        if stored.drop == 13 and size < HALF_TINY:
            size = np.rint(size * SUBNORMALS) / SUBNORMALS
        scales[c] = ONE if value == ZERO else np.copysign(size, value)
    if stored.drop > 0:
        for c in range(len(scales)):
            word = np.int64(words[c])
            odd = word >> stored.drop & 1
            words[c] = word + (1 << stored.drop - 1) - 1 + odd >> stored.drop << stored.drop


@compiled
def base_scale(values: Floats, h: Floats, levels: Levels) -> tuple[Number, Number]:
    """Scale and zero of one group [width], from its range."""
    low, high = ZERO, ZERO
    for value in values:
        low, high = min(low, value), max(high, value)
    if not levels.symmetric:
        base = (high - low) / levels.top
        return base, min(max(np.rint(-low / base), ZERO), levels.top) if base > ZERO else ZERO
    base = min(max(-low, high) * levels.span, levels.last)
    if levels.one_bit:
        total, weights = 0.0, 0.0
        for j in range(len(values)):
            total += abs(values[j]) * h[j]
            weights += h[j]
        base = np.float32(total) * TWO / max(np.float32(weights), TINY)
    if levels.half:
        base = max(base, TINY)
    return base, levels.zero


@compiled
def fit(values: Floats, h: Floats, ratios: Floats, levels: Levels, stored: Stored) -> tuple[Number, Number]:
    """Scale and zero of one group [width]: the best of `ratios` times the scale from the range; the last is 1."""
    base, zero = base_scale(values, h, levels)
    tried = np.empty(len(ratios), np.float32)
    for c in range(len(ratios)):
        tried[c] = base * ratios[c]
    store(tried, stored)
    best = tried[len(ratios) - 1]
    if len(ratios) > 1:
        errors = np.zeros(len(ratios), values.dtype)
        for j in range(len(values)):
            w, weight = values[j], h[j]
            for c in range(len(ratios)):
                scale = TWO * tried[c] if levels.dual else tried[c]
                _, level = nearest(w, scale, -tried[c] if levels.dual else zero, levels.top, levels.dual)
                errors[c] += (level - w) * (level - w) * weight
        least = np.inf
        for c in range(len(ratios)):
            if errors[c] < least:
                best, least = tried[c], errors[c]
    if levels.dual:
        return TWO * best, -best
    return best, zero


@compiled
def fit_rows(
    w: Floats,
    h: Floats,
    ratios: Floats,
    levels: Levels,
    stored: Stored,
    first: int,
    last: int,
    scale: Floats,
    zero: Floats,
) -> None:
    """`fit` of the rows first to last of w [rows, width]; scale and zero [rows]."""
    for r in range(first, last):
        scale[r], zero[r] = fit(w[r], h, ratios, levels, stored)


@compiled
def feed_back(column: Floats, errors: Floats, factors: Floats, first: int, last: int) -> None:
    """column [TILE] -= the sum of errors[i] * factors[i] over i from first to last, one after the other."""
    i = first
    while i + 4 <= last:
        e0, e1, e2, e3 = errors[i], errors[i + 1], errors[i + 2], errors[i + 3]
        u0, u1, u2, u3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for r in range(TILE):
            column[r] = column[r] - e0[r] * u0 - e1[r] * u1 - e2[r] * u2 - e3[r] * u3
        i += 4
    while i < last:
        e, u = errors[i], factors[i]
        for r in range(TILE):
            column[r] -= e[r] * u
        i += 1


@compiled
def load(values: NDArray[Any], row: int, start: int, n: int, tile: NDArray[Any]) -> None:
    """The transposed tile [span, TILE] becomes n rows of `values` from this row and column on."""
    for r in range(n):
        for j in range(len(tile)):
            tile[j, r] = values[row + r, start + j]


@compiled
def unload(tile: NDArray[Any], row: int, start: int, n: int, values: NDArray[Any]) -> None:
    """n rows of `values` from this row and column on become those of the transposed tile [span, TILE]."""
    for r in range(n):
        for j in range(len(tile)):
            values[row + r, start + j] = tile[j, r]


@compiled
def fit_tile(
    tile: Floats,
    outlier: NDArray[np.bool_],
    h: Floats,
    ratios: Floats,
    levels: Levels,
    stored: Stored,
    n: int,
    scale: Floats,
    zero: Floats,
) -> None:
    """Fits one group, tile [width, TILE], for its first n rows."""
    values = np.empty(len(tile), tile.dtype)
    for r in range(n):
        for j in range(len(tile)):
            values[j] = ZERO if outlier[j, r] else tile[j, r]
        scale[r], zero[r] = fit(values, h, ratios, levels, stored)


@compiled
def round_column(
    column: Floats,
    exact: Floats,
    outlier: NDArray[np.bool_],
    scale: Floats,
    zero: Floats,
    diagonal: Number,
    levels: Levels,
    code: NDArray[np.uint8],
    error: Floats,
) -> None:
    """Codes and errors [TILE] of one column of a tile; outliers get the code of level 0 and have the exact value."""
    for r in range(TILE):
        nearest_code, level = nearest(column[r], scale[r], zero[r], levels.top, levels.dual)
        zero_code = levels.zero if levels.dual else zero[r]
        code[r] = np.uint8(zero_code if outlier[r] else nearest_code)
        error[r] = (column[r] - (exact[r] if outlier[r] else level)) / diagonal


@compiled
def round_panel(
    w: Floats,
    exact: Floats,
    pinned: NDArray[np.bool_],
    lower: Floats,
    h: Floats,
    start: int,
    width: int,
    fits: Flag,
    ratios: Floats,
    levels: Levels,
    stored: Stored,
    first: int,
    last: int,
    codes: NDArray[np.uint8],
    scale: Floats,
    zero: Floats,
    error: Floats,
) -> None:
    """Rounds a panel of w [rows, cols] in the rows first to last: its codes [rows, cols] and error [rows, span].

    start: its first column; lower [span, span]: the transposed factor of its columns; pinned [rows, cols] or empty:
    entries that have the value of `exact` [rows, cols]. `fits`: scale and zero [rows, groups] of its groups are fitted.
    """
    span = len(lower)
    tile, exacts = np.zeros((span, TILE), w.dtype), np.zeros((span, TILE), w.dtype)
    errors = np.zeros((span, TILE), w.dtype)
    outlier, code = np.zeros((span, TILE), np.bool_), np.zeros((span, TILE), np.uint8)
    scales, zeros = np.ones(TILE, scale.dtype), np.zeros(TILE, scale.dtype)
    for row in range(first, last, TILE):
        n = min(TILE, last - row)
        load(w, row, start, n, tile)
        if len(pinned) > 0:
            load(exact, row, start, n, exacts)
            load(pinned, row, start, n, outlier)
        begin = 0
        while begin < span:
            g = (start + begin) // width
            end = min(span, (g + 1) * width - start)
            for j in range(begin, end):
                feed_back(tile[j], errors, lower[j], 0, begin)
            if fits:
                of = h[start + begin : start + end]
                fit_tile(tile[begin:end], outlier[begin:end], of, ratios, levels, stored, n, scales, zeros)
            for r in range(n):
                if fits:
                    scale[row + r, g], zero[row + r, g] = scales[r], zeros[r]
                else:
                    scales[r], zeros[r] = scale[row + r, g], zero[row + r, g]
            for j in range(begin, end):
                feed_back(tile[j], errors, lower[j], begin, j)
                round_column(tile[j], exacts[j], outlier[j], scales, zeros, lower[j, j], levels, code[j], errors[j])
            begin = end
        unload(code, row, start, n, codes)
        unload(errors, row, 0, n, error)
