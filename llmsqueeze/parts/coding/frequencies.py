"""Frequency tables of the entropy coder (rans.py), as they are counted, chosen, and stored in a byte per symbol.

    stored:   for each table one byte k > 0 per symbol, then a 0; a lone 0 repeats the table before it
    weight:   w = M[(k - 1) % 16] << (k - 1) // 16,   M[i] = 2^(15 + i / 16), rounded
    frequency f = 1 + w * (4096 - n) // sum of w,     n symbols; what is left of 4096 goes to the first of the largest

so any bytes make a table that sums to 4096, to within about two percent of the counts, which costs a ten-thousandth of
a bit a symbol. A symmetric table stores the symbols from the middle one on: symbol m + i and m - i share a byte.

Tables stand in an order in which neighbours are alike. Which of them share one is chosen so that table and symbols
together take the fewest bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.errors import CheckpointError
from llmsqueeze.parts.coding.rans import PROBABILITY_BITS, SCALE, Ints

MANTISSAS = np.array([round(2 ** (15 + i / 16)) for i in range(16)], np.int64)
TOP = 255

Bytes = NDArray[np.uint8]


def frequencies(stored: Bytes, symmetric: bool) -> Ints:
    """Frequencies of the symbols, which sum to 4096, from a table's bytes without the last 0."""
    k = stored.astype(np.int64) - 1
    weight = MANTISSAS[k % 16] << (k // 16)
    if symmetric:
        weight = np.concatenate([weight[:0:-1], weight])
    found: Ints = 1 + weight * (SCALE - len(weight)) // weight.sum()
    found[found.argmax()] += SCALE - found.sum()
    return found


def stored_table(counts: Ints, symmetric: bool) -> Bytes:
    """The bytes for symbols that occur so often; of a symmetric table, for distances from the middle."""
    used = max(len(np.trim_zeros(counts, "b")), 1)
    share = counts[:used] / max(int(counts.sum()), 1)
    if symmetric:
        share[1:] /= 2  # of either sign
    wished = np.maximum(share * SCALE - 1, 1e-9)
    steps = np.round(16 * np.log2(wished / wished.max()))
    stored: Bytes = np.clip(TOP + steps, 1, TOP).astype(np.uint8)
    return stored


def parse(stored: Bytes, count: int, symmetric: bool) -> list[Ints]:
    """The frequencies of `count` tables. Raises CheckpointError for bytes that are not so many tables."""
    ends = np.flatnonzero(stored == 0)
    if len(ends) != count or (len(stored) and stored[-1] != 0):
        raise CheckpointError(f"there are {len(ends)} frequency tables where {count} are needed")
    found: list[Ints] = []
    begin = 0
    for end in ends.tolist():
        size = end - begin
        if not size and not found:
            raise CheckpointError("the first frequency table is empty")
        if (2 * size - 1 if symmetric else size) > TOP + 1:
            raise CheckpointError(f"a frequency table has {size} entries, more than there are symbols")
        found.append(frequencies(stored[begin:end], symmetric) if size else found[-1])
        begin = end + 1
    return found


def choose(counts: Ints, symmetric: bool) -> Bytes:
    """Bytes of the tables for symbols counted per table [tables, 256], neighbours sharing one where table and symbols
    then take fewer bits; of symmetric tables, for distances from the middle. Dynamic programming over the last cut.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(counts) + 1):
        sums = counts[:stop][::-1].cumsum(axis=0)
        best.append(min((best[start][0] + _bits(sums[stop - 1 - start], symmetric), start) for start in range(stop)))
    stored: list[Bytes] = []
    stop = len(counts)
    while stop:
        start = best[stop][1]
        shared = stored_table(counts[start:stop].sum(axis=0), symmetric)
        stored[:0] = [shared, np.zeros(stop - start, np.uint8)]
        stop = start
    return np.concatenate(stored)


def _bits(counts: Ints, symmetric: bool) -> float:
    """What a table and the symbols under it take."""
    stored = stored_table(counts, symmetric)
    found = frequencies(stored, symmetric)[len(stored) - 1 if symmetric else 0 :]
    return float((counts[: len(stored)] * (PROBABILITY_BITS - np.log2(found))).sum()) + 8.0 * len(stored)


def coded_bits(counts: Ints, stored: Bytes, symmetric: bool) -> float:
    """Bits of symbols counted as for `choose` under the tables that it chose, without what streams cost."""
    total = 0.0
    for count, table in zip(counts, parse(stored, len(counts), symmetric), strict=True):
        found = table[len(table) // 2 if symmetric else 0 :]
        total += float((count[: len(found)] * (PROBABILITY_BITS - np.log2(found))).sum())
    return total
