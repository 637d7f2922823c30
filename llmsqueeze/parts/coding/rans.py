"""The entropy coder: rANS streams of small integers, under static frequency tables that row and column select.

    state      x, 32 bits, kept in [2^16, 2^32); renormalised by words of 16 bits; frequencies sum to 2^12
    encode     while x >= f << 20: emit x & 0xFFFF, x >>= 16;   x = ((x // f) << 12) + x % f + c
    decode     s = the symbol whose [c, c + f) has x & 0xFFF;   x = f * (x >> 12) + (x & 0xFFF) - c
               if x < 2^16: x = x << 16 | the next word

f, c: the frequency of the symbol and the sum of the frequencies before it, in the table of its place (`Contexts`).
`rows_per_stream` consecutive rows make one stream, with their symbols in reading order; the last stream can have fewer
rows. A stream is encoded from its last symbol to its first, from x = 2^16. It is stored in the order of decoding: the
high word of the last x, its low word, then the emitted words, last one first. The decoder must end with x = 2^16 and no
word left; if not, the stream is damaged. To decode a row, decode its stream. Streams can be decoded in any order or in
parallel.

The method is Duda's (arXiv 1311.2540); the layout is ours. It is all integer arithmetic, so every platform makes the
same streams. The loops are compiled (rans_loops.py), and torch's threads share the streams. Memory beside symbols and
words: 1.5 bytes per symbol during encoding.
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
MIN_STREAM = 2048  # symbols; each stream costs about 36 bits more
THREAD_SYMBOLS = 1 << 19  # a thread does not pay for fewer symbols

Symbols = NDArray[np.integer[Any]]  # uint8 or int8
Words = NDArray[np.uint16]
Ints = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Contexts:
    """The table of each place [row, column]: number `(rows[row] + cols[column]) >> shift`. No entry is negative."""

    rows: Ints
    cols: Ints
    shift: int = 0

    @property
    def count(self) -> int:
        """The number of tables."""
        return int(self.rows.max() + self.cols.max() >> self.shift) + 1


def rows_per_stream(rows: int, cols: int) -> int:
    """The rows of a matrix in one stream: the least power of two that gives `MIN_STREAM` symbols or all rows."""
    per = 1
    while per < rows and per * cols < MIN_STREAM:
        per *= 2
    return per


def encode(symbols: Symbols, tables: Sequence[Ints], contexts: Contexts, per: int) -> tuple[Words, Ints]:
    """symbols [rows, cols] -> the words of all streams, and the number of words in each [streams].

    `tables`: by number, frequencies that sum to 4096. For uint8 symbols the first is that of symbol 0, for int8
    symbols the middle one. `per`: rows in a stream. Raises ValueError for a symbol whose frequency is 0.
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
    as_bytes, layout = np.ascontiguousarray(symbols).view(np.uint8), (contexts.rows, contexts.cols, contexts.shift, per)

    def encode_streams(span: tuple[int, int]) -> bool:
        return bool(rans_loops().encode(as_bytes, entries.ravel(), *layout, span, room, out, lengths))

    if not all(on_threads(encode_streams, streams, symbols.size)):
        raise ValueError("a symbol has no frequency in its table")
    return out[: rans_loops().gather(out, room, lengths)].copy(), lengths


def decode(words: Words, lengths: Ints, tables: Sequence[Ints], contexts: Contexts, per: int, signed: bool) -> Symbols:
    """The inverse of `encode`: symbols [rows, cols], int8 if `signed`. Raises CheckpointError for damaged streams."""
    rows, cols = len(contexts.rows), len(contexts.cols)
    per = min(per, rows)
    streams = -(-rows // per)
    check_tables(tables, contexts)
    check_lengths(lengths, streams, len(words))
    stops = np.cumsum(lengths)
    padded, slots = np.append(words, np.zeros(2, np.uint16)), _slots(tables, signed)
    out, ends = np.empty((rows, cols), np.int8), np.empty((streams, 2), np.int64)
    layout = (contexts.rows, contexts.cols, contexts.shift, per)

    def decode_streams(span: tuple[int, int]) -> None:
        rans_loops().decode(padded, stops - lengths, slots, *layout, span, out, ends)

    on_threads(decode_streams, streams, out.size)
    damaged = (ends[:, 0] != LOWEST) | (ends[:, 1] != stops)
    if damaged.any():
        first = int(damaged.argmax()) * per
        raise CheckpointError(f"the coded stream of rows {first} to {min(rows, first + per) - 1} is damaged")
    return out if signed else out.view(np.uint8)


def check_tables(tables: Sequence[Ints], contexts: Contexts) -> None:
    """Raises ValueError if a place has no table, or a table has another sum: the loops do not check it."""
    if len(tables) < contexts.count or any(int(table.sum()) != SCALE for table in tables):
        raise ValueError(f"{contexts.count} tables that sum to {SCALE} are needed")


def check_lengths(lengths: Ints, streams: int, words: int) -> None:
    """Raises CheckpointError if these are not the lengths of `streams` streams with `words` words together."""
    if len(lengths) != streams:
        raise CheckpointError(f"there are {len(lengths)} coded streams; the rows need {streams}")
    if len(lengths) and int(lengths.min()) < 2:
        raise CheckpointError(f"coded stream {int(lengths.argmin())} has {int(lengths.min())} words; the least is 2")
    if int(lengths.sum()) != words:
        raise CheckpointError(
            f"the lengths of the coded streams sum to {int(lengths.sum())} words, but there are {words} words"
        )


def counts(symbols: NDArray[np.uint8], contexts: Contexts) -> Ints:
    """[tables, 256]: how often each symbol occurs under each table."""
    table_counts = np.zeros((contexts.count, 256), np.int64)
    rans_loops().count(np.ascontiguousarray(symbols), contexts.rows, contexts.cols, contexts.shift, table_counts)
    return table_counts


def _slots(tables: Sequence[Ints], signed: bool) -> NDArray[np.int32]:
    """[tables * 4096], by table and low bits of the state: symbol, frequency - 1 (12 bits), low bits - c (12 bits)."""
    slots = np.empty((len(tables), SCALE), np.int64)
    for slot, table in zip(slots, tables, strict=True):
        symbols = np.arange(len(table)) - (len(table) // 2 if signed else 0)
        rest = np.arange(SCALE) - np.repeat(np.cumsum(table) - table, table)
        slot[:] = np.repeat(symbols << 24 | np.maximum(table - 1, 0) << PROBABILITY_BITS, table) | rest
    return slots.astype(np.int32).ravel()


def on_threads(code: Callable[[tuple[int, int]], T], streams: int, symbols: int) -> list[T]:
    """`code` of spans (start, stop) that cover all streams, one span per thread of torch; one for a small matrix."""
    threads = max(1, min(torch.get_num_threads(), streams, symbols // THREAD_SYMBOLS))
    cuts = [streams * i // threads for i in range(threads + 1)]
    spans = list(itertools.pairwise(cuts))
    if threads == 1:
        return [code(spans[0])]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(code, spans))


def rans_loops() -> Any:
    """The compiled loops; numba is imported only if something is coded."""
    from llmsqueeze.parts.coding import rans_loops

    return rans_loops
