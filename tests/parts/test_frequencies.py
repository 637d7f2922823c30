"""Frequency tables: any bytes make sound ones, counts come back nearly, and neighbours share one where that pays."""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsqueeze.errors import CheckpointError
from llmsqueeze.parts.coding import frequencies, rans
from llmsqueeze.parts.coding.frequencies import Bytes
from llmsqueeze.parts.coding.rans import Contexts, Ints

quick = settings(max_examples=50, deadline=None, derandomize=True)
both_kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "plain"])


def slow_frequencies(stored: Sequence[int], symmetric: bool) -> list[int]:
    """As the first lines of frequencies.py have it."""
    weight = [round(2 ** (15 + (k - 1) % 16 / 16)) * 2 ** ((k - 1) // 16) for k in stored]
    if symmetric:
        weight = weight[:0:-1] + weight
    table = [1 + w * (4096 - len(weight)) // sum(weight) for w in weight]
    table[table.index(max(table))] += 4096 - sum(table)
    return table


def slow_parse(stored: Sequence[int], symmetric: bool) -> list[list[int]]:
    """Every table that the bytes hold."""
    tables: list[list[int]] = []
    now: list[int] = []
    for byte in stored:
        if byte:
            now.append(byte)
            continue
        tables.append(slow_frequencies(now, symmetric) if now else tables[-1])
        now = []
    assert not now, "the last byte is a 0"
    return tables


def slow_bits(counts: Ints, tables: Sequence[Sequence[int]], symmetric: bool) -> float:
    """What symbols counted so [tables, 256] take; of symmetric tables, those at distances from the middle."""
    bits = 0.0
    for count, table in zip(counts.tolist(), tables, strict=True):
        middle = len(table) // 2 if symmetric else 0
        bits += sum(n * (12 - math.log2(table[middle + i])) for i, n in enumerate(count) if n)
    return bits


def as_bytes(*values: int) -> Bytes:
    return np.array(values, np.uint8)


def counted(*tables: Sequence[int]) -> Ints:
    """[tables, 256]."""
    counts = np.zeros((len(tables), 256), np.int64)
    for row, table in zip(counts, tables, strict=True):
        row[: len(table)] = table
    return counts


# ------------------------------------------------------------------------------------------------ from bytes to tables


@quick
@given(st.lists(st.integers(1, 255), min_size=1, max_size=256), st.booleans())
def test_any_bytes_make_a_table_that_sums_to_4096(stored: list[int], symmetric: bool) -> None:
    stored = stored[:128] if symmetric else stored
    table = frequencies.frequencies(as_bytes(*stored), symmetric)
    assert len(table) == (2 * len(stored) - 1 if symmetric else len(stored))
    assert int(table.sum()) == 4096
    assert int(table.min()) >= 1
    assert table.tolist() == slow_frequencies(stored, symmetric)


@both_kinds
@pytest.mark.parametrize("byte", [1, 16, 17, 128, 255])
@pytest.mark.parametrize("size", [1, 2, 100, 128])
def test_equal_bytes_make_equal_frequencies(size: int, byte: int, symmetric: bool) -> None:
    table = frequencies.frequencies(np.full(size, byte, np.uint8), symmetric)
    n = len(table)
    assert table.tolist() == [4096 // n + 4096 % n, *[4096 // n] * (n - 1)], "the first has what is left"


def test_golden_tables() -> None:
    """The format as it is; whoever changes it changes its version too."""
    plain = frequencies.frequencies(as_bytes(255, 239, 246, 100, 1, 231), False)
    assert plain.tolist() == [1619, 808, 1094, 2, 1, 572]
    mirrored = frequencies.frequencies(as_bytes(255, 250, 240, 180), True)
    assert mirrored.tolist() == [43, 573, 883, 1098, 883, 573, 43]


@quick
@given(st.lists(st.integers(1, 255), min_size=1, max_size=128))
def test_a_symmetric_table_is_its_mirror_image(stored: list[int]) -> None:
    """But for the one entry that has what is left."""
    table = frequencies.frequencies(as_bytes(*stored), True)
    other = np.flatnonzero(table != table[::-1])
    assert len(other) in (0, 2)
    assert set(other) <= {int(table.argmax()), len(table) - 1 - int(table.argmax())}
    if stored[0] > max(stored[1:], default=0):
        assert int(table.argmax()) == len(stored) - 1, "the middle one is the largest"


@quick
@given(st.lists(st.integers(0, 255), max_size=400), st.integers(-1, 1), st.booleans())
def test_any_bytes_are_tables_or_refused(stored: list[int], off: int, symmetric: bool) -> None:
    zeros = stored.count(0)
    try:
        tables = frequencies.parse(np.array(stored, np.uint8), zeros + off, symmetric)
    except CheckpointError:
        runs = [len(run) for run in "".join(map(chr, stored)).split("\0")]
        longest = 128 if symmetric else 256
        assert off or runs[-1] or (zeros and not runs[0]) or max(runs) > longest
    else:
        assert off == 0
        assert [table.tolist() for table in tables] == slow_parse(stored, symmetric)


@both_kinds
def test_a_lone_zero_repeats_the_table_before_it(symmetric: bool) -> None:
    tables = frequencies.parse(as_bytes(200, 190, 0, 0, 0, 7, 0, 0), 5, symmetric)
    one, other = slow_frequencies([200, 190], symmetric), slow_frequencies([7], symmetric)
    assert [table.tolist() for table in tables] == [one, one, one, other, other]


@pytest.mark.parametrize(
    ("stored", "count", "message"),
    [
        ((), 1, "there are 0 frequency tables; 1 are needed"),
        ((9, 9, 0), 2, "there are 1 frequency tables; 2 are needed"),
        ((9, 9, 0, 0, 0), 2, "there are 3 frequency tables; 2 are needed"),
        ((9, 9, 0, 5), 1, "there are 1 frequency tables; 1 are needed"),
        ((9, 9), 0, "there are 0 frequency tables; 0 are needed"),
        ((0,), 1, "the first frequency table is empty"),
        ((0, 5, 0), 2, "the first frequency table is empty"),
        ((*[9] * 257, 0), 1, "a frequency table has 257 entries; at most 256 are allowed"),
        ((5, 0, *[9] * 300, 0), 2, "a frequency table has 300 entries; at most 256 are allowed"),
    ],
)
def test_bytes_that_are_not_so_many_tables_are_refused(stored: tuple[int, ...], count: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        frequencies.parse(as_bytes(*stored), count, False)


def test_the_longest_tables_there_can_be() -> None:
    assert len(frequencies.parse(as_bytes(*[9] * 256, 0), 1, False)[0]) == 256
    assert len(frequencies.parse(as_bytes(*[9] * 128, 0), 1, True)[0]) == 255
    with pytest.raises(CheckpointError, match="a frequency table has 129 entries; at most 128 are allowed"):
        frequencies.parse(as_bytes(*[9] * 129, 0), 1, True)


def test_no_tables_at_all() -> None:
    assert frequencies.parse(as_bytes(), 0, False) == []


# ----------------------------------------------------------------------------------------------- from counts to bytes

SHAPES = {
    "a bell": [math.exp(-((i / 3) ** 2) / 2) for i in range(16)],
    "a narrow bell": [math.exp(-((i / 0.5) ** 2) / 2) for i in range(3)],
    "a wide bell": [math.exp(-((i / 8) ** 2) / 2) for i in range(24)],
    "even": [1.0] * 12,
    "geometric": [0.7**i for i in range(20)],
    "nearly all the same": [1.0, 0.002, 0.001],
    "two heaps": [5.0, 1.0, 0.5, 1.0, 5.0, 6.0, 1.0],
    "with gaps": [5.0, 0.0, 3.0, 0.0, 1.0],
    "one symbol": [1.0],
    "one far symbol": [0.0, 0.0, 1.0],
}


def best_bits(share: Sequence[float]) -> float:
    """Of a symbol under the best table of whole frequencies that sum to 4096, none less than 1; found one by one."""
    f = [1] * len(share)
    gain = [(-p * math.log2(2), i) for i, p in enumerate(share)]
    heapq.heapify(gain)
    for _ in range(4096 - len(f)):
        _, i = gain[0]
        f[i] += 1
        heapq.heapreplace(gain, (-share[i] * math.log2((f[i] + 1) / f[i]), i))
    return sum(p * (12 - math.log2(n)) for p, n in zip(share, f, strict=True))


@both_kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_table_costs_less_than_a_thousandth_of_a_bit_more_than_the_best(shape: str, symmetric: bool) -> None:
    whole = np.array(SHAPES[shape]) / sum(SHAPES[shape])
    counts = counted(np.round(whole * 1e7).astype(np.int64).tolist())
    stored = frequencies.stored_table(counts[0], symmetric)
    assert stored.dtype == np.uint8
    assert len(stored) == len(whole)
    share = (counts[0] / counts.sum())[: len(whole)].tolist()
    if symmetric:
        share = [p / 2 for p in share[:0:-1]] + share[:1] + [p / 2 for p in share[1:]]
    bits = slow_bits(counts, [slow_frequencies(stored.tolist(), symmetric)], symmetric) / int(counts.sum())
    assert bits == pytest.approx(best_bits(share), abs=1e-3)


@both_kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_frequencies_are_within_three_percent_of_the_counts(shape: str, symmetric: bool) -> None:
    """Sixteenths of an octave are 4.4 % apart. One entry has what is left of 4096."""
    counts = counted(np.round(np.array(SHAPES[shape]) * 1e6).astype(np.int64).tolist())[0]
    table = frequencies.frequencies(frequencies.stored_table(counts, symmetric), symmetric)
    middle = len(table) // 2 if symmetric else 0
    for i, n in enumerate(counts[: len(SHAPES[shape])].tolist()):
        if middle + i != table.argmax():
            share = n / counts.sum() / (2 if symmetric and i else 1)
            assert table[middle + i] == pytest.approx(4096 * share, rel=0.03, abs=2)


def test_the_largest_share_has_the_largest_byte_and_the_others_are_sixteenths_of_octaves_below() -> None:
    stored = frequencies.stored_table(counted([4000, 2000, 1000, 250])[0], False)
    assert stored.tolist() == [255, 239, 223, 191], "an octave is sixteen"


def test_symbols_beyond_the_last_that_occurs_have_no_byte() -> None:
    assert len(frequencies.stored_table(counted([5, 0, 3, 0, 0])[0], False)) == 3
    assert len(frequencies.stored_table(counted([5, 0, 3, 0, 0])[0], True)) == 3


@both_kinds
def test_counts_of_nothing_make_the_table_of_one_symbol(symmetric: bool) -> None:
    stored = frequencies.stored_table(np.zeros(256, np.int64), symmetric)
    assert frequencies.frequencies(stored, symmetric).tolist() == [4096]


@quick
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=128), st.booleans())
def test_whatever_occurs_has_a_frequency(counts: list[int], symmetric: bool) -> None:
    stored = frequencies.stored_table(counted(counts)[0], symmetric)
    table = frequencies.frequencies(stored, symmetric)
    assert int(table.sum()) == 4096
    middle = len(table) // 2 if symmetric else 0
    last = max((i for i, n in enumerate(counts) if n), default=0)
    assert len(table) - middle == last + 1


# ---------------------------------------------------------------------------------------------------- sharing tables


def cuts(tables: int) -> Iterator[list[tuple[int, int]]]:
    """All ways to cut so many neighbours into runs, as (start, stop)."""
    for chosen in itertools.product([False, True], repeat=tables - 1):
        at = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), tables]
        yield list(itertools.pairwise(at))


def cost_of_cut(counts: Ints, runs: Sequence[tuple[int, int]], symmetric: bool) -> float:
    """Bits of symbols and tables where every run shares one."""
    bits = 0.0
    for start, stop in runs:
        stored = frequencies.stored_table(counts[start:stop].sum(axis=0), symmetric).tolist()
        tables = [slow_frequencies(stored, symmetric)] * (stop - start)
        bits += 8 * (len(stored) + stop - start) + slow_bits(counts[start:stop], tables, symmetric)
    return bits


def bell_counts(rng: np.random.Generator, sizes: Sequence[int], widths: Sequence[float]) -> Ints:
    """[tables, 256]: as many whole numbers of a normal density in each, without their sign."""
    counts = [
        np.bincount(np.abs(np.round(rng.normal(0, width, size))).astype(int), minlength=256)
        for size, width in zip(sizes, widths, strict=True)
    ]
    return np.array([count[:256] for count in counts], np.int64)


@both_kinds
@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_tables_are_the_best_of_all_cuts(seed: int, symmetric: bool) -> None:
    rng = np.random.default_rng(seed)
    tables = int(rng.integers(1, 7))
    sizes = rng.choice([0, 3, 30, 300, 3000, 30_000], tables)
    counts = bell_counts(rng, sizes.tolist(), (0.4 * 1.5 ** np.arange(tables)).tolist())
    stored = frequencies.choose(counts, symmetric)
    parsed = slow_parse(stored.tolist(), symmetric)
    assert len(parsed) == tables
    bits = 8 * len(stored) + slow_bits(counts, parsed, symmetric)
    assert bits == pytest.approx(min(cost_of_cut(counts, runs, symmetric) for runs in cuts(tables)), abs=1e-6)
    assert bits == pytest.approx(8 * len(stored) + frequencies.coded_bits(counts, stored, symmetric), abs=1e-6)


def shared(counts: Ints, symmetric: bool) -> list[int]:
    """How many neighbours share each of the chosen tables."""
    return [len(zeros) for zeros in re.findall(rb"\0+", frequencies.choose(counts, symmetric).tobytes())]


@both_kinds
def test_few_symbols_share_a_table_and_many_have_their_own(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    widths = [1.0, 1.4, 2.0, 2.8, 4.0]
    few, many = bell_counts(rng, [2] * 5, widths), bell_counts(rng, [100_000] * 5, widths)
    assert shared(few, symmetric) == [5]
    assert shared(many, symmetric) == [1] * 5
    assert shared(many[[2, 2, 2, 2, 2]], symmetric) == [5]
    assert shared(many[[0, 0, 4, 4, 4]], symmetric) == [2, 3]
    assert shared(many[[0, 4, 0]], symmetric) == [1, 1, 1], "only neighbours can share one"


@both_kinds
def test_tables_that_nothing_uses_take_a_byte_each(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    used = frequencies.choose(bell_counts(rng, [5000], [3.0]), symmetric)
    counts = np.zeros((7, 256), np.int64)
    counts[3] = bell_counts(np.random.default_rng(0), [5000], [3.0])[0]
    assert len(frequencies.choose(counts, symmetric)) == len(used) + 6
    assert len(frequencies.choose(np.zeros((4, 256), np.int64), symmetric)) == 5


@both_kinds
def test_the_coder_takes_the_bits_that_were_counted(symmetric: bool) -> None:
    """Streams of symbols under the chosen tables, against `coded_bits` and 16 to 32 bits a stream."""
    rng = np.random.default_rng(4)
    contexts = Contexts(rng.integers(0, 8, 40), rng.integers(0, 8, 300), 2)
    width = 2.0 ** ((contexts.rows[:, None] + contexts.cols >> 2) / 2)
    signed = np.round(rng.normal(0, width)).astype(np.int8)
    symbols = signed if symmetric else np.abs(signed).view(np.uint8)
    counts = rans.counts(np.abs(signed).view(np.uint8), contexts)
    stored = frequencies.choose(counts, symmetric)
    tables = frequencies.parse(stored, contexts.count, symmetric)
    words, lengths = rans.encode(symbols, tables, contexts, 8)
    bits = frequencies.coded_bits(counts, stored, symmetric)
    assert bits == pytest.approx(slow_bits(counts, slow_parse(stored.tolist(), symmetric), symmetric), rel=1e-9)
    assert bits + 15 * 5 < 16 * len(words) < bits * 1.001 + 33 * 5
    assert np.array_equal(rans.decode(words, lengths, tables, contexts, 8, symmetric), symbols)
