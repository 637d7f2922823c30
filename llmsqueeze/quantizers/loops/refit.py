"""The refit of descent.py, compiled by numba: normal equations of the scales for fixed codes, row after row.

Symbols as in loops/descent.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.parts.compiled import compiled, compiled_sums
from llmsqueeze.quantizers.loops.grids import ONE, ZERO, Floats, Number, Stored, store

RIDGE = np.float32(1e-6)
TINY = np.finfo(np.float32).tiny
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
