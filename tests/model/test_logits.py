"""The product with a head: some rows of the weight at a time, into rows that do not share a place in the cache."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import nn

from llmsqueeze.model import logits
from llmsqueeze.model.logits import raw_logits, room_for_logits, slices_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_logits_are_those_of_the_head(
    dtype: torch.dtype, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """The weight is cast some rows at a time; the room has more rows than there are tokens."""
    monkeypatch.setattr(logits, "ROWS_BYTES", rows * 8 * 4)
    head, x = nn.Linear(8, 50, bias=bias, dtype=dtype), torch.randn(5, 8, generator=generator)
    room = room_for_logits(9, 50, x)
    result = raw_logits(head, x, room)
    assert result.data_ptr() == room.data_ptr()
    assert not result.requires_grad
    torch.testing.assert_close(result, head.float()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 1536, 49152, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_room_are_no_pages_apart(vocabulary: int, dtype: torch.dtype) -> None:
    room = room_for_logits(3, vocabulary, torch.empty(0, dtype=dtype))
    assert room.shape == (3, vocabulary)
    assert room.dtype == dtype
    assert room.stride(1) == 1
    assert room.stride(0) * room.itemsize % mmap.PAGESIZE
    assert vocabulary <= room.stride(0) < vocabulary + 64


def test_slices_cover_everything_once() -> None:
    for count, nbytes, limit in [(10, 4, 12), (10, 4, 1), (0, 4, 12), (9, 3, 9)]:
        slices = slices_within(count, nbytes, limit)
        assert [i for part in slices for i in range(count)[part]] == list(range(count))
        assert all((part.stop - part.start) * nbytes <= max(limit, nbytes) for part in slices)
