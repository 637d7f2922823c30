"""Coded parts: integers come back, the weight is integer times step, and damage is noticed if it can be."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.coded import least_nbytes
from llmsqueeze.errors import CheckpointError, VerificationError
from llmsqueeze.parts import Coded, Integers
from llmsqueeze.parts.coded import contexts_of
from llmsqueeze.parts.coding import frequencies, rans, streams
from llmsqueeze.parts.coding.logsteps import exponents, powers
from llmsqueeze.parts.coding.streams import Streams, lengths_dtype, one_context

SHAPES = [(1, 1), (1, 300), (300, 1), (3, 700), (37, 150), (40, 2100)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def random_exponents(shape: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of rows over two and a half octaves, of columns over one, none of them 0."""
    rows = torch.randint(-90, -50, shape[:1], generator=generator)
    return rows, torch.randint(3, 20, shape[1:], generator=generator)


def random_integers(row: Tensor, col: Tensor, generator: torch.Generator, escapes: int = 3) -> Tensor:
    """int64 [rows, cols]: weights of about one size all over, and some that no byte holds."""
    width = 2 ** ((row.max() - row)[:, None] / 16 + (col.max() - col) / 16)
    values = (torch.randn(width.shape, generator=generator) * width).round().long()
    at = torch.randperm(values.numel(), generator=generator)[:escapes]
    values.view(-1)[at] = torch.tensor([2**31 - 128, -(2**24), 128, -128, 1000])[: len(at)]
    return values


def make_coded(shape: tuple[int, int], generator: torch.Generator, escapes: int = 3) -> tuple[Coded, Tensor]:
    row, col = random_exponents(shape, generator)
    values = random_integers(row, col, generator, escapes)
    return Coded.from_integers(values, row, col, torch.bfloat16), values


def power(exponent: int) -> np.float32:
    """The step 2^(exponent / 16), by Python's own numbers."""
    octave, sixteenths = divmod(exponent, 16)
    return np.float32(math.ldexp(float(np.float32(2.0 ** (sixteenths / 16))), octave))


def slow_dense(values: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Entry by entry: the integer times its column's step, times its row's; the least column step is 1."""
    dense = np.zeros(values.shape, np.float32)
    least = int(col.min())
    for r in range(values.shape[0]):
        for c in range(values.shape[1]):
            by_column = np.float32(int(values[r, c])) * power(int(col[c]) - least)
            dense[r, c] = np.float32(by_column) * power(int(row[r]) + least)
    return torch.from_numpy(dense)


# ------------------------------------------------------------------------------------------------------------- steps


def test_powers_are_sixteenths_of_octaves_to_the_last_bit() -> None:
    exponent = torch.arange(-900, 900)
    assert powers(exponent).tolist() == [float(power(e)) for e in exponent.tolist()]
    assert powers(torch.tensor([0, 16, -32, 8])).tolist() == [1.0, 2.0, 0.25, float(np.float32(math.sqrt(2)))]


def test_exponents_are_the_nearest_and_invert_powers() -> None:
    exponent = torch.arange(-120, 130)
    assert torch.equal(exponents(powers(exponent)), exponent)
    steps = torch.logspace(-4, 2, 977, dtype=torch.float64)
    off = exponents(steps, 1000) / 16 - steps.log2()
    assert off.abs().max() <= 1 / 32
    assert off.abs().max() > 0.03


def test_steps_far_above_the_least_are_made_finer() -> None:
    steps = 2.0 ** torch.tensor([0.0, 4.0, 15.9375, 16.0, 30.0])
    assert exponents(steps).tolist() == [0, 64, 255, 255, 255]
    assert exponents(steps, 64).tolist() == [0, 64, 64, 64, 64]


# -------------------------------------------------------------------------------------------------- what comes back


@every_shape
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_integers_of_any_size_come_back(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    row, col = random_exponents(shape, generator)
    values = random_integers(row, col, generator)
    decoded = Coded.from_integers(values.to(dtype), row, col, torch.float16).decoded()
    assert torch.equal(decoded.values(), values.float())
    row_exponent, col_exponent = decoded.exponents()
    assert torch.equal(row_exponent[:, None] + col_exponent, row[:, None] + col)
    assert int(col_exponent.min()) == 0
    assert decoded.dtype == torch.float16


@every_shape
def test_the_weight_is_integer_times_step_to_the_last_bit(shape: tuple[int, int], generator: torch.Generator) -> None:
    shape = shape[0], min(shape[1], 200)
    row, col = random_exponents(shape, generator)
    values = random_integers(row, col, generator, escapes=2)
    part = Coded.from_integers(values, row, col, torch.bfloat16)
    expected = slow_dense(values, row, col)
    assert torch.equal(part.dense(), expected)
    decoded = part.decoded()
    assert torch.equal(decoded.dense(), expected)
    assert torch.equal(decoded.dense(), expected), "nothing is changed by looking at it"


@every_shape
def test_a_weight_of_any_dtype_is_the_float32_one_rounded(
    shape: tuple[int, int], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are decoded at once."""
    part, values = make_coded(shape, generator)
    integers = part.decoded()
    row, col = integers.exponents()
    whole = (values.float() * powers(col)) * powers(row)[:, None]
    for cached, dtype in itertools.product((1, 700, 1 << 18), (torch.float32, torch.bfloat16, torch.float16)):
        monkeypatch.setattr("llmsqueeze.parts.integers.CACHED", cached)
        assert torch.equal(integers.dense(dtype), whole.to(dtype))
        assert torch.equal(parts.dense_as([integers], dtype), whole.to(dtype))
    assert torch.equal(parts.dense_as([part], torch.bfloat16), whole.to(torch.bfloat16))
    assert torch.equal(parts.sum_of_parts([part]), whole)


def test_integers_beyond_a_byte_are_listed() -> None:
    values = torch.tensor([[127, -127, 128, -128], [0, 2**31 - 1, -(2**31), 126]])
    part = Coded.from_integers(values, torch.tensor([5, -3]), torch.tensor([1, 0, 2, 9]), torch.float32)
    assert part.escape_index.tolist() == [2, 3, 5, 6]
    assert part.escape_value.tolist() == [128, -128, 2**31 - 1, -(2**31)]
    assert part.decoded().codes.tolist() == [[127, -127, 127, -127], [0, 127, -127, 126]]
    assert part.base.tolist() == [-3]
    assert part.row_step.tolist() == [8, 0]
    assert part.col_step.tolist() == [1, 0, 2, 9]


@pytest.mark.parametrize("lone", [127, -127, 128, -128, 129, -1000, 2**30])
def test_a_lone_integer_of_any_size_comes_back(lone: int) -> None:
    values = torch.zeros(3, 5)
    values[1, 2] = lone
    part = Coded.from_integers(values, torch.zeros(3).long(), torch.zeros(5).long(), torch.float32)
    assert torch.equal(part.dense(), values)
    assert part.escape_index.tolist() == ([7] if abs(lone) > 127 else [])


def test_integers_beyond_32_bits_are_refused() -> None:
    zero = torch.zeros(1, dtype=torch.long)
    for integer in (2.0**31, -(2.0**32)):
        with pytest.raises(VerificationError, match=r"integers from .* do not fit in 32 bits"):
            Coded.from_integers(torch.tensor([[integer]]), zero, zero, torch.float32)


def test_a_code_beyond_the_grid_is_refused() -> None:
    codes = torch.full((4, 300), 5, dtype=torch.uint8)
    encoded = Streams.smaller(codes, 10**6)
    assert encoded is not None
    assert torch.equal(encoded.symbols(4, 300, 5), codes)
    with pytest.raises(CheckpointError, match="has the code 5; the largest allowed is 3"):
        encoded.symbols(4, 300, 3)


def test_exponents_over_sixteen_octaves_are_kept() -> None:
    row, col = torch.tensor([-300, -45]), torch.tensor([500, 245, 300])
    part = Coded.from_integers(torch.ones(2, 3), row, col, torch.float32)
    assert part.row_step.tolist() == [0, 255]
    assert part.col_step.tolist() == [255, 0, 55]
    assert torch.equal(part.dense(), slow_dense(torch.ones(2, 3), row, col))


def test_small_steps_have_tables_of_their_own() -> None:
    """The table of a place is half an octave of its steps; the coarsest are first."""
    row, col = torch.tensor([0, 20, 7], dtype=torch.uint8), torch.tensor([200, 255], dtype=torch.uint8)
    contexts = contexts_of(row, col)
    slow = [[(20 - r + 255 - c) // 8 for c in (200, 255)] for r in (0, 20, 7)]
    tables = rans.counts(np.arange(6, dtype=np.uint8).reshape(3, 2), contexts).argmax(axis=0)[:6]
    assert tables.reshape(3, 2).tolist() == slow
    assert contexts.count == 10


def test_integers_that_are_all_zero_take_steps_tables_and_empty_streams(generator: torch.Generator) -> None:
    for shape in SHAPES:
        row, col = random_exponents(shape, generator)
        part = Coded.from_integers(torch.zeros(shape), row, col, torch.bfloat16)
        tables = contexts_of(part.row_step, part.col_step).count - 1
        assert parts.nbytes([part]) == least_nbytes(shape) + tables
        assert torch.equal(part.dense(), torch.zeros(shape))


def test_a_part_takes_about_its_entropy(generator: torch.Generator) -> None:
    """Of one table, for whole numbers of a normal density: no more than 3 % beside the steps."""
    values = (torch.randn(512, 400, generator=generator) * 2).round()
    none = torch.zeros(512, dtype=torch.long), torch.zeros(400, dtype=torch.long)
    part = Coded.from_integers(values, *none, torch.bfloat16)
    share = values.unique(return_counts=True)[1] / values.numel()
    entropy = float(-(share * share.log2()).sum()) * values.numel() / 8
    assert entropy < parts.nbytes([part]) - 512 - 400 < 1.03 * entropy


def test_tables_by_step_save_bits(generator: torch.Generator) -> None:
    """The same integers under steps that say how large they are, and under steps that do not."""
    row = torch.arange(64) // 16 * 24
    values = (torch.randn(64, 700, generator=generator) * 2 ** ((72 - row)[:, None] / 16)).round()
    col = torch.zeros(700, dtype=torch.long)
    by_step = Coded.from_integers(values, row, col, torch.bfloat16)
    by_none = Coded.from_integers(values, torch.zeros_like(row), col, torch.bfloat16)
    assert parts.nbytes([by_step]) < 0.97 * parts.nbytes([by_none])


# ------------------------------------------------------------------------------------------------- bytes and the file


def held_as(part: parts.Part) -> parts.Layout:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.tensors().items()}


@every_shape
@pytest.mark.parametrize("escapes", [0, 3])
def test_layout_spec_and_tensors_agree(shape: tuple[int, int], escapes: int, generator: torch.Generator) -> None:
    part, values = make_coded(shape, generator, escapes)
    for one in (part, part.decoded()):
        spec = one.spec()
        assert spec["part"] == one.kind
        assert spec["escapes"] == int((values.abs() > 127).sum())
        assert spec["dtype"] == "bfloat16"
        assert parts.layout(shape, spec) == held_as(one)
        assert parts.layout_nbytes(shape, [spec]) == parts.nbytes([one])


@every_shape
def test_both_forms_come_back_from_a_file(shape: tuple[int, int], generator: torch.Generator, tmp_path: Path) -> None:
    part, values = make_coded(shape, generator)
    for one in (part, part.decoded()):
        save_file(one.tensors(), tmp_path / "part.safetensors")
        again = parts.restore(shape, one.spec(), load_file(tmp_path / "part.safetensors"))
        assert type(again) is type(one)
        assert again.spec() == one.spec()
        assert held_as(again) == held_as(one)
        assert torch.equal(again.dense(), part.dense())
        integers = again.decoded() if isinstance(again, Coded) else again
        assert isinstance(integers, Integers)
        assert torch.equal(integers.values(), values.float())


def test_the_dtype_is_that_of_the_weight_it_stands_for(generator: torch.Generator) -> None:
    row, col = random_exponents((3, 4), generator)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        part = Coded.from_integers(torch.ones(3, 4), row, col, dtype)
        again = parts.restore((3, 4), part.spec(), part.tensors())
        assert isinstance(again, Coded)
        assert again.dtype == again.decoded().dtype == dtype


def test_lengths_are_wide_where_a_stream_may_be_long() -> None:
    """Twelve bits a symbol and two words at most; unsigned."""
    for per, cols in ((1, 1), (1, 43_000), (1, 87_378), (1, 87_379), (1, 87_380), (2, 43_689), (2, 43_690), (1, 10**6)):
        longest = per * cols * 12 // 16 + 2
        assert lengths_dtype(per, cols) == (torch.int16 if longest <= 65_535 else torch.int32)


def test_a_narrow_length_has_no_sign() -> None:
    """43 700 symbols of 12 bits: 32 777 words."""
    tables = np.array([255, 1, 0], np.uint8)
    symbols = np.ones((1, 43_700), np.uint8)
    encoded = Streams.encode(symbols, tables, one_context(1, 43_700))
    assert len(encoded.words) == 32_777
    assert encoded.lengths.dtype == torch.int16
    assert encoded.lengths.tolist() == [32_777 - 65_536]
    assert np.array_equal(encoded.decode(one_context(1, 43_700), signed=False), symbols)


def test_wide_lengths_come_back(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(streams, "lengths_dtype", lambda *_: torch.int32)
    part, values = make_coded((20, 300), generator)
    assert part.streams.lengths.dtype == torch.int32
    assert parts.layout((20, 300), part.spec()) == held_as(part)
    assert torch.equal(part.decoded().values(), values.float())


@every_shape
def test_a_stream_has_the_rows_that_the_spec_names(shape: tuple[int, int], generator: torch.Generator) -> None:
    part, _ = make_coded(shape, generator)
    per = rans.rows_per_stream(*shape)
    assert part.spec()["rows_per_stream"] == part.streams.per == per
    assert len(part.streams.lengths) == math.ceil(shape[0] / per)
    assert part.spec()["words"] == int(part.streams.lengths.long().bitwise_and(0xFFFF).sum())


# ------------------------------------------------------------------------------------------------------------ damage


def opened(part: Coded, changed: dict[str, Tensor]) -> Tensor | None:
    """What is made of a part with these tensors; None for a CheckpointError. Every other exception is a failure."""
    try:
        return parts.restore(part.shape, part.spec(), part.tensors() | changed).dense()
    except CheckpointError:
        return None


def resealed(part: Coded, changed: dict[str, Tensor]) -> Tensor | None:
    """As `opened`, with a checksum that fits, as whoever means harm would make it."""
    tensors = part.tensors() | changed
    summed = [tensor for name, tensor in tensors.items() if name != "checksum"]
    return opened(part, changed | {"checksum": streams.checksum_of(summed)})


def flipped(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """One bit is another."""
    data = tensor.numpy().tobytes()
    bit = int(rng.integers(8 * len(data)))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return torch.frombuffer(changed, dtype=tensor.dtype)


@pytest.fixture(scope="module")
def sound() -> tuple[Coded, Tensor]:
    """A part of nine short streams and seven tables with three integers beside, and its weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "MIN_STREAM", 200)
        part, _ = make_coded((36, 60), torch.Generator().manual_seed(1))
    assert len(part.streams.lengths) == 9
    assert int((part.streams.tables == 0).sum()) == 7
    return part, part.dense()


STORED = ("words", "lengths", "tables", "checksum", "base", "row_step", "col_step", "escape_index", "escape_value")


@pytest.mark.parametrize("name", STORED)
def test_a_flipped_bit_is_noticed_wherever_it_is(name: str, sound: tuple[Coded, Tensor]) -> None:
    part, dense = sound
    assert tuple(part.tensors()) == STORED
    assert torch.equal(resealed(part, {}), dense)
    rng = np.random.default_rng(2)
    for _ in range(50):
        assert opened(part, {name: flipped(part.tensors()[name], rng)}) is None


def test_the_checksum_is_the_crc_of_all_bytes_in_order(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    stored = b"".join(part.tensors()[name].numpy().tobytes() for name in STORED if name != "checksum")
    register = 2**32 - 1
    for byte in stored:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    assert part.tensors()["checksum"].tolist() == [(register ^ 2**32 - 1) - (2**32 if ~register & 2**31 else 0)]


def test_a_wrong_checksum_is_told(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    hurt = replace(part, row_step=part.row_step.flip(0).clone(), streams=replace(part.streams))
    other = replace(part, escape_value=part.escape_value + 1)
    with pytest.raises(CheckpointError):
        hurt.dense()
    with pytest.raises(
        CheckpointError, match=r"its bytes are damaged: their checksum is [0-9a-f]{8}, but [0-9a-f]{8} is"
    ):
        other.dense()


# of fifty flips under a checksum that fits, how many are noticed: only the steps say which tables places have, and only
# places have bounds; a bit of the words can change an integer into one as frequent
NOTICED = {
    "words": (48, 50),
    "lengths": (50, 50),
    "tables": (20, 50),
    "base": (0, 0),
    "row_step": (25, 49),
    "col_step": (25, 50),
    "escape_index": (25, 49),
    "escape_value": (0, 0),
}


@pytest.mark.parametrize("name", NOTICED)
def test_flipped_bits_with_a_checksum_that_fits_make_another_weight_or_none(
    name: str, sound: tuple[Coded, Tensor]
) -> None:
    part, _ = sound
    rng = np.random.default_rng(3)
    weights = [resealed(part, {name: flipped(part.tensors()[name], rng)}) for _ in range(50)]
    assert all(one is None or (one.shape == part.shape and one.dtype == torch.float32) for one in weights)
    least, most = NOTICED[name]
    assert least <= sum(one is None for one in weights) <= most


def test_escapes_outside_the_matrix_are_refused(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    for index in (-1, 36 * 60, -(2**63), 2**63 - 1):
        for at in range(3):
            hurt = part.escape_index.clone()
            hurt[at] = index
            assert resealed(part, {"escape_index": hurt}) is None
            with pytest.raises(CheckpointError, match="escaped integers have indices"):
                replace(part.decoded(), escape_index=hurt).dense()
    last = replace(part.decoded(), escape_index=torch.tensor([0, 1, 36 * 60 - 1]))
    assert float(last.values()[-1, -1]) == float(part.escape_value[2])


@pytest.mark.parametrize("kept", [0, 1, 2, 100, -1])
def test_words_that_are_cut_short_are_noticed(kept: int, sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    assert opened(part, {"words": part.streams.words[:kept]}) is None


def test_words_too_many_are_noticed(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    assert opened(part, {"words": torch.cat([part.streams.words, part.streams.words[:1]])}) is None


def test_words_and_tables_of_chance_are_noticed(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    rng = np.random.default_rng(4)
    for _ in range(20):
        words = rng.integers(-(2**15), 2**15, len(part.streams.words)).astype(np.int16)
        assert opened(part, {"words": torch.from_numpy(words)}) is None
        tables = rng.integers(0, 256, len(part.streams.tables)).astype(np.uint8)
        assert opened(part, {"tables": torch.from_numpy(tables)}) is None


def test_lengths_that_cannot_be_are_refused(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    lengths = part.streams.lengths
    for hurt in (lengths[:-1], lengths[:0], torch.cat([lengths, lengths[:1]]), lengths + 1, lengths * 0, -lengths):
        assert opened(part, {"lengths": hurt}) is None
    wide = lengths.to(torch.int32)
    assert resealed(part, {"lengths": wide}) is not None
    for one in (1, 0, -1, -(2**31), 2**31 - 1):
        hurt = wide.clone()
        hurt[3] = one
        assert resealed(part, {"lengths": hurt}) is None
        hurt[4] += wide[3] - one
        assert resealed(part, {"lengths": hurt}) is None, "though the sum is right"


def test_tables_that_are_not_those_of_the_steps_are_refused(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    tables = part.streams.tables
    cuts = (tables == 0).nonzero()[:, 0].tolist()
    none = torch.zeros(1, dtype=torch.uint8)
    for hurt, message in (
        (tables[:0], "there are 0 frequency tables; 7 are needed"),
        (tables[: cuts[-2] + 1], "there are 6 frequency tables; 7 are needed"),
        (torch.cat([tables, none]), "there are 8 frequency tables; 7 are needed"),
        (tables[:-1], "there are 6 frequency tables; 7 are needed"),
        (torch.cat([none, tables[cuts[0] + 1 :]]), "the first frequency table is empty"),
        (torch.cat([tables[:-1], torch.full((200,), 3, dtype=torch.uint8), none]), "at most 128 are allowed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace(part, streams=replace(part.streams, tables=hurt)).dense()
    swapped = torch.cat([tables[cuts[0] + 1 : cuts[1] + 1], tables[: cuts[0] + 1], tables[cuts[1] + 1 :]])
    assert opened(part, {"tables": swapped}) is None


@pytest.mark.parametrize("per", [0, -1, -4, -(2**40)])
def test_no_rows_in_a_stream_are_refused(per: int, sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    hurt = part.spec() | {"rows_per_stream": per}
    assert parts.layout(part.shape, hurt)["lengths"][0] == (36,), "a layout there has to be"
    with pytest.raises(CheckpointError, match=f"cannot hold {per} rows"):
        parts.restore(part.shape, hurt, part.tensors()).dense()


@pytest.mark.parametrize("per", [1, 2, 3, 5, 8, 35, 36, 37, 64, 1000])
def test_another_number_of_rows_in_a_stream_is_noticed(per: int, sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    assert part.streams.per == 4
    with pytest.raises(CheckpointError):
        parts.restore(part.shape, part.spec() | {"rows_per_stream": per}, part.tensors()).dense()


def test_streams_that_changed_places_are_noticed_where_their_steps_differ(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    lengths = part.streams.lengths
    words = list(part.streams.words.split(lengths.tolist()))
    for a in range(8):
        order = list(range(9))
        order[a], order[a + 1] = a + 1, a
        hurt = {"words": torch.cat([words[i] for i in order])}
        assert opened(part, hurt) is None
        assert opened(part, hurt | {"lengths": lengths[order]}) is None


def test_rows_and_their_steps_make_the_same_rows_elsewhere(sound: tuple[Coded, Tensor]) -> None:
    """Streams stand by themselves; that whole ones changed places only the checksum knows."""
    part, dense = sound
    lengths = part.streams.lengths
    words = list(part.streams.words.split(lengths.tolist()))
    order = [3, 1, 0, 2, *range(4, 9)]
    rows = torch.tensor([4 * i + j for i in order for j in range(4)])
    moved = {"words": torch.cat([words[i] for i in order]), "lengths": lengths[order], "row_step": part.row_step[rows]}
    plain = replace(part, escape_index=part.escape_index[:0], escape_value=part.escape_value[:0])
    assert opened(plain, moved) is None
    weight = resealed(plain, moved)
    assert weight is not None
    escapes = part.escape_index
    expected = dense.view(-1).index_fill(0, escapes, 0).view(36, 60)[rows]
    at = torch.tensor([[int(rows.tolist().index(int(i) // 60)), int(i) % 60] for i in escapes])
    weight[at[:, 0], at[:, 1]] = 0
    assert torch.equal(weight, expected)


def test_a_damaged_part_says_which_rows(sound: tuple[Coded, Tensor]) -> None:
    part, _ = sound
    words = part.streams.words.clone()
    words[int(part.streams.lengths[0]) + 3] ^= 8
    with pytest.raises(CheckpointError, match="the coded stream of rows 4 to 7 is damaged"):
        replace(part, streams=replace(part.streams, words=words)).decoded()


def test_tables_of_a_part_are_those_that_were_chosen(generator: torch.Generator) -> None:
    """By the counts of sizes under every step: what the coder has to know, and nothing beside."""
    part, values = make_coded((30, 200), generator)
    contexts = contexts_of(part.row_step, part.col_step)
    numbers = contexts.rows[:, None] + contexts.cols >> contexts.shift
    sizes = values.abs().clamp(max=127).numpy()
    counts = np.zeros((contexts.count, 256), np.int64)
    np.add.at(counts, (numbers, sizes), 1)
    assert part.streams.tables.tolist() == frequencies.choose(counts, True).tolist()
