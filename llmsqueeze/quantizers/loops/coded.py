"""The loops of coded.py, compiled by numba, as those of grids are (loops/grids.py, loops/descent.py).

Symbols: w, integers, gradient [rows, cols]; row [rows] and col [cols]: the step of a weight is row[r] * col[j].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.parallel.threads import TILE
from llmsqueeze.parts.compiled import compiled, compiled_sums
from llmsqueeze.quantizers.loops.descent import INFINITE, NONE, PANEL, WINDOW
from llmsqueeze.quantizers.loops.grids import ONE, ZERO, Floats, Number, feed_back, load, unload
from llmsqueeze.quantizers.loops.refit import subtract

# rows of a panel: the integers, their steps, the gradient, the curvature
INTEGER, STEP, GRADIENT, CURVATURE = range(4)


@compiled
def round_column(
    column: Floats,
    exact: Floats,
    outlier: NDArray[np.bool_],
    row: Floats,
    col: Number,
    diagonal: Number,
    integer: Floats,
    error: Floats,
) -> None:
    """Integers and errors [TILE] of one column of a tile; outliers get 0 and have the exact value."""
    for r in range(TILE):
        step = row[r] * col
        nearest = np.rint(column[r] / step)
        integer[r] = ZERO if outlier[r] else nearest
        error[r] = (column[r] - (exact[r] if outlier[r] else nearest * step)) / diagonal


@compiled
def feedback(
    w: Floats,
    exact: Floats,
    pinned: NDArray[np.bool_],
    row: Floats,
    col: Floats,
    lower: Floats,
    start: int,
    first: int,
    last: int,
    integers: Floats,
    error: Floats,
) -> None:
    """Rounds a panel of w in the rows first to last: its integers [rows, cols] and error [rows, span].

    start: its first column; lower [span, span]: the transposed factor of its columns; pinned [rows, cols] or empty:
    entries that have the value of `exact` [rows, cols].
    """
    span = len(lower)
    tile, exacts = np.zeros((span, TILE), w.dtype), np.zeros((span, TILE), w.dtype)
    chosen, errors = np.zeros((span, TILE), w.dtype), np.zeros((span, TILE), w.dtype)
    outlier, rows = np.zeros((span, TILE), np.bool_), np.ones(TILE, row.dtype)
    for top in range(first, last, TILE):
        n = min(TILE, last - top)
        load(w, top, start, n, tile)
        if len(pinned) > 0:
            load(exact, top, start, n, exacts)
            load(pinned, top, start, n, outlier)
        for r in range(n):
            rows[r] = row[top + r]
        for j in range(span):
            feed_back(tile[j], errors, lower[j], 0, j)
            round_column(tile[j], exacts[j], outlier[j], rows, col[start + j], lower[j, j], chosen[j], errors[j])
        unload(chosen, top, start, n, integers)
        unload(errors, top, 0, n, error)


@compiled_sums
def products_of_row(target: Floats, integers: Floats, gradient: Floats, col: Floats) -> tuple[Number, Number]:
    """The products with the gradient: of the target, and of the integers times their column's step."""
    aim, missing = target[0] * gradient[0], integers[0] * col[0] * gradient[0]
    for k in range(1, len(col)):
        aim += target[k] * gradient[k]
        missing += integers[k] * col[k] * gradient[k]
    return aim, missing


@compiled
def products(
    target: Floats, integers: Floats, gradient: Floats, col: Floats, first: int, last: int, sums: Floats
) -> None:
    """`products_of_row` of the rows first to last; sums [2, rows]."""
    for r in range(first, last):
        sums[0, r], sums[1, r] = products_of_row(target[r], integers[r], gradient[r], col)


@compiled
def first_change(windows: Floats, w: int, begin: int) -> Number:
    """The first column of window w, from `begin` on, whose best integer is not the old one; WINDOW if there is none."""
    found = NONE
    for k in range(WINDOW):
        old, step = windows[INTEGER, w, k], windows[STEP, w, k]
        best = np.rint((old * step + windows[GRADIENT, w, k] / windows[CURVATURE, w, k]) / step)
        found = min(found, np.int32(k) if (best != old) & (k >= begin) else NONE)
    return found


@compiled
def load_panel(
    integers: Floats,
    gradient: Floats,
    row: Number,
    col: Floats,
    curvature: Floats,
    outlier: NDArray[np.bool_],
    panel: Floats,
) -> None:
    """The panel [4, PANEL] of some columns of a row; beyond them, and at outliers, nothing changes."""
    for k in range(len(col)):
        panel[INTEGER, k], panel[STEP, k], panel[GRADIENT, k] = integers[k], row * col[k], gradient[k]
        panel[CURVATURE, k] = INFINITE if outlier[k] else curvature[k]
    for k in range(len(col), PANEL):
        panel[INTEGER, k], panel[STEP, k], panel[GRADIENT, k], panel[CURVATURE, k] = ZERO, ONE, ZERO, ONE


@compiled
def visit(H: Floats, panel: Floats, windows: Floats, start: int, stop: int, integers: Floats, gradient: Floats) -> None:
    """One pass over a panel of a row: each integer becomes the one with the least error.

    panel [4, PANEL]: its columns from `start` to `stop`, and the same as windows [4, PANEL / WINDOW, WINDOW]; integers,
    gradient [cols] are those of the row.
    """
    i = 0
    while i < stop - start:
        w, begin = i // WINDOW, i % WINDOW
        i += int(first_change(windows, w, begin)) - begin
        if i == (w + 1) * WINDOW:
            continue
        old, step, j = panel[INTEGER, i], panel[STEP, i], start + i
        best = np.rint((old * step + panel[GRADIENT, i] / panel[CURVATURE, i]) / step)
        integers[j] = best
        change = best * step - old * step
        subtract(gradient, change, H[j])
        subtract(panel[GRADIENT, i + 1 : stop - start], change, H[j, j + 1 : stop])
        i += 1


@compiled
def sweep(
    H: Floats,
    pinned: NDArray[np.bool_],
    row: Floats,
    col: Floats,
    first: int,
    last: int,
    integers: Floats,
    gradient: Floats,
) -> None:
    """One pass over the integers of the rows first to last: tile after tile, and in it panel after panel of columns."""
    cols = len(H)
    panel, curvature = np.empty((4, PANEL), H.dtype), np.empty(cols, H.dtype)
    windows = panel.reshape(4, PANEL // WINDOW, WINDOW)
    for k in range(cols):
        curvature[k] = H[k, k]
    for tile in range(first, last, TILE):
        for start in range(0, cols, PANEL):
            stop = min(start + PANEL, cols)
            part = slice(start, stop)
            for r in range(tile, min(tile + TILE, last)):
                load_panel(
                    integers[r, part], gradient[r, part], row[r], col[part], curvature[part], pinned[r, part], panel
                )
                visit(H, panel, windows, start, stop, integers[r], gradient[r])
