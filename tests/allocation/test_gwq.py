"""GWQ's outliers: the top share per matrix, or over the whole model."""

from __future__ import annotations

import pytest
import torch

from llmsqueeze.allocation import gwq
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.measure.outliers import best
from llmsqueeze.parts import Grid


@pytest.fixture
def plan() -> Plan:
    names = {"a": (10, 20), "b": (30, 40)}
    return Plan({n: WeightPlan(n, s, torch.float16, "rtn", (Rows(Grid(3), s[0]),)) for n, s in names.items()})


def test_global_scope_takes_the_best_of_all(plan: Plan, generator: torch.Generator) -> None:
    scores = {"a": torch.rand(10, 20, generator=generator) * 3, "b": torch.rand(30, 40, generator=generator)}
    candidates = {n: best(s, s.numel()) for n, s in scores.items()}
    allocated = gwq.allocate(plan, candidates, 0.05, "global")
    bar = torch.cat([s.flatten() for s in scores.values()]).topk(70).values[-1]
    assert {n: w.outliers for n, w in allocated.weights.items()} == {
        n: int((s >= bar).sum()) for n, s in scores.items()
    }
    mask = candidates["a"].mask(allocated.weights["a"].outliers, (10, 20))
    assert torch.equal(mask, scores["a"] >= bar)


def test_layer_scope_takes_its_share_of_each(plan: Plan) -> None:
    candidates = {name: best(torch.rand(weight.shape), 100) for name, weight in plan.weights.items()}
    allocated = gwq.allocate(plan, candidates, 0.05, "layer")
    assert {n: w.outliers for n, w in allocated.weights.items()} == {"a": 10, "b": 60}
    assert allocated.nbytes - plan.nbytes == 70 * 4 + (10 + 30) * 2


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_linear_that_no_sample_reached_gets_none(plan: Plan, scope: str) -> None:
    allocated = gwq.allocate(plan, {"a": best(torch.rand(10, 20), 100)}, 0.05, scope)
    assert allocated.weights["b"].outliers == 0
    assert allocated.weights["a"].outliers == (10 if scope == "layer" else 70)
