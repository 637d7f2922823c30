"""Losses, divergences and changed tokens: the compiled loops and the torch form against float64, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmsqueeze.evaluation.losses.divergence import Divergence, by_torch, divergence, token_losses
from llmsqueeze.evaluation.losses.logit_loops import TILE

FORMS = {"compiled": divergence, "torch": by_torch}


def slow(q: Tensor, p: Tensor, labels: Tensor) -> Divergence:
    """By the formulas, in float64."""
    rows = []
    for a, b, label in zip(q.double(), p.double(), labels.tolist(), strict=True):
        log_q, log_p = a - a.exp().sum().log(), b - b.exp().sum().log()
        kl = sum(math.exp(x) * (x - y) for x, y in zip(log_p.tolist(), log_q.tolist(), strict=True))
        rows.append(
            (-float(log_q[label]), -float(log_p[label]), kl, a.tolist().index(a.max()) != b.tolist().index(b.max()))
        )
    model, baseline, kls, changed = zip(*rows, strict=True)
    return Divergence(
        *(torch.tensor(one, dtype=torch.float64) for one in (model, baseline, kls)), torch.tensor(changed)
    )


def same(one: Divergence, other: Divergence) -> None:
    for name in ("model", "baseline", "kl"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=2e-5)
    assert torch.equal(one.changed, other.changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, TILE - 1, TILE, TILE + 1, 3 * TILE + 77])
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_divergences_are_those_of_float64(
    form: str, vocabulary: int, spread: float, generator: torch.Generator
) -> None:
    p = torch.randn(9, vocabulary, generator=generator) * spread
    q = p + torch.randn(9, vocabulary, generator=generator) * spread * 0.2
    labels = torch.randint(vocabulary, (9,), generator=generator)
    expected = slow(q, p, labels)
    same(FORMS[form](q, p, labels), expected)
    torch.testing.assert_close(token_losses(q, labels), expected.model, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_against_itself_has_no_divergence(form: str, generator: torch.Generator) -> None:
    p = torch.randn(70, 2000, generator=generator) * 5
    result = FORMS[form](p, p.clone(), torch.zeros(70, dtype=torch.long))
    assert (result.kl == 0).all()
    assert torch.equal(result.model, result.baseline)
    assert not result.changed.any()


@pytest.mark.parametrize("form", FORMS)
def test_of_equal_logits_the_first_is_the_most_likely(form: str) -> None:
    """In the same tile and in others; bfloat16 has many equal ones."""
    p, q = torch.zeros(3, 3 * TILE), torch.zeros(3, 3 * TILE)
    p[:, 5] = 1.0
    q[0, [5, 9]] = 1.0
    q[1, [5, TILE + 2, TILE + 5]] = 1.0
    q[2, [TILE + 2, 2 * TILE + 1]] = 1.0
    assert FORMS[form](q, p, torch.zeros(3, dtype=torch.long)).changed.tolist() == [False, False, True]
    assert FORMS[form](q[2:], q[2:].roll(0), torch.zeros(1, dtype=torch.long)).changed.tolist() == [False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [0, 7, TILE + 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_not_hidden(form: str, at: int, bad: float) -> None:
    q, p = torch.randn(2, 2 * TILE), torch.randn(2, 2 * TILE)
    q[1, at] = bad
    labels = torch.tensor([0, 1])
    result = FORMS[form](q, p, labels)
    assert result.model.isfinite().tolist() == token_losses(q, labels).isfinite().tolist() == [True, False]
    assert result.kl.isfinite().tolist() == [True, False]
    assert result.baseline.isfinite().all()


def test_a_token_that_is_ruled_out_costs_nothing() -> None:
    """A logit of minus infinity for a token that the baseline has, too, as a probability of nearly zero."""
    q, labels = torch.randn(4, 100), torch.arange(4)
    p = q.clone()
    p[:, 50] = -torch.inf
    result = divergence(p, p, labels)
    torch.testing.assert_close(
        result.model, torch.nn.functional.cross_entropy(p.double(), labels, reduction="none"), rtol=1e-5, atol=1e-5
    )
    assert not result.changed.any()


def test_the_rows_of_logits_may_lie_apart(generator: torch.Generator) -> None:
    memory = torch.randn(2, 20, 340, generator=generator)
    (q, p), labels = memory[:, :, :300], torch.arange(20)
    result, expected = divergence(q, p, labels), divergence(q.contiguous(), p.contiguous(), labels)
    assert all(torch.equal(getattr(result, name), getattr(expected, name)) for name in vars(expected))
    assert torch.equal(token_losses(q, labels), expected.model)
    assert torch.equal(token_losses(q.T.contiguous().T, labels), expected.model)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, generator: torch.Generator) -> None:
    q, p = torch.randn(2, 200, 300, generator=generator)
    labels = torch.arange(200)
    before = torch.get_num_threads()
    expected = divergence(q, p, labels)
    torch.set_num_threads(threads)
    try:
        result = divergence(q, p, labels)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(getattr(result, name), getattr(expected, name)) for name in vars(expected))


def test_half_precision_is_computed_in_float32(generator: torch.Generator) -> None:
    q, p = (torch.randn(20, 300, generator=generator).bfloat16() for _ in range(2))
    labels = torch.arange(20)
    same(divergence(q, p, labels), divergence(q.float(), p.float(), labels))
    assert token_losses(q, labels).dtype == torch.float64
