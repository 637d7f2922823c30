"""MixLLM: which rows of the model get the high width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.allocation import mixllm
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.errors import RecipeError
from llmsqueeze.parts import Grid

HIGH, LOW = Grid(8, 128, True), Grid(4, 128, False)
SHAPES = {"a": (30, 256), "b": (50, 128), "c": (20, 384)}


@pytest.fixture
def plan() -> Plan:
    weights = {n: WeightPlan(n, s, torch.bfloat16, "rtn", (Rows(Grid(3), s[0]),)) for n, s in SHAPES.items()}
    return Plan(weights)


@pytest.fixture
def scores(generator: torch.Generator) -> dict[str, Tensor]:
    """Those of "c" are twice as high as the others': it should get twice its share, not all."""
    base = {name: torch.rand(rows, generator=generator) for name, (rows, _) in SHAPES.items()}
    return base | {"c": base["c"] * 2}


def best(scores: dict[str, Tensor], count: int) -> list[tuple[str, int]]:
    """The best-scored rows of all linears together, one by one."""
    pairs = [(-float(s), i, name, r) for i, (name, v) in enumerate(scores.items()) for r, s in enumerate(v)]
    return [(name, r) for _, _, name, r in sorted(pairs)[:count]]


def on(plan: Plan, grid: Grid) -> dict[str, int]:
    """How many rows of every linear are on a grid."""
    return {name: weight.by_grid.get(grid, 0) for name, weight in plan.weights.items()}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.155, 0.29, 1.0])
def test_the_best_rows_of_the_whole_model_get_the_high_width(
    share: float, plan: Plan, scores: dict[str, Tensor]
) -> None:
    """Exactly the share of all rows, rounded down, wherever they are."""
    allocated = mixllm.allocate(plan, scores, [(HIGH, share)], LOW)
    count = {0.0: 0, 0.1: 10, 0.155: 15, 0.29: 29, 1.0: 100}[share]
    owners = [name for name, _ in best(scores, count)]
    assert on(allocated, HIGH) == {name: owners.count(name) for name in SHAPES}
    assert on(allocated, LOW) == {name: SHAPES[name][0] - owners.count(name) for name in SHAPES}


def test_several_widths_take_their_share_in_turn(plan: Plan, scores: dict[str, Tensor]) -> None:
    """6 bits for the best 10 %, 4 for the next 55.5 %, 3 for the rest: ends, not shares, are rounded down."""
    grids = [Grid(6, 128, False), Grid(4, 128, False), Grid(3, 128, False)]
    allocated = mixllm.allocate(plan, scores, [(grids[0], 0.1), (grids[1], 0.555)], grids[2])
    ranked = [name for name, _ in best(scores, 100)]
    for grid, owners in zip(grids, (ranked[:10], ranked[10:65], ranked[65:]), strict=True):
        assert on(allocated, grid) == {name: owners.count(name) for name in SHAPES}
    assert [rows.grid for rows in allocated.weights["c"].grids] == grids, "the best-ranked rows first"


def test_of_equal_rows_the_first_are_taken(plan: Plan) -> None:
    allocated = mixllm.allocate(plan, {n: torch.zeros(r) for n, (r, _) in SHAPES.items()}, [(HIGH, 0.4)], LOW)
    assert on(allocated, HIGH) == {"a": 30, "b": 10, "c": 0}


def test_a_linear_that_no_sample_reached_stays_low(plan: Plan, scores: dict[str, Tensor]) -> None:
    del scores["b"]
    allocated = mixllm.allocate(plan, scores, [(HIGH, 0.5)], LOW)
    assert on(allocated, HIGH)["b"] == 0
    assert sum(on(allocated, HIGH).values()) == 25, "half of the rows that have a score"


def by_share(plan: Plan, scores: dict[str, Tensor], rows: int) -> Plan:
    return mixllm.allocate(plan, scores, [(HIGH, rows / 100)], LOW)


def test_a_byte_budget_buys_as_many_rows_as_fit(plan: Plan, scores: dict[str, Tensor]) -> None:
    for rows in (0, 1, 17, 60, 99, 100):
        for target in (by_share(plan, scores, rows).nbytes, by_share(plan, scores, rows).nbytes + 20):
            allocated = mixllm.allocate_bytes(plan, scores, HIGH, LOW, target)
            taken = sum(on(allocated, HIGH).values())
            assert allocated.nbytes <= target
            assert allocated.weights == by_share(plan, scores, taken).weights, "the best-ranked ones"
            if taken < 100:
                assert by_share(plan, scores, taken + 1).nbytes > target


def test_a_byte_budget_below_the_low_width_is_refused(plan: Plan, scores: dict[str, Tensor]) -> None:
    smallest = by_share(plan, scores, 0)
    assert mixllm.allocate_bytes(plan, scores, HIGH, LOW, smallest.nbytes).nbytes == smallest.nbytes
    with pytest.raises(RecipeError, match=rf"at 4 bits it takes {smallest.bits_per_weight:.3f}.*--low-bits"):
        mixllm.allocate_bytes(plan, scores, HIGH, LOW, smallest.nbytes - 1)
