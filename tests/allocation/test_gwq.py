"""Outlier allocation: what each ranking prefers, ties, caps, and the budget over the whole model."""

from __future__ import annotations

import pytest
import torch

from llmsqueeze.allocation import gwq
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.parts import Grid


def ranked(
    ranking: str, weight: torch.Tensor, gradients: list[torch.Tensor], error: torch.Tensor | None = None
) -> list[int]:
    """Flat indices, best first."""
    total = None
    for gradient in gradients:
        total = gwq.accumulate(total, gradient, ranking)
    scores = gwq.score(weight, total, error, ranking, torch.Generator().manual_seed(0))
    return gwq.best(scores, weight.numel()).index.tolist()


def test_what_each_ranking_prefers() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0]])
    gradients = [torch.tensor([[3.0, 1.0, -1.0]]), torch.tensor([[-3.0, 0.0, 2.0]])]
    assert ranked("gradient", weight, gradients) == [0, 2, 1], "6, 1, 3: signs do not cancel between samples"
    assert ranked("gradient-weight", weight, gradients) == [2, 0, 1], "18 * 1, 1 * 16, 5 * 4"
    assert ranked("gradient-error", weight, gradients, torch.tensor([[0.1, 0.9, 0.1]])) == [1, 0, 2]
    assert ranked("magnitude", weight, []) == [1, 2, 0]


def test_random_is_random_and_seeded() -> None:
    scores = [
        gwq.score(torch.zeros(40, 40), None, None, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_ties_and_dead_rows_are_settled_by_position() -> None:
    scores = torch.zeros(4, 5)
    scores[2, 3] = 1
    assert gwq.best(scores, 4).index.tolist() == [13, 0, 1, 2]
    assert gwq.best(scores, 0).index.tolist() == []


def test_best_equals_a_full_sort(generator: torch.Generator) -> None:
    scores = torch.randint(0, 50, (30, 40), generator=generator).float()
    order = sorted(range(1200), key=lambda i: (-float(scores.view(-1)[i]), i))
    assert gwq.best(scores, 100).index.tolist() == order[:100]


@pytest.fixture
def plan() -> Plan:
    names = {"a": (10, 20), "b": (30, 40)}
    return Plan({n: WeightPlan(n, s, torch.float16, "rtn", (Rows(Grid(3), s[0]),)) for n, s in names.items()})


def test_global_scope_takes_the_best_of_all(plan: Plan, generator: torch.Generator) -> None:
    scores = {"a": torch.rand(10, 20, generator=generator) * 3, "b": torch.rand(30, 40, generator=generator)}
    candidates = {n: gwq.best(s, s.numel()) for n, s in scores.items()}
    made = gwq.allocate(plan, candidates, 0.05, "global")
    bar = torch.cat([s.flatten() for s in scores.values()]).topk(70).values[-1]
    assert {n: w.outliers for n, w in made.weights.items()} == {n: int((s >= bar).sum()) for n, s in scores.items()}
    mask = gwq.outlier_mask(candidates["a"], made.weights["a"].outliers, (10, 20))
    assert torch.equal(mask, scores["a"] >= bar)


def test_layer_scope_takes_its_share_of_each(plan: Plan) -> None:
    candidates = {name: gwq.best(torch.rand(weight.shape), 100) for name, weight in plan.weights.items()}
    made = gwq.allocate(plan, candidates, 0.05, "layer")
    assert {n: w.outliers for n, w in made.weights.items()} == {"a": 10, "b": 60}
    assert made.nbytes - plan.nbytes == 70 * 4 + (10 + 30) * 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_linear_that_no_sample_reached_gets_none(plan: Plan, scope: str) -> None:
    made = gwq.allocate(plan, {"a": gwq.best(torch.rand(10, 20), 100)}, 0.05, scope)
    assert made.weights["b"].outliers == 0
    assert made.weights["a"].outliers == (10 if scope == "layer" else 70)


def test_candidates_leave_room_for_what_is_asked() -> None:
    assert gwq.candidate_count(10_000, 0.01, "layer") == 200
    assert gwq.candidate_count(10_000, 0.05, "layer") == 500
    assert gwq.candidate_count(10_000, 0.01, "global") == 400
    assert gwq.candidate_count(100, 0.5, "global") == 100
