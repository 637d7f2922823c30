"""The loops of descent.py, compiled by numba: row after row, and what a row changes is carried into what depends on it.

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

from llmsqueeze.parts.compiled import compiled, compiled_sums
from llmsqueeze.quantizers.loops.grids import HALF, ONE, TWO, ZERO, Flag, Floats, Levels, Number, Stored, nearest, store
from llmsqueeze.quantizers.loops.threads import TILE

PANEL = 128  # columns whose changes are collected before other columns see them
BLOCK = 512  # columns of H that stay in cache beside each other, of a panel's rows
RIDGE = np.float32(1e-6)
TINY = np.finfo(np.float32).tiny
WINDOW = 32  # columns that are looked at side by side; a shorter loop LLVM unrolls before it sees vectors
NONE = np.int32(WINDOW)
# rows of a panel: the weights, their scale, their zero or second scale, the gradient, the curvature, the old code
VALUE, FIRST, SECOND, GRADIENT, CURVATURE, CODE = range(6)
INFINITE = np.float32(np.inf)  # a curvature with which nothing changes
Indices = NDArray[np.int64]


@compiled_sums
def dot(a: Floats, b: Floats) -> Number:
    """The scalar product of two vectors."""
    total = a[0] * b[0]
    for k in range(1, len(a)):
        total += a[k] * b[k]
    return total


@compiled
def subtract(out: Floats, factor: Number, row: Floats) -> None:
    """out -= factor * row."""
    for k in range(len(out)):
        out[k] -= factor * row[k]


@compiled
def weighted_rows(H: Floats, index: Indices, values: Floats, begin: int, out: Floats) -> None:
    """out = sum of values[i] * H[index[i], begin : begin + len(out)]."""
    for k in range(len(out)):
        out[k] = ZERO
    stop, i = begin + len(out), 0
    while i + 4 <= len(index):
        h0, h1 = H[index[i], begin:stop], H[index[i + 1], begin:stop]
        h2, h3 = H[index[i + 2], begin:stop], H[index[i + 3], begin:stop]
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        for k in range(len(out)):
            out[k] += v0 * h0[k] + v1 * h1[k] + v2 * h2[k] + v3 * h3[k]
        i += 4
    while i < len(index):
        subtract(out, -values[i], H[index[i], begin:stop])
        i += 1


@compiled
def add_products(products: Floats, planes: Floats, start: int, width: int, row: int, at: int, A: Floats) -> None:
    """Adds the sums over groups of products[k] * planes[:, row, start + k] to row and column `at` of A [n, n]."""
    stop = start + len(products)
    groups = len(A) // len(planes)
    for m in range(len(planes)):
        for h in range(start // width, (stop - 1) // width + 1):
            low, high = max(start, h * width), min(stop, (h + 1) * width)
            part = dot(products[low - start : high - start], planes[m, row, low:high])
            A[at, m * groups + h] += part
            A[m * groups + h, at] += part


@compiled
def fill(products: Floats, planes: Floats, start: int, width: int, k: int, first: int, last: int, A: Floats) -> None:
    """A [rows, n, n] of the rows first to last, for the group of plane k that starts at `start` and those after it.

    products [rows, cols - start]: that group of the plane times H.
    """
    groups = A.shape[1] // len(planes)
    at = k * groups + start // width
    for r in range(first, last):
        for m in range(len(planes)):
            for h in range(start // width, groups):
                low, high = h * width, min((h + 1) * width, planes.shape[2])
                part = dot(products[r, low - start : high - start], planes[m, r, low:high])
                A[r, at, m * groups + h] = part
                A[r, m * groups + h, at] = part


@compiled
def solve(A: Floats, b: Floats, factor: Floats, out: Floats) -> None:
    """out [n] = the solution of A s = b with a slight ridge; zero for a group with all weights at level 0."""
    n = len(b)
    mean = ZERO
    for i in range(n):
        mean += A[i, i]
    ridge = RIDGE * (mean / np.float32(n)) + TINY
    for i in range(n):
        for k in range(i, n):
            factor[i, k] = A[i, k]
        factor[i, i] += ridge
        out[i] = b[i]
    for i in range(n):  # U^T U = A and U^T y = b, row after row
        root = ONE / np.sqrt(factor[i, i])
        for k in range(i, n):
            factor[i, k] *= root
        out[i] *= root
        for k in range(i + 1, n):
            subtract(factor[k, k:], factor[i, k], factor[i, k:])
        subtract(out[i + 1 :], out[i], factor[i, i + 1 :])
    for i in range(n - 1, -1, -1):  # U s = y
        for k in range(i + 1, n):
            out[i] -= factor[i, k] * out[k]
        out[i] /= factor[i, i]


@compiled
def refit(
    gradient: Floats,
    planes: Floats,
    A: Floats,
    width: int,
    dual: Any,
    stored: Stored,
    first: int,
    last: int,
    scale: Floats,
    change: Floats,
) -> None:
    """Scales by least squares for fixed codes, in the rows whose error falls by it; change [rows, n]: by how much."""
    n, cols = scale.shape[1], gradient.shape[1]
    groups = n // len(planes)
    factor, b, solved = np.empty((n, n), scale.dtype), np.empty(n, scale.dtype), np.empty(n, scale.dtype)
    for r in range(first, last):
        for m in range(len(planes)):
            for g in range(groups):
                low, high = g * width, min((g + 1) * width, cols)
                b[m * groups + g] = dot(gradient[r, low:high], planes[m, r, low:high])
        solve(A[r], b, factor, solved)
        for i in range(n):
            moved = scale[r, i] + solved[i]
            solved[i] = moved if np.isfinite(moved) and moved != ZERO else scale[r, i]
        store(solved, stored)
        if dual:
            keep_order(solved, scale[r])
        gain = ZERO
        for i in range(n):
            change[r, i] = solved[i] - scale[r, i]
        for i in range(n):
            gain += (dot(A[r, i], change[r]) - b[i] - b[i]) * change[r, i]
        for i in range(n):
            if gain < ZERO:
                scale[r, i] = solved[i]
            else:
                change[r, i] = ZERO


@compiled
def keep_order(after: Floats, before: Floats) -> None:
    """Groups of a dual grid [2 * groups] whose levels are not in order keep their scales."""
    groups = len(after) // 2
    for g in range(groups):
        first, second = after[g], after[groups + g]
        if not (first * second < ZERO and abs(second) < abs(first)):
            after[g], after[groups + g] = before[g], before[groups + g]


@compiled
def scaled(planes: Floats, change: Floats, width: int, first: int, last: int, out: Floats) -> None:
    """out [rows, cols] = the sum over the planes of change [rows, n] times the plane."""
    cols = planes.shape[2]
    groups = change.shape[1] // len(planes)
    for r in range(first, last):
        for g in range(groups):
            for k in range(g * width, min((g + 1) * width, cols)):
                out[r, k] = change[r, g] * planes[0, r, k]
                if len(planes) > 1:
                    out[r, k] += change[r, groups + g] * planes[1, r, k]


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
