"""The entropy coder: rANS streams over small integers, with static frequency tables chosen per row and column.

    state      x, 32 bits, kept in [2^16, 2^32); renormalised by words of 16 bits; frequencies sum to 2^12
    encode     while x >= f << 20: emit x & 0xFFFF, x >>= 16;   x = ((x // f) << 12) + x % f + c
    decode     s = the symbol whose [c, c + f) has x & 0xFFF;   x = f * (x >> 12) + (x & 0xFFF) - c
               if x < 2^16: x = x << 16 | the next word

f, c: frequency of the symbol and the sum of those before it, in the table of its place, which is known beside the
streams (`Contexts`). `rows_per_stream` rows in a row make one stream, its symbols in
reading order; the last stream may hold fewer rows. A stream is encoded from its last symbol to its first, from
x = 2^16, and stored in the order in which it is decoded: the high word of the last x, its low word, then the words
emitted, last one first. A decoder ends with x = 2^16 and no word left, or the stream is damaged. A row can be decoded
alone with the rest of its stream, and streams in any order or at once.

The method is Duda's (arXiv 1311.2540); the layout is ours. All of it is arithmetic on whole numbers (a quotient taken
in float64 is exact, for 32 bits are divided by 12), so every platform has the same streams. It runs over all streams
at once, symbol by symbol: the more of them, the faster. Memory: the symbols, a copy of them in the order of coding, and
the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmsqueeze.errors import CheckpointError

PROBABILITY_BITS = 12
SCALE = 1 << PROBABILITY_BITS
LOWEST = 1 << 16
MIN_STREAM = 2048  # symbols; a stream costs about 36 bits
COUNTED = 1 << 22  # symbols that are counted at a time

Symbols = NDArray[np.integer[Any]]  # uint8 or int8
Words = NDArray[np.uint16]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Contexts:
    """Which table a place [row, column] has: number `(rows[row] + cols[column]) >> shift`; none is negative."""

    rows: Ints
    cols: Ints
    shift: int = 0

    @property
    def count(self) -> int:
        """How many tables there are."""
        return int(self.rows.max() + self.cols.max() >> self.shift) + 1

    def numbers(self, rows: slice = slice(None)) -> Ints:
        """[rows, cols] of all rows or some."""
        found: Ints = self.rows[rows, None] + self.cols[None]
        found >>= self.shift
        return found


def rows_per_stream(rows: int, cols: int) -> int:
    """How many of a matrix's rows we put in one stream."""
    per = 1
    while per < rows and per * cols < MIN_STREAM:
        per *= 2
    return per


def encode(symbols: Symbols, tables: Sequence[Ints], contexts: Contexts, per: int) -> tuple[Words, Ints]:
    """symbols [rows, cols] -> the words of all streams, and how many each has [streams].

    `tables`: by number, frequencies that sum to 4096 and are not 0 where a symbol occurs, of 0, 1, 2 and so on for
    uint8 symbols; for int8 ones the middle one is that of 0. `per`: rows of a stream.
    """
    rows, cols = symbols.shape
    streams, steps = -(-rows // per), per * cols
    first = np.cumsum([0, *(len(table) for table in tables)])[:-1]
    if symbols.dtype == np.int8:
        first += np.array([len(table) // 2 for table in tables])
    lanes = _Lanes(contexts, first, streams, per)
    cumulated = np.concatenate([np.cumsum(table) - table for table in tables])
    both = (cumulated.astype(np.uint32) << np.uint32(16)) | np.concatenate(tables).astype(np.uint32)
    ordered = _by_step(symbols, streams, per)
    # what a step may emit, and whether it does: in the order in which it will be read, behind the last state
    written, held = np.empty((steps + 2, streams), np.uint16), np.zeros((steps + 2, streams), bool)
    x = np.full(streams, LOWEST, np.uint32)
    for step in range(steps - 1, -1, -1):
        base, (f, c, t), full = lanes.at(step)
        active = len(base)
        state = x[:active]
        np.add(ordered[step, :active], base, out=t.view(np.int32))
        np.take(both, t, out=f, mode="clip")
        np.right_shift(f, 16, out=c)
        f &= np.uint32(0xFFFF)
        np.right_shift(state, 20, out=t)
        np.greater_equal(t, f, out=full)
        np.copyto(written[step + 2, :active], state, casting="unsafe")
        held[step + 2, :active] = full
        np.right_shift(state, 16, out=t)
        np.copyto(state, t, where=full)
        t[:] = np.divide(state, f)
        f *= t
        state -= f
        t <<= np.uint32(PROBABILITY_BITS)
        state += t
        state += c
    written[0], written[1], held[:2] = x >> np.uint32(16), x & np.uint32(0xFFFF), True
    return _transposed(written)[_transposed(held)], held.sum(axis=0)


def decode(words: Words, lengths: Ints, tables: Sequence[Ints], contexts: Contexts, per: int, signed: bool) -> Symbols:
    """The inverse of `encode`: symbols [rows, cols], int8 if `signed`. Raises CheckpointError for damaged streams."""
    rows, cols = len(contexts.rows), len(contexts.cols)
    streams = -(-rows // per)
    check_lengths(lengths, streams, len(words))
    lanes = _Lanes(contexts, np.arange(len(tables)) * SCALE, streams, per)
    symbol_of, both = _slots(tables, signed)
    ends = np.cumsum(lengths)
    at = ends - lengths
    x = (words[at].astype(np.uint32) << np.uint32(16)) | words[at + 1]
    at += 2
    wide = np.append(words, np.uint16(0)).astype(np.uint32)
    ordered = np.empty((per * cols, streams), symbol_of.dtype)
    for step in range(per * cols):
        base, (slot, f, t), low = lanes.at(step)
        active = len(base)
        state, place = x[:active], at[:active]
        np.bitwise_and(state, np.uint32(SCALE - 1), out=slot)
        slot += base.view(np.uint32)
        np.take(symbol_of, slot, out=ordered[step, :active], mode="clip")
        np.take(both, slot, out=f, mode="clip")
        state >>= np.uint32(PROBABILITY_BITS)
        np.right_shift(f, 16, out=t)
        state *= t
        f &= np.uint32(0xFFFF)
        state += f
        np.less(state, np.uint32(LOWEST), out=low)
        np.take(wide, place, out=t, mode="clip")
        np.left_shift(state, 16, out=f)
        f |= t
        np.copyto(state, f, where=low)
        place += low
    if (x != LOWEST).any() or (at != ends).any():
        wrong = int(np.argmax((x != LOWEST) | (at != ends)))
        raise CheckpointError(
            f"the coded stream of rows {wrong * per} to {min(rows, (wrong + 1) * per) - 1} is damaged"
        )
    return _by_row(ordered, rows, per)


def check_lengths(lengths: Ints, streams: int, words: int) -> None:
    """Raises CheckpointError unless these can be the lengths of so many streams in so many words."""
    if len(lengths) != streams:
        raise CheckpointError(f"there are {len(lengths)} coded streams where the rows make {streams}")
    if len(lengths) and int(lengths.min()) < 2:
        raise CheckpointError(f"coded stream {int(lengths.argmin())} has {int(lengths.min())} words; the least is 2")
    if int(lengths.sum()) != words:
        raise CheckpointError(
            f"the coded streams have {int(lengths.sum())} words by their lengths, and {words} are there"
        )


def counts(symbols: NDArray[np.uint8], contexts: Contexts) -> Ints:
    """How often each symbol occurs in the places of each table: [tables, 256]."""
    found = np.zeros(contexts.count * 256, np.int64)
    step = max(1, COUNTED // max(symbols.shape[1], 1))
    for start in range(0, len(symbols), step):
        rows = slice(start, start + step)
        at = contexts.numbers(rows)
        at <<= 8
        at += symbols[rows]
        found += np.bincount(at.ravel(), minlength=len(found))
    return found.reshape(-1, 256)


class _Lanes:
    """The tables of one step in every stream that has it, and room to work in."""

    def __init__(self, contexts: Contexts, first: Ints, streams: int, per: int) -> None:
        """`first`: where the entries of each table begin."""
        self.rows, self.cols = len(contexts.rows), contexts.cols.tolist()
        self.streams, self.per = streams, per
        padded = np.zeros(streams * per, np.int64)
        padded[: self.rows] = contexts.rows
        by_stream, last = padded.reshape(streams, per), len(first) - 1
        self.bases = [
            {
                kind: first[np.minimum(by_stream[:, row] + kind >> contexts.shift, last)].astype(np.int32)
                for kind in set(self.cols)
            }
            for row in range(per)
        ]
        self.numbers = np.empty((3, streams), np.uint32)
        self.flags = np.empty(streams, bool)

    def at(self, step: int) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.bool_]]:
        """`first` of the table of each stream, three rows of numbers and one of flags; only the last may lack it."""
        row, col = divmod(step, len(self.cols))
        active = self.streams - ((self.streams - 1) * self.per + row >= self.rows)
        return self.bases[row][self.cols[col]][:active], self.numbers[:, :active], self.flags[:active]


def _slots(tables: Sequence[Ints], signed: bool) -> tuple[Symbols, NDArray[np.uint32]]:
    """For every table and value of the state's low bits [tables * 4096]: the symbol; its frequency and the rest."""
    symbols = [np.arange(len(table)) - (len(table) // 2 if signed else 0) for table in tables]
    kind = np.int8 if signed else np.uint8
    symbol_of = [np.repeat(s.astype(kind), table) for s, table in zip(symbols, tables, strict=True)]
    frequency = [np.repeat(table, table) for table in tables]
    rest = [np.arange(SCALE) - np.repeat(np.cumsum(table) - table, table) for table in tables]
    both = (np.concatenate(frequency) << 16) | np.concatenate(rest)
    return np.concatenate(symbol_of), both.astype(np.uint32)


def _by_step(symbols: Symbols, streams: int, per: int) -> Symbols:
    """[rows, cols] -> [steps, streams], zeros where the last stream has no row."""
    rows, cols = symbols.shape
    if rows < streams * per:
        symbols = np.concatenate([symbols, np.zeros((streams * per - rows, cols), symbols.dtype)])
    return _transposed(symbols.reshape(streams, per * cols))


def _by_row(ordered: Symbols, rows: int, per: int) -> Symbols:
    """The inverse of `_by_step`."""
    steps, streams = ordered.shape
    return _transposed(ordered).reshape(streams * per, steps // per)[:rows]


def _transposed(matrix: NDArray[Any]) -> NDArray[Any]:
    """The transpose, in order; torch does that ten times as fast as numpy."""
    made: NDArray[Any] = torch.from_numpy(matrix).T.contiguous().numpy()
    return made
