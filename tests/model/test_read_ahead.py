"""Tensors that are read while others are computed with."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.model.blockwise.read_ahead import ReadAhead


def test_what_was_started_is_read_once_by_another_thread() -> None:
    reads: list[tuple[str, int]] = []

    def read(name: str) -> Tensor:
        reads.append((name, threading.get_ident()))
        return torch.tensor(len(name))

    ahead = ReadAhead(read)
    ahead.start(["a", "bb"])
    assert [int(ahead.take(name)) for name in ("a", "bb")] == [1, 2]
    assert [name for name, _ in reads] == ["a", "bb"]
    assert threading.get_ident() not in {thread for _, thread in reads}
    assert int(ahead.take("a")) == 1
    assert reads[2] == ("a", threading.get_ident()), "taken again, it is read again"


def test_an_error_of_reading_is_raised_where_the_tensor_is_taken() -> None:
    def read(name: str) -> Tensor:
        raise CheckpointError(f"{name} is damaged")

    ahead = ReadAhead(read)
    ahead.start(["a"])
    with pytest.raises(CheckpointError, match="a is damaged"):
        ahead.take("a")


def test_a_second_start_forgets_the_first() -> None:
    values = {"a": torch.tensor(1)}
    ahead = ReadAhead(lambda name: values[name])
    ahead.start(["a"])
    ahead.start([])
    values["a"] = torch.tensor(2)
    assert int(ahead.take("a")) == 2
