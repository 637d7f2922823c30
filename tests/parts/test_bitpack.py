"""Packing: golden words, the slow twin with Python's big integers, and the round trip for any shape and width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsqueeze.parts import bitpack


def slow_pack(row: list[int], bits: int) -> list[int]:
    """One row as one big integer, cut into 32-bit words."""
    whole = sum(code << (i * bits) for i, code in enumerate(row))
    return [(whole >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]


# one row of codes 0, 1, 2, ... modulo 2**bits, 32 of them: exactly `bits` words
GOLDEN = {
    1: [0xAAAAAAAA],
    2: [0xE4E4E4E4, 0xE4E4E4E4],
    3: [0x88FAC688, 0xC688FAC6, 0xFAC688FA],
    4: [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98],
    8: [0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C, 0x13121110, 0x17161514, 0x1B1A1918, 0x1F1E1D1C],
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits: int) -> None:
    codes = (torch.arange(32) % 2**bits)[None].to(torch.uint8)
    packed = bitpack.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == GOLDEN[bits]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 8), st.integers(1, 5), st.integers(1, 140))
def test_equals_the_slow_twin_and_comes_back(data: st.DataObject, bits: int, rows: int, cols: int) -> None:
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = bitpack.pack(codes, bits)
    expected = [slow_pack(row, bits) for row in codes.tolist()]
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == expected
    assert packed.shape[1] == bitpack.words(cols, bits)
    assert torch.equal(bitpack.unpack(packed, bits, cols), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_use_every_bit(bits: int) -> None:
    codes = torch.full((2, 64), 2**bits - 1, dtype=torch.uint8)
    assert bitpack.pack(codes, bits).tolist() == [[-1] * (2 * bits)] * 2
