"""Layer-wise widths: the order of the blocks, and which of them get the high width."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from llmsqueeze.allocation import layerwise
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan, recipe_grid
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parts import Grid
from llmsqueeze.recipe.resolve import make_recipe

HIGH, LOW = Grid(4, 16, True), Grid(2, 16, True)


def order(importance: str, lim: list[float] | None = None, zd: list[float] | None = None, seed: int = 0) -> list[int]:
    lim, zd = lim or [], zd or []
    return layerwise.order_blocks(importance, max(len(lim), len(zd)), lim, zd, seed)


def test_the_controls_look_at_nothing() -> None:
    lim, zd = [0.3, 0.1, 0.2, 0.5, 0.4], [0.5, 0.1, 0.3, 0.2, 0.4]
    assert order("lim", lim, zd) == [3, 4, 0, 2, 1]
    assert order("reverse", lim, zd) == [1, 2, 0, 4, 3], "the least important by LIM first"
    assert order("zd", lim, zd) == [1, 3, 2, 4, 0]
    assert order("first", lim, zd) == [0, 1, 2, 3, 4]
    assert order("last", lim, zd) == [4, 3, 2, 1, 0]
    assert order("both-ends", lim, zd) == [0, 4, 1, 3, 2]


def test_random_is_an_order_by_seed() -> None:
    orders = [layerwise.order_blocks("random", 12, [], [], seed) for seed in (1, 1, 2)]
    assert sorted(orders[0]) == list(range(12))
    assert orders[0] == orders[1] != orders[2]


def test_blocks_that_are_equally_important_stay_in_turn() -> None:
    for importance in ("lim", "zd", "reverse"):
        assert order(importance, [0.5] * 4, [0.5] * 4) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------ the plan

BLOCKS = [[f"b{i}.attn", f"b{i}.mlp"] for i in range(5)]


@pytest.fixture
def plan() -> Plan:
    """Five equal blocks of two linears."""
    shapes = {"attn": (32, 64), "mlp": (96, 64)}
    names = [name for block in BLOCKS for name in block]
    return Plan(
        {
            name: WeightPlan(name, shapes[name[3:]], torch.bfloat16, "rtn", (Rows(Grid(3), shapes[name[3:]][0]),))
            for name in names
        }
    )


def widths(plan: Plan) -> list[set[int]]:
    """The widths in every block."""
    return [{rows.grid.bits for name in block for rows in plan.weights[name].grids} for block in BLOCKS]


ORDER = [3, 0, 4, 1, 2]


@pytest.mark.parametrize("count", range(6))
def test_the_most_important_blocks_get_the_high_width(plan: Plan, count: int) -> None:
    """With room for exactly `count` of them, and for one byte less than the smallest linear of the next."""
    low = layerwise.allocate(plan, BLOCKS, [], HIGH, LOW, 10**9)
    step, smallest = 128 * 64 * 2 // 8, 32 * 64 * 2 // 8
    for room in (0, smallest - 1):
        allocated = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, low.nbytes + count * step + room)
        assert widths(allocated) == [{4} if i in ORDER[:count] else {2} for i in range(5)]
        assert allocated.nbytes == low.nbytes + count * step


def test_the_rest_goes_to_fusion_groups_of_the_next_blocks(plan: Plan) -> None:
    """Or to single linears, if no groups are known; the order is kept."""
    low = layerwise.allocate(plan, BLOCKS, [], HIGH, LOW, 10**9)
    step, attn, mlp = (rows * 64 * 2 // 8 for rows in (128, 32, 96))
    target = low.nbytes + step + mlp + attn - 1
    alone = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, target)
    assert widths(alone) == [{2, 4}, {2, 4}, {2}, {4}, {2, 4}], "the second most important, the third and the fourth"
    assert {name for name, weight in alone.weights.items() if weight.grid == HIGH and name[:2] != "b3"} == {
        "b0.attn",
        "b4.attn",
        "b1.attn",
    }
    groups = [("b0.mlp",), ("b0.attn",)]
    grouped = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, target, groups)
    assert grouped.weights["b0.mlp"].grid == HIGH, "the group that is called first"
    together = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, target, [tuple(names) for names in BLOCKS])
    assert widths(together) == [{2}, {2}, {2}, {4}, {2}], "a group is never split"


def test_blocks_in_the_order_of_what_the_low_width_costs_a_weight(plan: Plan) -> None:
    """Linears without a price, and those outside the plan, count nothing."""
    costs = {"b0.attn": [2.0], "b0.mlp": [1.0], "b1.attn": [5.0], "b3.mlp": [2.0, 2.5], "b4.attn": [0.1]}
    priced = {name: torch.tensor([rows]) for name, rows in costs.items()}
    assert layerwise.by_cost(plan, BLOCKS, priced) == [1, 3, 0, 4, 2]
    wide = plan.having({"b1.mlp": replace(plan.weights["b1.mlp"], shape=(960, 64))})
    assert layerwise.by_cost(wide, BLOCKS, priced) == [3, 0, 1, 4, 2], "a larger block must lose more"


@pytest.mark.parametrize("importance", ["cost", "lim", "random"])
def test_every_size_is_a_plan_with_one_more_fusion_group_on_the_high_width(plan: Plan, importance: str) -> None:
    recipe = make_recipe({"method": "layerwise", "importance": importance, "max_kl": 0.1})
    grid = recipe_grid(recipe, 2)
    costs = {
        name: torch.full((1, weight.shape[0]), float(i % 7)) for i, (name, weight) in enumerate(plan.weights.items())
    }
    profile = Profile(options=(Option(grid),), costs=costs, lim=(1.0, 3.0, 2.0, 0.0, 5.0))
    sizes = layerwise.sizes(plan, profile, recipe, BLOCKS)
    assert len(sizes) == 11
    assert sizes == sorted(set(sizes))
    high = []
    for size in sizes:
        target = int(size * plan.numel / 8)
        allocated = layerwise.layerwise(plan, profile, recipe, BLOCKS, target)
        assert allocated.nbytes == target
        high.append({name for name, weight in allocated.weights.items() if weight.grid.bits == 4})
    assert [len(names) for names in high] == list(range(11))
    assert all(before < after for before, after in itertools.pairwise(high))


def test_a_smaller_block_may_still_fit_if_a_larger_one_does_not(plan: Plan) -> None:
    blocks = [[*BLOCKS[0], *BLOCKS[1]], *BLOCKS[2:]]
    low = layerwise.allocate(plan, blocks, [], HIGH, LOW, 10**9)
    allocated = layerwise.allocate(plan, blocks, [0, 1, 2, 3], HIGH, LOW, low.nbytes + 128 * 64 * 2 // 8)
    assert widths(allocated) == [{2}, {2}, {4}, {2}, {2}]


def test_linears_that_are_skipped_stay_out(plan: Plan) -> None:
    plan = Plan({name: weight for name, weight in plan.weights.items() if name != "b3.mlp"})
    allocated = layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, 10**9)
    assert set(allocated.weights) == set(plan.weights)
    assert allocated.weights["b3.attn"].grid == HIGH


def test_a_budget_below_the_low_width_is_refused(plan: Plan) -> None:
    smallest = layerwise.allocate(plan, BLOCKS, [], HIGH, LOW, 10**9)
    assert layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, smallest.nbytes).nbytes == smallest.nbytes
    with pytest.raises(RecipeError, match=rf"{smallest.bits_per_weight:.3f}, everything counted.*--low-bits"):
        layerwise.allocate(plan, BLOCKS, ORDER, HIGH, LOW, smallest.nbytes - 1)
