"""The loops over logits, compiled by numba: normaliser, most likely token, and divergence, in two passes over a row.

    z = max_v x_v + log sum_v exp(x_v - max)                    x a row of logits
    KL = sum_v e_v ((p_v - max p) - (q_v - max q)) / sum_v e_v - log sum_v e_v + log sum_v exp(q_v - max q)
                                                                e_v = exp(p_v - max p); p, q rows of logits

A row goes through a tile that stays in the nearest cache. The innermost loops have no order among their elements, so a
processor does eight or sixteen at a time; sums are taken in pairs, float32 in a tile and float64 between tiles. All
constants are float32: numba would turn the product of a float32 and a plain number into a float64. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.parts.compiled import compiled

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Number = Any  # a float32
Rows = tuple[Floats, int, int]  # logits float32: their memory, the distance of two tokens in it, and the vocabulary

TILE = 1024  # a power of two
HALF, ONE = np.float32(0.5), np.float32(1)
LEAST = np.float32(-87.0)  # exp of it is the least normal float32, nearly
PER_LN2, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
C2, C3, C4, C5, C6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))


@compiled
def _exp(x: Number) -> Number:
    """exp(x) for x <= 0: 2^n exp(r) with |r| <= ln(2) / 2, by the first terms of the series."""
    x = LEAST if x < LEAST else x
    n = np.int32(x * PER_LN2 - HALF)  # the nearest, as the cast goes towards zero
    whole = np.float32(n)
    r = x - whole * LN2_HIGH - whole * LN2_LOW
    series = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
    return series * np.int32((n + 127) << 23).view(np.float32)


@compiled
def _sum(tile: Floats) -> Number:
    """The sum of a tile in pairs; the tile is overwritten."""
    half = TILE // 2
    while half:
        for i in range(half):
            tile[i] += tile[i + half]
        half //= 2
    return np.float64(tile[0])


@compiled
def _top(row: Floats, best: Floats, tiles: Integers) -> tuple[Number, int]:
    """The largest of a row and the first index that has it. best, tiles [TILE]: scratch."""
    best[:] = -np.inf
    tiles[:] = 0
    for start in range(0, len(row), TILE):
        here = row[start : start + TILE]
        for i in range(len(here)):
            better = here[i] > best[i]
            best[i] = here[i] if better else best[i]
            tiles[i] = start if better else tiles[i]
    top, index = best[0], tiles[0]
    for i in range(1, TILE):
        if best[i] > top or (best[i] == top and tiles[i] + i < index):
            top, index = best[i], tiles[i] + i
    return top, index


@compiled
def _exp_sum(row: Floats, top: Number, tile: Floats) -> Number:
    """sum exp(row - top), float64. tile [TILE]: scratch."""
    total = 0.0
    for start in range(0, len(row), TILE):
        here = row[start : start + TILE]
        for i in range(len(here)):
            tile[i] = _exp(here[i] - top)
        tile[len(here) :] = 0
        total += _sum(tile)
    return total


@compiled
def _row(rows: Rows, token: int) -> Floats:
    """The logits [vocabulary] of a token."""
    memory, apart, vocabulary = rows
    return memory[token * apart : token * apart + vocabulary]


@compiled
def normalisers(logits: Rows, first: int, last: int, z: Floats) -> None:
    """z float64 [tokens] of the rows `first` to `last` of logits."""
    tile, tiles = np.empty(TILE, np.float32), np.empty(TILE, np.int32)
    for token in range(first, last):
        row = _row(logits, token)
        top, _ = _top(row, tile, tiles)
        z[token] = top + np.log(_exp_sum(row, top, tile))


@compiled
def pairs(q: Rows, p: Rows, first: int, last: int, sums: tuple[Floats, Floats, Floats], changed: Integers) -> None:
    """For the rows `first` to `last` of q and p, the logits of a model and of the baseline.

    sums: z of q, z of p, and KL, float64 [tokens]; changed int64 [tokens]: 1 if the most likely tokens differ.
    """
    z_q, z_p, kl = sums
    tile, other, tiles = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.int32)
    for token in range(first, last):
        a, b = _row(q, token), _row(p, token)
        top_a, index_a = _top(a, tile, tiles)
        top_b, index_b = _top(b, tile, tiles)
        log_a = np.log(_exp_sum(a, top_a, tile))
        sum_b = gap = 0.0
        for start in range(0, len(b), TILE):
            ours, theirs = a[start : start + TILE], b[start : start + TILE]
            for i in range(len(theirs)):
                x = theirs[i] - top_b
                tile[i] = _exp(x)
                other[i] = tile[i] * (x - (ours[i] - top_a))
            tile[len(theirs) :] = 0
            other[len(theirs) :] = 0
            sum_b += _sum(tile)
            gap += _sum(other)
        log_b = np.log(sum_b)
        z_q[token], z_p[token] = top_a + log_a, top_b + log_b
        kl[token] = gap / sum_b - log_b + log_a
        changed[token] = index_a != index_b
