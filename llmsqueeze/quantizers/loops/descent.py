"""The pass of descent.py, compiled by numba: row after row, and what a row changes is carried into what depends on it.

A pass changes few codes: a fifth of them in the first, some hundredths in the later ones. So the gradient (t - w) H and
the normal equations are computed once, and every changed code adds its row of H to them:

    q = sum of d[k] * H[k, :] over the changed codes of a group;  gradient -= scale * q
    A + C + C^T,  C[g, h] = sum of q[k] * m[k] over group h       m: the level half way between the old and the new

Symbols: H [cols, cols]; planes [count, rows, cols] the levels (code - zero, or the two planes of bits); scale [rows,
n], n = count * groups, float32 values of the dtype in the file; A [rows, n, n]; gradient [rows, cols].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.parallel.threads import TILE
from llmsqueeze.parts.compiled import compiled
from llmsqueeze.quantizers.loops.grids import HALF, ONE, TWO, ZERO, Flag, Floats, Levels, Number, nearest
from llmsqueeze.quantizers.loops.refit import Indices, add_products, subtract, weighted_rows

PANEL = 128  # columns whose changes are collected before other columns see them
BLOCK = 512  # columns of H that stay in cache beside each other, of a panel's rows
WINDOW = 32  # columns that are looked at side by side; a shorter loop LLVM unrolls before it sees vectors
NONE = np.int32(WINDOW)
# rows of a panel: the weights, their scale, their zero or second scale, the gradient, the curvature, the old code
VALUE, FIRST, SECOND, GRADIENT, CURVATURE, CODE = range(6)
INFINITE = np.float32(np.inf)  # a curvature with which nothing changes


@compiled
def first_change(windows: Floats, w: int, begin: int, levels: Levels) -> Number:
    """The first column of window w, from `begin` on, whose best code is not the old one; WINDOW if there is none."""
    found = NONE
    for k in range(WINDOW):
        best = windows[VALUE, w, k] + windows[GRADIENT, w, k] / windows[CURVATURE, w, k]
        code, _ = nearest(best, windows[FIRST, w, k], windows[SECOND, w, k], levels.top, levels.dual)
        found = min(found, np.int32(k) if (code != windows[CODE, w, k]) & (k >= begin) else NONE)
    return found


@compiled
def copy(values: NDArray[Any], out: Floats) -> None:
    """out = values, as floats."""
    for k in range(len(values)):
        out[k] = values[k]


@compiled
def expand(values: Floats, factor: Number, out: Floats, product: Floats) -> None:
    """out = factor, and product += factor * values."""
    for k in range(len(values)):
        out[k] = factor
        product[k] += factor * values[k]


@compiled
def load_values(
    start: int, span: int, width: int, dual: Flag, scale: Floats, zero: Floats, planes: Floats, row: int, panel: Floats
) -> None:
    """Value, first and second of a panel of a row."""
    groups = len(zero)
    for k in range(span):
        panel[VALUE, k] = ZERO
    for g in range(start // width, (start + span - 1) // width + 1):
        low, high = max(g * width, start), min((g + 1) * width, start + span)
        value, first, second = panel[VALUE, low - start :], panel[FIRST, low - start :], panel[SECOND, low - start :]
        expand(planes[0, row, low:high], scale[g], first, value)
        if dual:
            expand(planes[1, row, low:high], scale[groups + g], second, value)
        else:
            for k in range(high - low):
                second[k] = zero[g]


@compiled
def load_curvature(curvature: Floats, outlier: NDArray[np.bool_], out: Floats) -> None:
    """The curvature, but infinite for outliers: nothing changes there."""
    for k in range(len(outlier)):
        out[k] = INFINITE if outlier[k] else curvature[k]


@compiled
def clear(panel: Floats) -> None:
    """A panel in which nothing changes: code 0, at its level."""
    for k in range(PANEL):
        panel[VALUE, k], panel[GRADIENT, k], panel[CURVATURE, k], panel[CODE, k] = ZERO, ZERO, ONE, ZERO
        panel[FIRST, k], panel[SECOND, k] = ONE, ZERO


@compiled
def change_code(code: Number, j: int, row: int, zero: Number, dual: Flag, planes: Floats, delta: Floats) -> None:
    """delta [count] = the change of the planes at column j by a new code; planes become the level half way."""
    old = planes[0, row, j]
    delta[0] = ((ONE if code > ONE else ZERO) if dual else code - zero) - old
    planes[0, row, j] = old + HALF * delta[0]
    if dual:
        old = planes[1, row, j]
        delta[1] = (ONE if code % TWO == ZERO else ZERO) - old
        planes[1, row, j] = old + HALF * delta[1]


@compiled
def visit(
    H: Floats,
    panel: Floats,
    windows: Floats,
    start: int,
    span: int,
    levels: Levels,
    planes: Floats,
    row: int,
    codes: NDArray[np.uint8],
    index: Indices,
    deltas: Floats,
) -> int:
    """One pass over a panel of one row: each code becomes the one with the least error; returns how many changed.

    panel [6, PANEL]: its `span` columns from `start` on, and the same as windows [6, PANEL / WINDOW, WINDOW]; index,
    deltas [PANEL, count]: the columns that changed, and by how much in each plane.
    """
    count, i = 0, 0
    while i < span:
        w, begin = i // WINDOW, i % WINDOW
        i += int(first_change(windows, w, begin, levels)) - begin
        if i == (w + 1) * WINDOW:
            continue
        best = panel[VALUE, i] + panel[GRADIENT, i] / panel[CURVATURE, i]
        code, level = nearest(best, panel[FIRST, i], panel[SECOND, i], levels.top, levels.dual)
        j = start + i
        change_code(code, j, row, panel[SECOND, i], levels.dual, planes, deltas[count])
        codes[row, j], index[count] = np.uint8(code), j
        subtract(panel[GRADIENT, i + 1 : span], level - panel[VALUE, i], H[j, j + 1 : start + span])
        count, i = count + 1, i + 1
    return count


@compiled
def spread(
    H: Floats,
    width: int,
    count: int,
    index: Indices,
    deltas: Floats,
    scale: Floats,
    planes: Floats,
    row: int,
    block: int,
    q: Floats,
    gradient: Floats,
    A: Floats,
) -> None:
    """Carries the changes of one row into a block of its gradient [cols], and into A [n, n]."""
    groups = len(scale) // len(planes)
    i = 0
    while i < count:
        g, stop = index[i] // width, i + 1
        while stop < count and index[stop] // width == g:
            stop += 1
        for m in range(len(planes)):
            weighted_rows(H, index[i:stop], deltas[i:stop, m], block, q)
            subtract(gradient[block : block + len(q)], scale[m * groups + g], q)
            add_products(q, planes, block, width, row, m * groups + g, A)
        i = stop


@compiled
def sweep(
    H: Floats,
    pinned: NDArray[np.bool_],
    width: int,
    levels: Levels,
    scale: Floats,
    zero: Floats,
    first: int,
    last: int,
    planes: Floats,
    codes: NDArray[np.uint8],
    gradient: Floats,
    A: Floats,
) -> None:
    """One pass over the codes [rows, cols] of the rows first to last: tile after tile, and in it panel after panel."""
    cols = len(H)
    index, counts = np.empty((TILE, PANEL), np.int64), np.zeros(TILE, np.int64)
    deltas, q = np.empty((TILE, PANEL, len(planes)), H.dtype), np.empty(BLOCK, H.dtype)
    panel, curvature = np.empty((6, PANEL), H.dtype), np.empty(cols, H.dtype)
    windows = panel.reshape(6, PANEL // WINDOW, WINDOW)
    for k in range(cols):
        curvature[k] = H[k, k]
    for tile in range(first, last, TILE):
        rows = min(TILE, last - tile)
        for start in range(0, cols, PANEL):
            stop = min(start + PANEL, cols)
            span = stop - start
            clear(panel)
            for i in range(rows):
                r = tile + i
                load_values(start, span, width, levels.dual, scale[r], zero[r], planes, r, panel)
                load_curvature(curvature[start:stop], pinned[r, start:stop], panel[CURVATURE])
                copy(gradient[r, start:stop], panel[GRADIENT])
                copy(codes[r, start:stop], panel[CODE])
                counts[i] = visit(H, panel, windows, start, span, levels, planes, r, codes, index[i], deltas[i])
            for block in range(0, cols, BLOCK):
                part = q[: min(BLOCK, cols - block)]
                for i in range(rows):
                    n, r = counts[i], tile + i
                    if n > 0:
                        spread(H, width, n, index[i], deltas[i], scale[r], planes, r, block, part, gradient[r], A[r])
            for i in range(rows):
                for c in range(counts[i]):
                    for m in range(len(planes)):
                        planes[m, tile + i, index[i, c]] += HALF * deltas[i, c, m]
