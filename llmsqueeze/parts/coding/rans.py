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

The method is Duda's (arXiv 1311.2540); the layout is ours. All of it is arithmetic on whole numbers, so every platform
has the same streams. The loops are compiled (rans_loops.py), and streams shared out over torch's threads. Memory
beside symbols and words: 1.5 bytes a symbol while they are encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmsqueeze.errors import CheckpointError

PROBABILITY_BITS = 12
SCALE = 1 << PROBABILITY_BITS
LOWEST = 1 << 16
MIN_STREAM = 2048  # symbols; a stream costs about 36 bits
THREAD_SYMBOLS = 1 << 19  # fewer are not worth a thread

Symbols = NDArray[np.integer[Any]]  # uint8 or int8
Words = NDArray[np.uint16]
Ints = NDArray[np.int64]
T = TypeVar("T")


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

    def numbers(self) -> Ints:
        """[rows, cols]: of every place."""
        return self.rows[:, None] + self.cols >> self.shift


def rows_per_stream(rows: int, cols: int) -> int:
    """How many of a matrix's rows we put in one stream."""
    per = 1
    while per < rows and per * cols < MIN_STREAM:
        per *= 2
    return per


def encode(symbols: Symbols, tables: Sequence[Ints], contexts: Contexts, per: int) -> tuple[Words, Ints]:
    """symbols [rows, cols] -> the words of all streams, and how many each has [streams].

    `tables`: by number, frequencies that sum to 4096, of 0, 1, 2 and so on for uint8 symbols; for int8 ones the middle
    one is that of 0. `per`: rows of a stream. Raises ValueError for a symbol whose frequency is 0.
    """
    check_tables(tables, contexts)
    rows, cols = symbols.shape
    per = min(per, rows)
    streams, room = -(-rows // per), per * cols * PROBABILITY_BITS // 16 + 3
    entries = np.zeros((len(tables), 256), np.int64)
    for entry, table in zip(entries, tables, strict=True):
        places = np.arange(len(table)) - (len(table) // 2 if symbols.dtype == np.int8 else 0)
        entry[places & 255] = np.where(table > 0, (np.cumsum(table) - table) << 16 | table, 0)
    out, lengths = np.empty(streams * room, np.uint16), np.empty(streams, np.int64)
    shared, whole = np.ascontiguousarray(symbols).view(np.uint8), (contexts.rows, contexts.cols, contexts.shift, per)

    def code(some: tuple[int, int]) -> bool:
        return bool(rans_loops().encode(shared, entries.ravel(), *whole, some, room, out, lengths))

    if not all(on_threads(code, streams, symbols.size)):
        raise ValueError("a symbol has no frequency in its table")
    return out[: rans_loops().gather(out, room, lengths)].copy(), lengths


def decode(words: Words, lengths: Ints, tables: Sequence[Ints], contexts: Contexts, per: int, signed: bool) -> Symbols:
    """The inverse of `encode`: symbols [rows, cols], int8 if `signed`. Raises CheckpointError for damaged streams."""
    rows, cols = len(contexts.rows), len(contexts.cols)
    per = min(per, rows)
    streams = -(-rows // per)
    check_tables(tables, contexts)
    check_lengths(lengths, streams, len(words))
    behind = np.cumsum(lengths)
    padded, slots = np.append(words, np.zeros(2, np.uint16)), _slots(tables, signed)
    out, ends = np.empty((rows, cols), np.int8), np.empty((streams, 2), np.int64)
    whole = (contexts.rows, contexts.cols, contexts.shift, per)

    def code(some: tuple[int, int]) -> None:
        rans_loops().decode(padded, behind - lengths, slots, *whole, some, out, ends)

    on_threads(code, streams, out.size)
    damaged = (ends[:, 0] != LOWEST) | (ends[:, 1] != behind)
    if damaged.any():
        first = int(damaged.argmax()) * per
        raise CheckpointError(f"the coded stream of rows {first} to {min(rows, first + per) - 1} is damaged")
    return out if signed else out.view(np.uint8)


def check_tables(tables: Sequence[Ints], contexts: Contexts) -> None:
    """Raises ValueError unless there is a table for every place, as the loops rely on."""
    if len(tables) < contexts.count or any(int(table.sum()) != SCALE for table in tables):
        raise ValueError(f"{contexts.count} tables that sum to {SCALE} are needed")


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
    found = np.zeros((contexts.count, 256), np.int64)
    rans_loops().count(np.ascontiguousarray(symbols), contexts.rows, contexts.cols, contexts.shift, found)
    return found


def _slots(tables: Sequence[Ints], signed: bool) -> NDArray[np.int32]:
    """For every table and value of the state's low bits [tables * 4096]: symbol, frequency - 1 (12 bits), rest (12)."""
    made = np.empty((len(tables), SCALE), np.int64)
    for slots, table in zip(made, tables, strict=True):
        symbols = np.arange(len(table)) - (len(table) // 2 if signed else 0)
        rest = np.arange(SCALE) - np.repeat(np.cumsum(table) - table, table)
        slots[:] = np.repeat(symbols << 24 | np.maximum(table - 1, 0) << PROBABILITY_BITS, table) | rest
    return made.astype(np.int32).ravel()


def on_threads(code: Callable[[tuple[int, int]], T], streams: int, symbols: int) -> list[T]:
    """`code` of all streams, in as many runs as torch has threads; small matrices in one."""
    threads = max(1, min(torch.get_num_threads(), streams, symbols // THREAD_SYMBOLS))
    cuts = [streams * i // threads for i in range(threads + 1)]
    runs = list(itertools.pairwise(cuts))
    if threads == 1:
        return [code(runs[0])]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(code, runs))


def rans_loops() -> Any:
    """The compiled loops; numba is imported where something is coded."""
    from llmsqueeze.parts.coding import rans_loops

    return rans_loops
