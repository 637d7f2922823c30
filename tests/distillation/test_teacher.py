"""The teacher's answers: those of the original model, kept once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsqueeze.distillation import teacher
from llmsqueeze.distillation.teacher import ask
from llmsqueeze.model.blockwise import head
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import Skeleton, build_skeleton
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")
VOCABULARY = 626  # of the demo


@pytest.fixture
def skeleton(demo_of: Callable[[int], Path]) -> Skeleton:
    return build_skeleton(open_checkpoint(demo_of(1)), False)


@pytest.fixture(scope="module")
def model(demo_of: Callable[[int], Path]) -> Any:
    """The same by transformers."""
    return AutoModelForCausalLM.from_pretrained(demo_of(1), dtype=torch.float32).eval()


@pytest.fixture
def samples() -> list[Tensor]:
    make = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (1, 20), generator=make) for _ in range(3)]


@pytest.mark.parametrize(("k", "at_once"), [(1, VOCABULARY), (7, 100), (50, 20), (VOCABULARY, 100), (1000, VOCABULARY)])
def test_answers_are_the_models(
    k: int,
    at_once: int,
    skeleton: Skeleton,
    samples: list[Tensor],
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the vocabulary comes in slices, smaller and larger than k."""
    monkeypatch.setattr(head, "LOGITS_BYTES", at_once * 19 * 4)
    answers = ask(skeleton, samples, tmp_path / "cache", k, CPU, Progress())
    for row in samples:
        predictions = answers.read([row], CPU)
        with torch.no_grad():
            log_p = model(row).logits[0, :-1].double().log_softmax(dim=1)
        width = min(k, VOCABULARY)
        assert predictions.index.shape == predictions.log_p.shape == (19, width)
        assert torch.allclose(predictions.log_p.double(), log_p.topk(width, dim=1).values, atol=2e-5)
        assert torch.allclose(log_p.gather(1, predictions.index.long()), predictions.log_p.double(), atol=2e-5), (
            "of these tokens"
        )
        assert all(len(set(chosen)) == width for chosen in predictions.index.tolist())
        assert torch.allclose(predictions.entropy.double(), -(log_p.exp() * log_p).sum(1), atol=1e-3)
        mass = 1 - log_p.exp().topk(width, dim=1).values.sum(1)
        assert torch.allclose(predictions.log_rest.double().exp(), mass.clamp(min=0), atol=3e-5)


def test_nothing_is_left_if_all_is_kept(skeleton: Skeleton, samples: list[Tensor], tmp_path: Path) -> None:
    answers = ask(skeleton, samples, tmp_path, VOCABULARY, CPU, Progress())
    for row in samples:
        predictions = answers.read([row], CPU)
        assert (predictions.log_rest == -math.inf).all()


def test_answers_that_exist_are_not_made_again(
    skeleton: Skeleton, samples: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ask(skeleton, samples, tmp_path, 9, CPU, Progress())
    files = [answers.file(row) for row in samples]
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing else is left"
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files}
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "Walk", None)  # cannot be called
        assert ask(skeleton, samples, tmp_path, 9, CPU, Progress()) == answers
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino, file.read_bytes()) for file in files}
    files[1].rename(files[1].with_suffix(".half"))  # as a run leaves it that is killed while it writes
    files[1].with_suffix(".half").write_bytes(b"cut sho")
    walked = []
    whole = teacher.Walk
    monkeypatch.setattr(teacher, "Walk", lambda s, rows, *rest: walked.append(list(rows)) or whole(s, rows, *rest))
    ask(skeleton, samples, tmp_path, 9, CPU, Progress())
    assert len(walked) == 1
    assert [torch.equal(row, samples[1]) for row in walked[0]] == [True], "only the missing one"
    assert all(file.read_bytes() == before[file][2] for file in files)
    assert files[0].stat().st_ino == before[files[0]][1]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert ask(skeleton, samples[:1], tmp_path, 8, CPU, Progress()).key != answers.key
