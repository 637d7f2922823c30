"""The student in every architecture: opened as it was written, the same block by block, and every part of it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import ARCHITECTURES
from torch import nn

import llmsqueeze
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.distillation.student import Student, StudentBlock
from llmsqueeze.distillation.training import chunks
from llmsqueeze.formats.opened import open_folder
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.recipe.resolve import make_recipe

CPU = torch.device("cpu")
EVERYTHING = frozenset(("scales", "norms", "lowrank", "codes"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An original and its student, by round to nearest, which needs no text."""
    original, folder = random_model(request.param), tmp_path_factory.mktemp(request.param) / "student"
    recipe = make_recipe({"method": "rtn", "bits": 3, "group_size": 16, "lorc_rank": 2, "lorc": "plain"})
    quantize(str(original), recipe, folder, verify=False)
    return original, folder


@pytest.fixture(scope="module")
def student(pair: tuple[Path, Path]) -> Student:
    return Student(str(pair[1]), open_checkpoint(pair[1]), EVERYTHING, CPU, trust_remote_code=False)


@pytest.fixture(scope="module")
def model(pair: tuple[Path, Path]) -> nn.Module:
    return llmsqueeze.load(str(pair[1]), dtype=torch.float32)


def test_the_student_computes_what_the_folder_does(
    student: Student, model: nn.Module, rows: list[torch.Tensor]
) -> None:
    tokens = torch.cat(rows)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[:, :-1].flatten(0, 1).float()
        assert torch.allclose(student.logits(tokens), expected, atol=1e-4)
    with student.trained.as_stored():
        assert torch.allclose(student.logits(tokens), expected, atol=1e-4)


def test_products_in_bfloat16_are_for_training_alone(
    pair: tuple[Path, Path], student: Student, rows: list[torch.Tensor]
) -> None:
    files = open_checkpoint(pair[1])
    faster = Student(str(pair[1]), files, EVERYTHING, CPU, trust_remote_code=False, products=torch.bfloat16)
    tokens = torch.cat(rows)
    with torch.no_grad():
        assert torch.equal(faster.logits(tokens), student.logits(tokens))
    gradients = []
    for one in (student, faster):
        logits = one.logits(tokens)
        trained = [p for w in one.trained.weights.values() for p in w.parameters() if p.requires_grad]
        found = torch.autograd.grad(logits.square().mean(), trained)
        gradients.append(torch.cat([g.flatten() for g in found]))
        gradients.append(logits.detach().flatten())
    exact, exact_logits, rough, rough_logits = gradients
    assert not torch.equal(exact_logits, rough_logits), "they are multiplied in bfloat16"
    assert torch.allclose(exact_logits, rough_logits, atol=0.05 * float(exact_logits.abs().max()))
    assert float(torch.nn.functional.cosine_similarity(exact, rough, dim=0)) > 0.98


def test_everything_that_is_trained_gets_a_gradient(
    student: Student, rows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the checkpointed blocks, and equal to the gradient without checkpointing."""
    parameters = [p for group in student.trained.parameter_groups(1e-3) for p in group["params"]]
    assert len(parameters) > 6
    student.logits(rows[0]).square().mean().backward()
    gradients = [p.grad.clone() if p.grad is not None else None for p in parameters]
    # a bias behind which the loss does not change may have none; of all others nothing may be missing
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > 0.9 * len(parameters)
    for parameter in parameters:
        parameter.grad = None
    checkpointed = [module for module in student.model.modules() if "forward" in module.__dict__]
    assert checkpointed
    for module in checkpointed:
        monkeypatch.delattr(module, "forward")
    student.logits(rows[0]).square().mean().backward()
    again = [p.grad for p in parameters]
    for one, other in zip(gradients, again, strict=True):
        if one is not None and other is not None:
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7 + 1e-5 * float(other.abs().max()))


def test_blocks_one_by_one_are_the_model(
    pair: tuple[Path, Path], model: nn.Module, rows: list[torch.Tensor], tmp_path: Path
) -> None:
    original, folder = pair
    skeleton, student = build_skeleton(open_checkpoint(original)), open_folder(open_checkpoint(folder), False)
    with Spill(parent=tmp_path) as spill, torch.no_grad():
        walk = Walk(skeleton, rows, spill, torch.float32, CPU)
        hidden = walk.embed()
        for index in range(len(skeleton.blocks)):
            block = StudentBlock(skeleton, student, index, EVERYTHING, CPU)
            tensors = block.tensors()
            for name, tensor in block.overlay(block.trained.stored()).items():
                assert torch.allclose(tensor, tensors[name], atol=1e-6), name
            hidden = walk.through(index, hidden, tensors)
        with walk.head.resident():
            for i, row in enumerate(rows):
                logits = torch.cat([part for _, part in walk.head.logits(hidden.get(i, CPU))], dim=1)
                assert torch.allclose(logits, model(input_ids=row).logits[0, :-1].float(), atol=1e-4)


def test_rows_go_through_together_while_their_logits_are_small() -> None:
    rows = [torch.zeros(1, 256, dtype=torch.int64)] * 20
    assert [len(chunk) for chunk in chunks(rows, 1000)] == [8, 8, 4]
    assert [len(chunk) for chunk in chunks(rows, 130_000)] == [2] * 10
    assert [len(chunk) for chunk in chunks(rows, 10_000_000)] == [1] * 20
