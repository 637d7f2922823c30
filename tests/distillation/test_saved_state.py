"""What a run of training saves is what it continues with, or it is told to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmsqueeze.distillation.teacher import Answers
from llmsqueeze.distillation.training import TrainingState, read_state, write_state
from llmsqueeze.errors import CheckpointError
from llmsqueeze.model.tensors import shard

TENSORS = {"codes": torch.arange(24, dtype=torch.uint8).reshape(4, 6), "scale": torch.linspace(0, 1, 5)}


def flipped(path: Path, place: int) -> None:
    """One bit of a byte, counted from the end."""
    content = bytearray(path.read_bytes())
    content[-place] ^= 1
    path.write_bytes(content)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = TrainingState(step=7, before=0.5, best=0.25, best_step=5, moved=3, stopped="why")
    assert read_state(tmp_path / "state", "begin again") is None
    write_state(tmp_path / "state", state, TENSORS)
    loaded, tensors = read_state(tmp_path / "state", "begin again") or (None, {})
    assert loaded == state
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("place", [1, 10, 44])
def test_a_bit_that_changed_is_found(tmp_path: Path, place: int) -> None:
    write_state(tmp_path / "state", TrainingState(), TENSORS)
    flipped(tmp_path / "state", place)
    with pytest.raises(CheckpointError, match=r"is damaged \(.* is not what was written.*\); begin again"):
        read_state(tmp_path / "state", "begin again")


def test_a_damaged_answer_is_asked_again(tmp_path: Path) -> None:
    answers, row = Answers(tmp_path, "teacher"), torch.arange(5)[None]
    assert not answers.has(row)
    shard.write(answers.file(row), TENSORS)
    assert answers.has(row)
    flipped(answers.file(row), 3)
    assert not answers.has(row)
