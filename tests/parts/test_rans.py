"""The entropy coder against a twin in Python's integers, one symbol at a time; its words; what damaged streams do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmsqueeze.errors import CheckpointError
from llmsqueeze.parts.coding import rans, rans_loops
from llmsqueeze.parts.coding.rans import Contexts, Ints, Symbols, Words
from llmsqueeze.parts.coding.streams import one_context
from llmsqueeze.parts.compiled import compiled

quick = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """Symbols [rows, cols], the tables by number, which position has which, and the rows of a stream."""

    symbols: Symbols
    tables: list[Ints]
    contexts: Contexts
    per: int

    @property
    def signed(self) -> bool:
        return self.symbols.dtype == np.int8

    @property
    def streams(self) -> int:
        return math.ceil(len(self.symbols) / self.per)

    def encode(self) -> tuple[Words, Ints]:
        return rans.encode(self.symbols, self.tables, self.contexts, self.per)

    def decode(self, words: Words, lengths: Ints) -> Symbols:
        return rans.decode(words, lengths, self.tables, self.contexts, self.per, self.signed)

    def table(self, row: int, col: int) -> list[int]:
        number = (int(self.contexts.rows[row]) + int(self.contexts.cols[col])) >> self.contexts.shift
        return [int(f) for f in self.tables[number]]

    def positions(self, stream: int) -> list[tuple[int, int]]:
        """The positions of a stream in reading order."""
        rows, cols = self.symbols.shape
        return [(r, c) for r in range(stream * self.per, min(rows, (stream + 1) * self.per)) for c in range(cols)]


# ---------------------------------------------------------------------------------------------------- the slow twin


def slow_stream(entries: Sequence[int], tables: Sequence[Sequence[int]]) -> list[int]:
    """The words of one stream of table entries, as the first lines of rans.py have it."""
    x, emitted = 1 << 16, []
    for entry, table in reversed(list(zip(entries, tables, strict=True))):
        f, c = table[entry], sum(table[:entry])
        while x >= f << 20:
            emitted.append(x & 0xFFFF)
            x >>= 16
        x = ((x // f) << 12) + x % f + c
        assert 1 << 16 <= x < 1 << 32
    return [x >> 16, x & 0xFFFF, *reversed(emitted)]


def slow_entries(words: Sequence[int], tables: Sequence[Sequence[int]]) -> list[int]:
    """The table entries of one stream."""
    x, left, entries = words[0] << 16 | words[1], list(words[2:]), []
    for table in tables:
        low, entry, c = x & 0xFFF, 0, 0
        while c + table[entry] <= low:
            c += table[entry]
            entry += 1
        entries.append(entry)
        x = table[entry] * (x >> 12) + low - c
        if x < 1 << 16:
            x = x << 16 | left.pop(0)
    assert x == 1 << 16
    assert not left
    return entries


def slow_encode(case: Case) -> list[list[int]]:
    """The words of every stream."""
    streams = []
    for stream in range(case.streams):
        tables = [case.table(*position) for position in case.positions(stream)]
        entries = [
            int(case.symbols[position]) + (len(table) // 2 if case.signed else 0)
            for position, table in zip(case.positions(stream), tables, strict=True)
        ]
        streams.append(slow_stream(entries, tables))
    return streams


def slow_decode(case: Case, streams: Sequence[Sequence[int]]) -> list[int]:
    """All symbols in reading order."""
    symbols = []
    for stream, words in enumerate(streams):
        tables = [case.table(*position) for position in case.positions(stream)]
        entries = slow_entries(words, tables)
        symbols += [e - (len(t) // 2 if case.signed else 0) for e, t in zip(entries, tables, strict=True)]
    return symbols


def split(words: NDArray[Any], lengths: Ints) -> list[list[int]]:
    """The words of every stream, from all in a row."""
    assert int(lengths.sum()) == len(words)
    return [part.tolist() for part in np.split(words, np.cumsum(lengths)[:-1])]


# ------------------------------------------------------------------------------------------------------------- cases


def random_table(rng: np.random.Generator, size: int, steep: float) -> Ints:
    """Frequencies of `size` symbols that sum to 4096; the larger `steep`, the more on few of them."""
    weight = rng.random(size) ** steep + 1e-9
    table = 1 + np.floor(weight / weight.sum() * (4096 - size)).astype(np.int64)
    table[int(rng.integers(size))] += 4096 - int(table.sum())
    return np.asarray(table, np.int64)


def random_case(
    seed: int, shape: tuple[int, int], per: int, tables: Sequence[Ints], signed: bool, shift: int = 0
) -> Case:
    """Symbols that have a frequency, half of them drawn by it, the others evenly, under tables all of which occur."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    top = len(tables) << shift
    row_part = rng.integers(0, max(top // 2, 1), rows)
    col_part = rng.integers(0, top - int(row_part.max()), cols)
    contexts = Contexts(row_part, col_part, shift)
    symbols = np.zeros(shape, np.int8 if signed else np.uint8)
    for r in range(rows):
        for c in range(cols):
            table = tables[(int(row_part[r]) + int(col_part[c])) >> shift]
            drawn = table / 4096 if rng.random() < 0.5 else (table > 0) / (table > 0).sum()
            entry = int(rng.choice(len(table), p=drawn))
            symbols[r, c] = entry - (len(table) // 2 if signed else 0)
    return Case(symbols, [np.asarray(table, np.int64) for table in tables], contexts, per)


def table(*frequency: int) -> Ints:
    assert sum(frequency) == 4096
    return np.array(frequency, np.int64)


SEVERAL = [random_table(np.random.default_rng(i), size, i) for i, size in enumerate((3, 17, 1, 255, 5))]
CASES = {
    "one table": random_case(1, (9, 30), 3, [table(100, 300, 3000, 600, 96)], True),
    "several tables": random_case(2, (16, 25), 4, SEVERAL, True),
    "several tables, uint8": random_case(3, (16, 25), 4, SEVERAL, False),
    "half octaves": random_case(4, (16, 25), 4, SEVERAL, True, shift=3),
    "all 256 symbols": random_case(5, (6, 70), 2, [random_table(np.random.default_rng(9), 256, 2.0)], False),
    "a short last stream": random_case(6, (11, 20), 4, SEVERAL, True, shift=1),
    "a last stream of one row": random_case(7, (9, 20), 4, SEVERAL, False),
    "one stream": random_case(8, (5, 20), 8, SEVERAL, True),
    "one row": random_case(9, (1, 50), 1, SEVERAL, True),
    "one column": random_case(10, (50, 1), 16, SEVERAL, True),
    "one place": random_case(11, (1, 1), 1, [table(1, 4094, 1)], True),
    "one symbol": random_case(12, (7, 30), 2, [table(4096)], True),
    "one symbol, uint8": random_case(13, (7, 30), 2, [table(0, 0, 4096)], False),
    "extremes": random_case(14, (8, 60), 2, [table(1, 4095), table(4095, 1), table(4096)], False),
    "extremes, int8": random_case(15, (8, 60), 2, [table(1, 4094, 1), table(4094, 1, 1), table(1, 4095)], True),
    "even tables": random_case(16, (6, 30), 2, [table(1000, 96, 2000, 1000)], True),
    "symbols without a frequency": random_case(17, (6, 30), 2, [table(0, 2096, 0, 0, 2000, 0)], True),
    "all of them rare": replace(
        random_case(18, (6, 40), 2, [table(4095, 1)], False), symbols=np.ones((6, 40), np.uint8)
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_the_words_are_the_slow_twins(case: Case) -> None:
    words, lengths = case.encode()
    assert words.dtype == np.uint16
    assert split(words, lengths) == slow_encode(case)


@every_case
def test_decoding_inverts_encoding(case: Case) -> None:
    symbols = case.decode(*case.encode())
    assert symbols.dtype == case.symbols.dtype
    assert symbols.flags.c_contiguous
    assert np.array_equal(symbols, case.symbols)


@every_case
def test_the_slow_twin_decodes_the_same(case: Case) -> None:
    assert slow_decode(case, split(*case.encode())) == case.symbols.ravel().tolist()


@quick
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 24), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())
def test_any_matrix_is_coded_as_by_the_slow_twin_and_comes_back(
    seed: int, rows: int, cols: int, per: int, signed: bool
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 256 - signed, int(rng.integers(1, 5)))
    tables = [random_table(rng, int(size), float(rng.choice([0, 1, 8, 40]))) for size in sizes]
    case = random_case(seed, (rows, cols), per, tables, signed, int(rng.integers(0, 4)))
    words, lengths = case.encode()
    assert split(words, lengths) == slow_encode(case)
    assert np.array_equal(case.decode(words, lengths), case.symbols)


def test_a_long_stream_is_the_slow_twins() -> None:
    """8000 symbols: the state has met every carry that there is."""
    case = random_case(20, (2, 4000), 2, [random_table(np.random.default_rng(3), 31, 6.0)], True)
    words, lengths = case.encode()
    assert split(words, lengths) == slow_encode(case)
    assert np.array_equal(case.decode(words, lengths), case.symbols)


def test_a_matrix_that_is_no_piece_of_memory_is_coded_as_its_copy() -> None:
    case = CASES["several tables"]
    wide = np.zeros((case.symbols.shape[0], 2 * case.symbols.shape[1]), np.int8)
    wide[:, ::2] = case.symbols
    words, lengths = replace(case, symbols=wide[:, ::2]).encode()
    assert np.array_equal(words, case.encode()[0])
    assert np.array_equal(lengths, case.encode()[1])


# ------------------------------------------------------------------------------------------------------- the format

# tables 0 0 0 0 0 0, 0 0 0 1 1 1 and 2 2 2 2 2 2; two rows in the first stream, one in the second
GOLDEN = Case(
    np.array([[-2, -1, 0, 1, 2, 1], [2, 2, -2, 1, -1, 1], [0, 0, -1, -1, 0, -1]], np.int8),
    [table(96, 1000, 2000, 900, 100), table(1, 4094, 1), table(4095, 1)],
    Contexts(np.array([0, 1, 4]), np.array([0, 0, 0, 1, 1, 1]), 1),
    2,
)
GOLDEN_WORDS = [[80, 24613, 6418, 28643, 0, 4095], [16, 4095, 16383, 4177]]


def test_golden_words() -> None:
    """The format as it is; whoever changes it changes its version too."""
    assert split(*GOLDEN.encode()) == GOLDEN_WORDS
    assert np.array_equal(GOLDEN.decode(*GOLDEN.encode()), GOLDEN.symbols)


def test_a_stream_worked_out_by_hand() -> None:
    """x = 65536; then 32 << 12 | 2048, 65 << 12, 130 << 12 | 2048 = 0x82800."""
    encoded = rans.encode(np.array([[1, 0, 1]], np.uint8), [table(2048, 2048)], one_context(1, 3), 1)
    assert split(*encoded) == [[0x8, 0x2800]]


# ------------------------------------------------------------------------------------------------ streams by themselves


@every_case
def test_every_stream_can_be_decoded_alone(case: Case) -> None:
    words, lengths = case.encode()
    begin = 0
    for stream, length in enumerate(lengths.tolist()):
        rows = slice(stream * case.per, (stream + 1) * case.per)
        contexts = replace(case.contexts, rows=case.contexts.rows[rows])
        alone = replace(case, symbols=case.symbols[rows], contexts=contexts)
        symbols = alone.decode(words[begin : begin + length], lengths[stream : stream + 1])
        assert np.array_equal(symbols, case.symbols[rows])
        begin += length
    assert begin == len(words)


def test_a_stream_does_not_depend_on_the_others() -> None:
    case = CASES["several tables"]
    order = np.array([2, 0, 3, 1])
    rows = (order[:, None] * case.per + np.arange(case.per)).ravel()
    contexts = replace(case.contexts, rows=case.contexts.rows[rows])
    other = replace(case, symbols=case.symbols[rows], contexts=contexts)
    streams = split(*case.encode())
    assert split(*other.encode()) == [streams[i] for i in order]


# ------------------------------------------------------------------------------------------------------------ length


@every_case
def test_a_stream_is_as_long_as_its_ideal_code_and_one_to_two_words(case: Case) -> None:
    """The state that it begins from is one word; the last state is two, of which it fills at least one."""
    _, lengths = case.encode()
    for stream, length in enumerate(lengths.tolist()):
        ideal = 0.0
        for position in case.positions(stream):
            table = case.table(*position)
            ideal += 12 - math.log2(table[int(case.symbols[position]) + (len(table) // 2 if case.signed else 0)])
        assert ideal + 15.99 <= 16 * length <= ideal * 1.002 + 32.01


def test_a_long_stream_is_within_a_thousandth_of_a_percent_of_its_entropy() -> None:
    """Symbols drawn by their table: against the ideal code length, and so against what the table promises."""
    rng = np.random.default_rng(5)
    freq = random_table(rng, 15, 3.0)
    symbols = rng.choice(15, size=(32, 1000), p=freq / 4096).astype(np.uint8)
    words, lengths = rans.encode(symbols, [freq], one_context(32, 1000), 32)
    ideal = float((12 - np.log2(freq[symbols])).sum())
    entropy = float(-(freq / 4096 * np.log2(freq / 4096)).sum()) * symbols.size
    assert len(lengths) == 1
    assert 16 * len(words) == pytest.approx(ideal, rel=3e-4)
    assert 16 * len(words) == pytest.approx(entropy, rel=1e-2)


@quick
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 40]), st.integers(1, 90))
def test_no_symbol_takes_more_than_twelve_bits(seed: int, size: int, cols: int) -> None:
    """The bound that `lengths_dtype` relies on, among the rarest symbols and those next to them."""
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, size, 60.0), random_table(rng, size, 60.0)[::-1]]
    symbols = rng.integers(0, size, (4, cols)).astype(np.uint8)
    contexts = Contexts(rng.integers(0, 2, 4), np.zeros(cols, np.int64))
    _, lengths = rans.encode(symbols, tables, contexts, 1)
    assert int(lengths.max()) <= cols * 12 // 16 + 2


def test_a_stream_of_the_rarest_symbol_takes_twelve_bits_each() -> None:
    symbols = np.ones((3, 400), np.uint8)
    words, lengths = rans.encode(symbols, [table(4095, 1)], one_context(3, 400), 1)
    assert lengths.tolist() == [302] * 3
    assert np.array_equal(rans.decode(words, lengths, [table(4095, 1)], one_context(3, 400), 1, False), symbols)


def test_a_stream_of_the_only_symbol_takes_two_words() -> None:
    words, lengths = rans.encode(np.zeros((4, 500), np.int8), [table(4096)], one_context(4, 500), 2)
    assert words.tolist() == [1, 0, 1, 0]
    assert lengths.tolist() == [2, 2]


@pytest.mark.parametrize("cols", [1, 7, 100, 1023, 1024, 1025, 2047, 2048, 2049, 100_000])
@pytest.mark.parametrize("rows", [1, 2, 3, 100, 4096])
def test_streams_hold_the_fewest_rows_that_make_them_long_enough(rows: int, cols: int) -> None:
    """A power of two of rows with 2048 symbols, or the first that holds them all."""
    powers = [2**i for i in range(20)]
    assert rans.rows_per_stream(rows, cols) == next(n for n in powers if n >= rows or n * cols >= 2048)


# ------------------------------------------------------------------------------------------------ tables and counts


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_table_of_a_place_is_the_sum_of_its_row_and_column(shift: int) -> None:
    rng = np.random.default_rng(shift)
    contexts = Contexts(rng.integers(0, 40, 7), rng.integers(0, 30, 11), shift)
    slow = [[(r + c) // 2**shift for c in contexts.cols.tolist()] for r in contexts.rows.tolist()]
    tables = rans.counts(np.arange(77, dtype=np.uint8).reshape(7, 11), contexts).argmax(axis=0)[:77]
    assert tables.reshape(7, 11).tolist() == slow
    assert contexts.count == max(map(max, slow)) + 1


def test_counts_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(2)
    contexts = Contexts(rng.integers(0, 9, 13), rng.integers(0, 7, 10), 1)
    symbols = rng.choice([0, 1, 2, 254, 255], (13, 10)).astype(np.uint8)
    slow = np.zeros((contexts.count, 256), np.int64)
    for r in range(13):
        for c in range(10):
            slow[(contexts.rows[r] + contexts.cols[c]) >> 1, symbols[r, c]] += 1
    assert np.array_equal(rans.counts(symbols, contexts), slow)


def test_tables_too_few_or_of_another_sum_are_refused() -> None:
    """The loops look up without asking."""
    case = CASES["several tables"]
    for tables in (case.tables[:-1], [*case.tables[:-1], case.tables[-1] * 2]):
        with pytest.raises(ValueError, match="5 tables that sum to 4096"):
            replace(case, tables=tables).encode()
        with pytest.raises(ValueError, match="5 tables that sum to 4096"):
            replace(case, tables=tables).decode(*case.encode())


@pytest.mark.parametrize("symbol", [0, 2, 200])
def test_a_symbol_without_a_frequency_is_refused(symbol: int) -> None:
    symbols = np.ones((9, 40), np.uint8)
    symbols[8, 39] = symbol
    with pytest.raises(ValueError, match="no frequency"):
        rans.encode(symbols, [table(0, 4095, 0, 1)], one_context(9, 40), 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_the_same_streams_and_symbols(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rans, "THREAD_SYMBOLS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cuts: list[tuple[int, int]] = []
    rans.on_threads(cuts.append, 10, 1000)
    assert [stop - start for start, stop in sorted(cuts)].count(0) == 0
    assert len(cuts) == threads
    for case in CASES.values():
        words, lengths = case.encode()
        assert split(words, lengths) == slow_encode(case)
        assert np.array_equal(case.decode(words, lengths), case.symbols)


def test_without_a_place_for_its_cache_a_loop_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, asked = numba.njit, []

    def njit(**settings: Any) -> Any:
        asked.append(settings.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**settings)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled(lambda x: x + 1)(2) == 3
    assert asked == [True, False]


@every_case
def test_loops_as_python_runs_them_stay_within_their_arrays(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled they are checked against bounds, and damaged words lead them nowhere either."""
    compiled = ("_next", "_refill", "decode", "_emit", "_before", "encode", "gather", "count")
    words, lengths = case.encode()
    rng = np.random.default_rng(7)
    hurt = [words, rng.integers(0, 1 << 16, len(words)).astype(np.uint16), words * 0, words * 0 + 65535]
    expected = [outcome(case, one, lengths) for one in hurt]
    for name in compiled:
        monkeypatch.setattr(rans_loops, name, getattr(rans_loops, name).py_func)
    assert split(*case.encode()) == slow_encode(case)
    for one, symbols in zip(hurt, expected, strict=True):
        again = outcome(case, one, lengths)
        assert (again is None) == (symbols is None)
        assert symbols is None or np.array_equal(symbols, again)


# ---------------------------------------------------------------------------------------------------- damaged streams

Damage = Callable[[list[list[int]], np.random.Generator], list[list[int]]]


def outcome(case: Case, words: NDArray[Any], lengths: NDArray[Any]) -> Symbols | None:
    """What comes of it; None for a CheckpointError. Every other exception is a failure."""
    try:
        return case.decode(np.asarray(words, np.uint16), np.asarray(lengths, np.int64))
    except CheckpointError:
        return None


def flipped(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    hurt = [list(one) for one in streams]
    stream = int(rng.integers(len(hurt)))
    hurt[stream][int(rng.integers(len(hurt[stream])))] ^= 1 << int(rng.integers(16))
    return hurt


def drawn_anew(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(0, 1 << 16, len(one)).tolist() for one in streams]


def zeroed(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    hit = int(rng.integers(len(streams)))
    return [[0] * len(one) if i == hit else one for i, one in enumerate(streams)]


def filled(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    hit = int(rng.integers(len(streams)))
    return [[0xFFFF] * len(one) if i == hit else one for i, one in enumerate(streams)]


def swapped_words(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """Two neighbours that differ."""
    hurt = [list(one) for one in streams]
    pairs = [(s, i) for s, one in enumerate(hurt) for i in range(len(one) - 1) if one[i] != one[i + 1]]
    stream, i = pairs[int(rng.integers(len(pairs)))]
    hurt[stream][i : i + 2] = hurt[stream][i : i + 2][::-1]
    return hurt


def shortened(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """A stream's last word is lost, and its length knows."""
    hit = int(rng.integers(len(streams)))
    return [one[:-1] if i == hit and len(one) > 2 else [*one, 0] if i == hit else one for i, one in enumerate(streams)]


def lengthened(streams: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    hit = int(rng.integers(len(streams)))
    return [[*one, int(rng.integers(1 << 16))] if i == hit else one for i, one in enumerate(streams)]


DAMAGES: dict[str, tuple[Damage, int]] = {
    "a flipped bit": (flipped, 60),
    "other words": (drawn_anew, 10),
    "a stream of zeros": (zeroed, 4),
    "a stream of ones": (filled, 4),
    "two words swapped": (swapped_words, 20),
    "a word lost": (shortened, 8),
    "a word too many": (lengthened, 8),
}
DAMAGED = ("several tables", "half octaves", "a short last stream", "extremes", "extremes, int8", "one symbol")


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_words_are_noticed(damage: str, name: str) -> None:
    """Nearly all: a bit may turn a symbol into one of the same frequency, after which the state is what it was."""
    make, times = DAMAGES[damage]
    case = CASES[name]
    rng = np.random.default_rng(6)
    streams = split(*case.encode())
    unnoticed = 0
    for _ in range(times):
        hurt = make(streams, rng)
        symbols = outcome(case, np.concatenate([np.array(one) for one in hurt]), np.array(list(map(len, hurt))))
        unnoticed += symbols is not None
        if symbols is not None:
            assert symbols.shape == case.symbols.shape
            assert symbols.dtype == case.symbols.dtype
    assert unnoticed <= times // 50


def test_streams_that_changed_places_are_noticed_where_their_tables_differ() -> None:
    case = CASES["several tables"]
    streams = split(*case.encode())
    assert len({str(case.contexts.rows[i : i + 4]) for i in range(0, 16, 4)}) == 4
    for a, b in itertools.combinations(range(4), 2):
        hurt = list(streams)
        hurt[a], hurt[b] = hurt[b], hurt[a]
        words = np.concatenate([np.array(one) for one in hurt])
        assert outcome(case, words, np.array(list(map(len, hurt)))) is None
        assert outcome(case, words, np.array(list(map(len, streams)))) is None


def test_damage_is_told_by_its_rows() -> None:
    case = CASES["a short last stream"]
    for stream, rows in enumerate(("0 to 3", "4 to 7", "8 to 10")):
        streams = split(*case.encode())
        streams[stream][0] ^= 64
        words = np.concatenate([np.array(one, np.uint16) for one in streams])
        with pytest.raises(CheckpointError, match=f"the coded stream of rows {rows} is damaged"):
            case.decode(words, case.encode()[1])


@pytest.mark.parametrize("name", DAMAGED)
def test_lengths_that_end_streams_elsewhere_are_noticed(name: str) -> None:
    """They still add up to the words that are there."""
    case = CASES[name]
    words, lengths = case.encode()
    for i in range(len(lengths)):
        for moved in (1, -1, 2, -2):
            hurt = lengths.copy()
            hurt[i] += moved
            hurt[i - 1] -= moved
            assert outcome(case, words, hurt) is None


LENGTHS: dict[str, tuple[Callable[[Ints], Ints], str]] = {
    "too few": (lambda n: n[:-1], "there are 3 coded streams; the rows need 4"),
    "too many": (lambda n: np.append(n, 2), "there are 5 coded streams; the rows need 4"),
    "none": (lambda n: n[:0], "there are 0 coded streams; the rows need 4"),
    "a short one": (lambda n: np.array([n[0], 1, n[2], n[1] - 1 + n[3]]), "coded stream 1 has 1 words; the least is 2"),
    "an empty one": (lambda n: np.array([n[0], n[1], 0, n[2] + n[3]]), "coded stream 2 has 0 words"),
    "a negative one": (lambda n: np.array([-5, n[1] + n[0] + 5, n[2], n[3]]), "coded stream 0 has -5 words"),
    "too large a sum": (lambda n: n + 1, "the lengths of the coded streams sum to"),
    "too small a sum": (lambda n: n - 1, "the lengths of the coded streams sum to"),
    "far too large a sum": (lambda n: n + 2**40, "the lengths of the coded streams sum to"),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_that_cannot_be_are_refused(kind: str) -> None:
    case = CASES["several tables"]
    change, message = LENGTHS[kind]
    words, lengths = case.encode()
    with pytest.raises(CheckpointError, match=message):
        case.decode(words, change(lengths))


@pytest.mark.parametrize("lost", [1, 2, 50])
def test_lost_words_are_noticed(lost: int) -> None:
    case = CASES["several tables"]
    words, lengths = case.encode()
    with pytest.raises(CheckpointError, match=rf"sum to {len(words)} words, but there are {len(words) - lost} words"):
        case.decode(words[:-lost], lengths)
    assert outcome(case, words[:0], lengths) is None


@pytest.mark.parametrize("per", [1, 2, 3, 5, 8, 15, 16, 100])
def test_another_number_of_rows_per_stream_is_noticed(per: int) -> None:
    case = CASES["several tables"]
    words, lengths = case.encode()
    assert case.per == 4
    assert outcome(replace(case, per=per), words, lengths) is None


def test_other_tables_than_those_of_encoding_are_noticed() -> None:
    case = CASES["several tables"]
    words, lengths = case.encode()
    for number in range(len(case.tables)):
        tables = list(case.tables)
        tables[number] = random_table(np.random.default_rng(number), 9, 2.0)
        assert outcome(replace(case, tables=tables), words, lengths) is None
