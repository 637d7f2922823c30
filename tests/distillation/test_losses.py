"""The losses of distillation against their formulas, one token and one outcome at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmsqueeze.distillation.losses import (
    Predictions,
    cross_entropies,
    distillation_loss,
    least_cross_entropies,
    token_weights,
)


def distributions(generator: torch.Generator, tokens: int = 9, vocabulary: int = 13) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's logits."""
    logits = torch.randn(2, tokens, vocabulary, generator=generator) * 2
    return logits[0], logits[1]


def kept(logits: Tensor, k: int) -> Predictions:
    """The `k` largest of a distribution, one token and one outcome at a time."""
    index, log_p, log_rest, entropy = [], [], [], []
    for row in logits.double().log_softmax(dim=1):
        order = sorted(range(len(row)), key=lambda v, row=row: -float(row[v]))
        index.append(order[:k])
        log_p.append([float(row[v]) for v in order[:k]])
        rest = math.fsum(math.exp(row[v]) for v in order[k:])
        log_rest.append(math.log(rest) if rest else -math.inf)
        entropy.append(-math.fsum(math.exp(lp) * lp for lp in row.tolist()))
    return Predictions(torch.tensor(index), torch.tensor(log_p), torch.tensor(log_rest), torch.tensor(entropy))


def merged(logits: Tensor, index: Tensor) -> list[list[float]]:
    """Probabilities of the outcomes in `index` and, where there are others, of all of those together."""
    outcomes = []
    for row, chosen in zip(logits.double().softmax(dim=1).tolist(), index.tolist(), strict=True):
        others = [p for v, p in enumerate(row) if v not in chosen]
        outcomes.append([row[v] for v in chosen] + ([math.fsum(others)] if others else []))
    return outcomes


def slow_cross_entropies(p: list[list[float]], q: list[list[float]]) -> Tensor:
    rows = zip(p, q, strict=True)
    return torch.tensor([-math.fsum(a * math.log(b) for a, b in zip(*row, strict=True)) for row in rows])


@pytest.mark.parametrize("k", [1, 4, 12, 13])
def test_token_losses_are_the_cross_entropy_with_the_other_outcomes_merged(k: int, generator: torch.Generator) -> None:
    of_teacher, of_student = distributions(generator)
    teacher_ = kept(of_teacher, k)
    expected = slow_cross_entropies(merged(of_teacher, teacher_.index), merged(of_student, teacher_.index))
    assert torch.allclose(cross_entropies(of_student, teacher_), expected, atol=1e-5)
    if k == 13:
        full = -(of_teacher.softmax(1) * of_student.log_softmax(1)).sum(1)
        assert torch.allclose(cross_entropies(of_student, teacher_), full, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 13])
def test_the_least_loss_is_the_teachers_own_and_the_rest_is_a_divergence(k: int, generator: torch.Generator) -> None:
    of_teacher, of_student = distributions(generator)
    teacher_ = kept(of_teacher, k)
    own = of_teacher.clone().requires_grad_(True)
    least = least_cross_entropies(teacher_)
    assert torch.allclose(cross_entropies(own, teacher_), least, atol=1e-5)
    cross_entropies(own, teacher_).sum().backward()
    assert own.grad is not None
    assert own.grad.abs().max() < 1e-5, "a minimum"
    p, q = merged(of_teacher, teacher_.index), merged(of_student, teacher_.index)
    divergence = cross_entropies(of_student, teacher_) - least
    assert torch.allclose(divergence, slow_cross_entropies(p, q) - slow_cross_entropies(p, p), atol=1e-5)
    assert (divergence > 0).all()
    full = (of_teacher.softmax(1) * (of_teacher.log_softmax(1) - of_student.log_softmax(1))).sum(1)
    assert (divergence <= full + 1e-5).all(), "a lower bound"


@pytest.mark.parametrize(("weight", "gamma"), [(0.0, 1.0), (3.0, 0.0), (0.0, 0.0)])
def test_without_weight_or_gamma_it_is_plain_distillation_exactly(
    weight: float, gamma: float, generator: torch.Generator
) -> None:
    of_teacher, of_student = distributions(generator)
    teacher_ = kept(of_teacher, 5)
    plain = cross_entropies(of_student, teacher_).mean()
    assert torch.equal(distillation_loss(of_student, teacher_, weight, gamma), plain)
    assert torch.equal(distillation_loss(of_student, teacher_), plain)
    assert not torch.isclose(distillation_loss(of_student, teacher_, 3.0, 1.0), plain, rtol=1e-4)


def test_ambiguous_tokens_weigh_more() -> None:
    certain, open_ = torch.zeros(13), torch.zeros(13)
    certain[2] = 30.0
    logits = torch.stack([certain, open_])
    weights = token_weights(logits, kept(logits, 5), weight=4.0, gamma=2.0)
    assert weights.tolist() == pytest.approx([1.0, 5.0], abs=1e-4), "Hn is 0 and 1"


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_weights_are_the_formulas_and_carry_no_gradient(gamma: float, generator: torch.Generator) -> None:
    of_teacher, of_student = distributions(generator)
    teacher_ = kept(of_teacher, 5)
    of_student.requires_grad_(True)
    rows = list(zip(merged(of_teacher, torch.arange(13).expand(9, 13)), of_student.softmax(1).tolist(), strict=True))
    entropies = [[-math.fsum(p * math.log(p) for p in one) / math.log(13) for one in pair] for pair in rows]
    expected = torch.tensor([1 + 2.0 * math.sqrt(hp * hq) ** gamma for hp, hq in entropies])
    weights = token_weights(of_student, teacher_, 2.0, gamma)
    assert torch.allclose(weights, expected, atol=1e-5)
    assert not weights.requires_grad
    fixed = (cross_entropies(of_student, teacher_) * (expected / expected.mean())).mean()
    loss = distillation_loss(of_student, teacher_, 2.0, gamma)
    assert torch.allclose(loss, fixed, atol=1e-5)
    gradient, expected_gradient = (torch.autograd.grad(one, of_student)[0] for one in (loss, fixed))
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)
