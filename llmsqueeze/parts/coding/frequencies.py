"""Frequency tables of the entropy coder (rans.py): how they are counted, chosen, and stored in a byte per symbol.

    stored:   for each table one byte k > 0 per symbol, then a 0; a lone 0 repeats the table before it
    weight:   w = M[(k - 1) % 16] << (k - 1) // 16,   M[i] = 2^(15 + i / 16), rounded
    frequency f = 1 + w * (4096 - n) // sum of w,     n symbols; the rest of 4096 goes to the first of the largest

Thus any bytes make a table that sums to 4096. Frequencies differ from the counts by about two percent, which costs a
ten-thousandth of a bit per symbol. A symmetric table stores the symbols from the middle one on: the symbols m + i and
m - i share a byte.

Consecutive tables are similar. They share one table if tables and symbols then take fewer bits.
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
    """The frequencies of the symbols, which sum to 4096, from the bytes of a table without its last 0."""
    k = stored.astype(np.int64) - 1
    weight = MANTISSAS[k % 16] << (k // 16)
    if symmetric:
        weight = np.concatenate([weight[:0:-1], weight])
    table: Ints = 1 + weight * (SCALE - len(weight)) // weight.sum()
    table[table.argmax()] += SCALE - table.sum()
    return table


def stored_table(counts: Ints, symmetric: bool) -> Bytes:
    """The bytes of the table for symbols with these counts; of a symmetric table, for distances from the middle."""
    padded = _stored_tables(counts[None], symmetric)[0]
    stored: Bytes = padded[padded > 0]
    return stored


def _stored_tables(counts: Ints, symmetric: bool) -> Bytes:
    """The same for each row of counts [tables, 256]: bytes [tables, 256], 0 behind the last symbol that occurs."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if symmetric:
        share[:, 1:] /= 2  # for each sign
    weight = np.maximum(share * SCALE - 1, 1e-9)
    sixteenths = np.round(16 * np.log2(weight / weight.max(axis=1, keepdims=True)))
    stored: Bytes = np.clip(TOP + sixteenths, 1, TOP).astype(np.uint8)
    stored[:, 1:][np.maximum.accumulate(counts[:, :0:-1], axis=1)[:, ::-1] == 0] = 0
    return stored


def parse(stored: Bytes, count: int, symmetric: bool) -> list[Ints]:
    """The frequencies of `count` tables. Raises CheckpointError if the bytes are not `count` tables."""
    ends = np.flatnonzero(stored == 0)
    if len(ends) != count or (len(stored) and stored[-1] != 0):
        raise CheckpointError(f"there are {len(ends)} frequency tables; {count} are needed")
    tables: list[Ints] = []
    begin, most = 0, (TOP + 2) // 2 if symmetric else TOP + 1
    for end in ends.tolist():
        size = end - begin
        if not size and not tables:
            raise CheckpointError("the first frequency table is empty")
        if size > most:
            raise CheckpointError(f"a frequency table has {size} entries; at most {most} are allowed")
        tables.append(frequencies(stored[begin:end], symmetric) if size else tables[-1])
        begin = end + 1
    return tables


def choose(counts: Ints, symmetric: bool) -> Bytes:
    """The bytes of the tables for counts [tables, 256] of symbols; of symmetric tables, of distances from the middle.

    Consecutive tables share one if that takes fewer bits: dynamic programming over the last cut.
    """
    counts = counts[:, : 1 + int(np.nonzero(counts)[1].max(initial=0))]
    best: list[tuple[float, int]] = [(0.0, 0)]
    before = np.concatenate([np.zeros((1, counts.shape[1]), np.int64), counts.cumsum(axis=0)])
    for stop in range(1, len(counts) + 1):
        bits = _bits(before[stop] - before[:stop], symmetric)
        best.append(min((best[start][0] + bits[start], start) for start in range(stop)))
    stored: list[Bytes] = []
    stop = len(counts)
    while stop:
        start = best[stop][1]
        shared = stored_table(counts[start:stop].sum(axis=0), symmetric)
        stored[:0] = [shared, np.zeros(stop - start, np.uint8)]
        stop = start
    return np.concatenate(stored)


def _bits(counts: Ints, symmetric: bool) -> list[float]:
    """For each row of counts [tables, 256], the bits of a table and of the symbols under it."""
    stored = _stored_tables(counts, symmetric)
    used = (stored > 0).sum(axis=1)
    # as in `frequencies`, of the upper half of a symmetric table
    k = np.maximum(stored.astype(np.int64) - 1, 0)
    weight = np.where(stored > 0, MANTISSAS[k % 16] << (k // 16), 0)
    sizes, sums = (2 * used - 1, 2 * weight.sum(axis=1) - weight[:, 0]) if symmetric else (used, weight.sum(axis=1))
    table = 1 + weight * (SCALE - sizes)[:, None] // sums[:, None]
    occurs = np.where(stored > 0, table, 0)
    rest, every = SCALE - occurs.sum(axis=1), np.arange(len(table))
    if symmetric:  # the first of the largest is the middle one only if no other is as large
        rest -= occurs.sum(axis=1) - occurs[:, 0]
        table[:, 0] += np.where(occurs[:, 1:].max(axis=1, initial=0) < occurs[:, 0], rest, 0)
    else:
        table[every, occurs.argmax(axis=1)] += rest
    bits = counts * (PROBABILITY_BITS - np.log2(table))
    return [float(row[:size].sum()) + 8.0 * size for row, size in zip(bits, used.tolist(), strict=True)]


def coded_bits(counts: Ints, stored: Bytes, symmetric: bool) -> float:
    """Bits of symbols with these counts [tables, 256] under the tables of `choose`, without the cost of streams."""
    total = 0.0
    for count, table in zip(counts, parse(stored, len(counts), symmetric), strict=True):
        used = table[len(table) // 2 if symmetric else 0 :]
        total += float((count[: len(used)] * (PROBABILITY_BITS - np.log2(used))).sum())
    return total
