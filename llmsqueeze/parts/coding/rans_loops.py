"""The loops of the entropy coder (rans.py), symbol by symbol, compiled by numba; they release Python's global lock.

Each symbol of a stream depends on the one before it, so a processor would mostly wait: four streams are coded side by
side. All numbers are int64, because numba converts signed and unsigned numbers together to floats. The float64 quotient
of 32 bits by 12 is exact. numba does not check bounds. Damaged files cannot read outside the arrays: a loop indexes
only the words, up to the last (`_refill`), and the slots, which have all values of twelve bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.parts.compiled import compiled

LANES = 4
Numbers = NDArray[np.integer[Any]]
Whole = Any  # an int64


@compiled
def _next(x: Whole, entry: Whole) -> Whole:
    """The state after a symbol, before the refill; `entry`: as `rans._slots` packs it."""
    return ((entry >> 12 & 4095) + 1) * (x >> 12) + (entry & 4095)


@compiled
def _refill(x: Whole, at: Whole, words: Numbers, last: Whole) -> tuple[Whole, Whole]:
    """The state and the index of the next word, at most `last`; without a branch, which could not be predicted."""
    low = x < 65536
    word: Whole = np.int64(words[at])
    return x << 16 | word if low else x, min(at + low, last)


@compiled
def decode(
    words: Numbers,
    begin: Numbers,
    slots: Numbers,
    rows: Numbers,
    cols: Numbers,
    shift: int,
    per: int,
    span: tuple[int, int],
    out: Numbers,
    ends: Numbers,
) -> None:
    """Decodes the streams `span` (start, stop) into out int8 [rows, cols].

    ends [streams, 2] becomes their last states and the indices after their last words. `words`: those of the streams
    and two more; begin [streams]: the index of their first words; slots [tables * 4096].
    """
    last, stop = len(words) - 1, span[1]
    full = min(stop, len(rows) // per)  # streams with `per` rows
    s0 = span[0]
    while s0 < stop:
        # a lane without a stream of its own repeats another lane
        top = max(full - 1, s0)
        s1, s2, s3 = min(s0 + 1, top), min(s0 + 2, top), min(s0 + 3, top)
        a0, a1, a2, a3 = begin[s0], begin[s1], begin[s2], begin[s3]
        x0, x1 = np.int64(words[a0]) << 16 | words[a0 + 1], np.int64(words[a1]) << 16 | words[a1 + 1]
        x2, x3 = np.int64(words[a2]) << 16 | words[a2 + 1], np.int64(words[a3]) << 16 | words[a3 + 1]
        a0, a1, a2, a3 = a0 + 2, a1 + 2, a2 + 2, a3 + 2
        for row in range(min(per, len(rows) - s0 * per)):
            r0, r1, r2, r3 = s0 * per + row, s1 * per + row, s2 * per + row, s3 * per + row
            b0, b1, b2, b3 = rows[r0], rows[r1], rows[r2], rows[r3]
            o0, o1, o2, o3 = out[r0], out[r1], out[r2], out[r3]
            for col in range(len(cols)):
                kind = cols[col]
                e0 = slots[((b0 + kind >> shift) << 12) + (x0 & 4095)]
                e1 = slots[((b1 + kind >> shift) << 12) + (x1 & 4095)]
                e2 = slots[((b2 + kind >> shift) << 12) + (x2 & 4095)]
                e3 = slots[((b3 + kind >> shift) << 12) + (x3 & 4095)]
                o0[col], o1[col], o2[col], o3[col] = e0 >> 24, e1 >> 24, e2 >> 24, e3 >> 24
                x0, a0 = _refill(_next(x0, e0), a0, words, last)
                x1, a1 = _refill(_next(x1, e1), a1, words, last)
                x2, a2 = _refill(_next(x2, e2), a2, words, last)
                x3, a3 = _refill(_next(x3, e3), a3, words, last)
        ends[s0, 0], ends[s1, 0], ends[s2, 0], ends[s3, 0] = x0, x1, x2, x3
        ends[s0, 1], ends[s1, 1], ends[s2, 1], ends[s3, 1] = a0, a1, a2, a3
        s0 = s3 + 1


@compiled
def _emit(x: Whole, at: Whole, f: Whole, out: Numbers) -> tuple[Whole, Whole]:
    """The state and the index of the last word, ready for a symbol of frequency f."""
    full = x >= f << 20
    out[at - 1] = x & 65535
    return x >> 16 if full else x, at - full


@compiled
def _before(x: Whole, f: Whole, c: Whole) -> Whole:
    """The state from which the decoder reaches x with a symbol of frequency f, c the sum before it."""
    quotient: Whole = np.int64(np.float64(x) / np.float64(f))
    return (quotient << 12) + x - quotient * f + c


@compiled
def encode(
    symbols: Numbers,
    entries: Numbers,
    rows: Numbers,
    cols: Numbers,
    shift: int,
    per: int,
    span: tuple[int, int],
    room: int,
    out: Numbers,
    lengths: Numbers,
) -> bool:
    """Encodes the streams `span` (start, stop) of symbols uint8 [rows, cols] (also the bytes of int8 symbols).

    Each stream is written to the end of its `room` words in `out`; lengths [streams] becomes the number of words.
    entries [tables * 256], by the byte of the symbol: the sum of the frequencies before it << 16 | its frequency.
    Returns whether every symbol has a frequency.
    """
    stop = span[1]
    full = min(stop, len(rows) // per)
    all_coded = True
    lowest: Whole = np.int64(65536)
    s0 = span[0]
    while s0 < stop:
        top = max(full - 1, s0)
        s1, s2, s3 = min(s0 + 1, top), min(s0 + 2, top), min(s0 + 3, top)
        a0, a1, a2, a3 = (s0 + 1) * room, (s1 + 1) * room, (s2 + 1) * room, (s3 + 1) * room
        x0, x1, x2, x3 = lowest, lowest, lowest, lowest
        for row in range(min(per, len(rows) - s0 * per) - 1, -1, -1):
            r0, r1, r2, r3 = s0 * per + row, s1 * per + row, s2 * per + row, s3 * per + row
            b0, b1, b2, b3 = rows[r0], rows[r1], rows[r2], rows[r3]
            for col in range(len(cols) - 1, -1, -1):
                kind = cols[col]
                e0 = entries[((b0 + kind >> shift) << 8) + symbols[r0, col]]
                e1 = entries[((b1 + kind >> shift) << 8) + symbols[r1, col]]
                e2 = entries[((b2 + kind >> shift) << 8) + symbols[r2, col]]
                e3 = entries[((b3 + kind >> shift) << 8) + symbols[r3, col]]
                f0, f1, f2, f3 = e0 & 65535, e1 & 65535, e2 & 65535, e3 & 65535
                if min(min(f0, f1), min(f2, f3)) == 0:
                    all_coded = False  # frequency 1 stands in, so that the stream stays within its room
                    f0, f1, f2, f3 = max(f0, 1), max(f1, 1), max(f2, 1), max(f3, 1)
                x0, a0 = _emit(x0, a0, f0, out)
                x1, a1 = _emit(x1, a1, f1, out)
                x2, a2 = _emit(x2, a2, f2, out)
                x3, a3 = _emit(x3, a3, f3, out)
                x0, x1 = _before(x0, f0, e0 >> 16), _before(x1, f1, e1 >> 16)
                x2, x3 = _before(x2, f2, e2 >> 16), _before(x3, f3, e3 >> 16)
        for stream, at, x in ((s0, a0, x0), (s1, a1, x1), (s2, a2, x2), (s3, a3, x3)):
            out[at - 1], out[at - 2] = x & 65535, x >> 16
            lengths[stream] = (stream + 1) * room - at + 2
        s0 = s3 + 1
    return all_coded


@compiled
def gather(out: Numbers, room: int, lengths: Numbers) -> int:
    """Moves the words of `encode` to the front of `out`, stream after stream; returns their number."""
    at = 0
    for stream in range(len(lengths)):
        first = (stream + 1) * room - lengths[stream]
        for i in range(lengths[stream]):
            out[at + i] = out[first + i]
        at += lengths[stream]
    return at


@compiled
def count(symbols: Numbers, rows: Numbers, cols: Numbers, shift: int, counts: Numbers) -> None:
    """Adds to counts [tables, 256] how often each symbol of symbols uint8 [rows, cols] occurs under each table."""
    for row in range(len(rows)):
        base = rows[row]
        for col in range(len(cols)):
            counts[base + cols[col] >> shift, symbols[row, col]] += 1
