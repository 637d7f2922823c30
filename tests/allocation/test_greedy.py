"""The budget allocator against trying everything: what it buys, what it leaves, and what its predictions add up to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import thorough
from torch import Tensor

from llmsqueeze.allocation import greedy, rows
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.allocation.prediction import predicted
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parts import Grid

quick = settings(max_examples=60, deadline=None, derandomize=True)

OPTIONS = [Option(Grid(bits, 32, True, True)) for bits in (2, 4, 1, 3, 8)]  # in no order: bytes decide
SHAPES = {"q": (12, 64), "k": (6, 64), "v": (6, 64), "o": (10, 96), "down": (14, 128)}
GROUPS = [("q", "k", "v"), ("o",)]


def make_plan(shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Plan:
    weights = {n: WeightPlan(n, s, torch.bfloat16, "rtn", (Rows(Grid(5), s[0]),)) for n, s in shapes.items()}
    return Plan(weights)


def falling_costs(seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES, noise: float = 0.0) -> dict[str, Tensor]:
    """[options, rows]: about 4^-bits for all rows alike, times what each row matters; `noise` lets rows differ."""
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for name, (count, _) in shapes.items():
        row = torch.rand(count, generator=generator) ** 3
        fall = torch.tensor([4.0**-option.grid.bits for option in OPTIONS])
        costs[name] = fall[:, None] * row * (1 + noise * torch.rand(len(OPTIONS), count, generator=generator))
    return costs


def sizes(plan: Plan, costs: Mapping[str, Tensor], options: Sequence[Option] = OPTIONS) -> tuple[int, int]:
    """Bytes with everything on the smallest, and on the largest option."""
    by_size = sorted(options, key=lambda option: option.grid.bits)
    plans = [plan.on({n: (Rows(o.grid, plan.weights[n].shape[0]),) for n in costs}) for o in (by_size[0], by_size[-1])]
    return plans[0].nbytes, plans[1].nbytes


def targets(plan: Plan, costs: Mapping[str, Tensor], count: int) -> list[int]:
    low, high = sizes(plan, costs)
    return [low + (high - low) * i // (count - 1) for i in range(count)]


# ----------------------------------------------------------------------------------------- against trying everything


@st.composite
def cases(draw: st.DrawFn) -> list[tuple[Tensor, Tensor]]:
    """Linears that have rows to choose for: costs [options, rows] and bytes [options], rising; costs often equal."""
    linears = []
    options = draw(st.integers(2, 4))
    for _ in range(draw(st.integers(1, 2))):
        count = draw(st.integers(1, 3))
        cost = [draw(st.lists(st.integers(0, 12), min_size=count, max_size=count)) for _ in range(options)]
        nbytes = draw(st.lists(st.integers(1, 30), min_size=options, max_size=options, unique=True).map(sorted))
        linears.append((torch.tensor(cost, dtype=torch.float64), torch.tensor(nbytes, dtype=torch.float64)))
    return linears


def all_outcomes(linears: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Bytes and cost of every choice there is."""
    per_unit = []
    for cost, nbytes in linears:
        per_unit += [list(zip(nbytes.tolist(), column, strict=True)) for column in cost.T.tolist()]
    return [(sum(b for b, _ in choice), sum(c for _, c in choice)) for choice in itertools.product(*per_unit)]


def prefixes(linears: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Bytes and cost after every step of the greedy, from its states."""
    counts = [cost.shape[1] for cost, _ in linears]
    steps = greedy.best_first([greedy.hull_upgrades(cost, nbytes) for cost, nbytes in linears], counts)
    totals = []
    for cut in range(len(steps.unit) + 1):
        state = [0] * sum(counts)
        for unit, start, to in zip(*(c[:cut].tolist() for c in (steps.unit, steps.start, steps.to)), strict=True):
            assert state[unit] == start, "the steps of a unit come in turn"
            state[unit] = to
        total_bytes = total_cost = 0.0
        for (cost, nbytes), part in zip(linears, torch.tensor(state).split(counts), strict=True):
            total_bytes += float(nbytes[part].sum())
            total_cost += float(cost.gather(0, part[None]).sum())
        totals.append((total_bytes, total_cost))
    return totals


@quick
@given(cases())
def test_every_prefix_of_the_greedy_is_optimal_for_its_own_bytes(linears: list[tuple[Tensor, Tensor]]) -> None:
    outcomes = all_outcomes(linears)
    for nbytes, cost in prefixes(linears):
        assert cost == pytest.approx(min(c for b, c in outcomes if b <= nbytes), abs=1e-9)


@quick
@given(cases())
def test_steps_sort_by_what_a_byte_buys_and_end_at_the_least_cost(linears: list[tuple[Tensor, Tensor]]) -> None:
    counts = [cost.shape[1] for cost, _ in linears]
    steps = greedy.best_first([greedy.hull_upgrades(cost, nbytes) for cost, nbytes in linears], counts)
    assert (steps.slope > 0).all()
    assert (steps.slope[1:] <= steps.slope[:-1]).all()
    assert prefixes(linears)[-1][1] == min(c for _, c in all_outcomes(linears))


@quick
@given(cases())
def test_the_bytes_of_a_step_are_those_between_its_options(linears: list[tuple[Tensor, Tensor]]) -> None:
    for cost, nbytes in linears:
        steps = greedy.hull_upgrades(cost, nbytes)
        assert torch.equal(steps.nbytes, nbytes[steps.to] - nbytes[steps.start])
        gain = cost[steps.start, steps.unit] - cost[steps.to, steps.unit]
        assert torch.allclose(steps.slope * steps.nbytes, gain)


def test_a_width_above_the_hull_is_passed_over() -> None:
    """Three bits that cost nearly as much as two are skipped on the way to four."""
    steps = greedy.hull_upgrades(torch.tensor([[8.0], [7.5], [1.0]]), torch.tensor([2.0, 3.0, 4.0]))
    assert (steps.start.tolist(), steps.to.tolist()) == ([0], [2])
    assert steps.slope.tolist() == [3.5]


def test_of_equally_large_options_the_cheaper_is_taken() -> None:
    """Half-integer levels and integer ones take the same bytes, and so do shares of outliers too small for one."""
    plan = make_plan({"w": (8, 64)})
    options = [Option(Grid(2, 32, True, True)), Option(Grid(2, 32, True), 0.001), Option(Grid(3, 32, True, True))]
    costs = {"w": torch.tensor([[3.0], [1.0], [0.9]]).expand(3, 8)}
    smallest = plan.on({"w": (Rows(options[1].grid, 8),)})
    for granularity in ("row", "linear"):
        allocated = greedy.allocate(plan, costs, options, smallest.nbytes, granularity, [])
        assert allocated.weights["w"].grid == options[1].grid


# --------------------------------------------------------------------------------------------------- on whole plans


def hull(points: list[tuple[float, float]]) -> list[int]:
    """Which (bytes, cost) lie on the lower hull, from the smallest to the cheapest: slowly, by trying all lines."""
    indices = []
    for i, (b, c) in enumerate(points):
        below = any(
            c > c0 + (c1 - c0) * (b - b0) / (b1 - b0) for (b0, c0) in points for (b1, c1) in points if b0 < b < b1
        )
        dominated = any(b0 < b and c0 <= c for b0, c0 in points)
        if not below and not dominated:
            indices.append(i)
    return sorted(indices, key=lambda i: points[i][0])


def option_cost(plan: Plan, costs: Mapping[str, Tensor], names: Sequence[str], option: int) -> tuple[int, float]:
    """Bytes and cost of some linears with all their rows on one option."""
    on = plan.on({n: (Rows(OPTIONS[option].grid, plan.weights[n].shape[0]),) for n in names})
    return sum(on.weights[n].nbytes for n in names), sum(float(costs[n][option].sum()) for n in names)


@pytest.mark.parametrize("granularity", ["linear", "group"])
def test_no_remaining_step_fits_what_is_left(granularity: str) -> None:
    plan = make_plan()
    units = [(name,) for name in SHAPES] if granularity == "linear" else [("q", "k", "v"), ("o",), ("down",)]
    for seed in range(4):
        costs = falling_costs(seed, noise=2.0)
        for target in targets(plan, costs, 23):
            allocated = greedy.allocate(plan, costs, OPTIONS, target, granularity, GROUPS)
            assert allocated.nbytes <= target
            for names in units:
                grids = {allocated.weights[n].grids[0].grid for n in names}
                assert len(grids) == 1, "what shares its input shares its grid"
                assert not any(allocated.weights[n].mixed for n in names)
                points = [option_cost(plan, costs, names, i) for i in range(len(OPTIONS))]
                ladder = hull(points)
                at = next(k for k, i in enumerate(ladder) if OPTIONS[i].grid in grids)
                for i in ladder[at + 1 : at + 2]:
                    assert allocated.nbytes + points[i][0] - points[ladder[at]][0] > target


def next_steps(plan: Plan) -> list[tuple[float, Plan]]:
    """What one row on its next width takes by itself, and the plan it makes; all rows' costs fall alike, so that each
    width is on their hulls."""
    ladder = sorted(OPTIONS, key=lambda option: option.grid.bits)
    steps = []
    for name, weight in plan.weights.items():
        for grid, count in weight.by_grid.items():
            at = next(i for i, option in enumerate(ladder) if option.grid == grid)
            if at + 1 < len(ladder):
                wider = ladder[at + 1].grid
                counts = {**weight.by_grid, grid: count - 1}
                counts[wider] = counts.get(wider, 0) + 1
                order = sorted(counts.items(), key=lambda item: -item[0].bits)
                further = plan.on({name: tuple(Rows(g, n) for g, n in order)})
                steps.append((weight.shape[1] * (wider.bits - grid.bits) / 8, further))
    return steps


@pytest.mark.thorough
def test_no_row_that_fits_is_left_behind() -> None:
    """But one whose own bytes do not fit, for all that a grid would lose its last row and its marks with it."""
    plan = make_plan()
    for seed in range(3):
        costs = falling_costs(seed)
        for target in targets(plan, costs, 41):
            allocated = greedy.allocate(plan, costs, OPTIONS, target, "row", [])
            assert allocated.nbytes <= target
            for step, further in next_steps(allocated):
                assert allocated.nbytes + step > target or further.nbytes > target


def test_rows_that_share_words_of_zeros_are_counted_as_they_are_packed() -> None:
    """Asymmetric grids pack the zeros of their rows together, so that bytes are no sum over rows: the target holds."""
    options = [Option(Grid(bits, 32, False)) for bits in (2, 3, 4, 8)]
    plan = make_plan()
    costs = {name: cost[[0, 3, 1, 4]] for name, cost in falling_costs(1).items()}
    low, high = sizes(plan, costs, options)
    for i in range(40):
        target = low + (high - low) * i // 39
        allocated = greedy.allocate(plan, costs, options, target, "row", [])
        assert target - (128 * 4 // 8 + 16) < allocated.nbytes <= target


def promised(plan: Plan, costs: dict[str, Tensor]) -> float:
    """The cost of a plan whose rows are dealt by what they cost on its grids."""
    profile = Profile(options=tuple(OPTIONS), costs=costs)
    at = [option.grid for option in OPTIONS]
    on_grids = {n: costs[n][[at.index(part.grid) for part in w.grids]] for n, w in plan.weights.items() if n in costs}
    cost = predicted(profile, plan, rows.by_cost(plan, on_grids, rows.cost_scores(profile)))
    assert cost is not None
    return cost


@pytest.mark.parametrize("granularity", ["row", thorough("linear"), thorough("group")])
def test_more_bytes_are_never_predicted_worse(granularity: str) -> None:
    plan = make_plan()
    for seed in range(2):
        costs = falling_costs(seed)
        predictions = [
            promised(greedy.allocate(plan, costs, OPTIONS, target, granularity, GROUPS), costs)
            for target in targets(plan, costs, 20)
        ]
        assert all(more <= less * (1 + 1e-9) for less, more in itertools.pairwise(predictions))
        assert predictions[-1] < predictions[0] / 1000


def test_a_finer_granularity_is_never_predicted_worse() -> None:
    """By more than the last step that did not fit: every coarser plan is one of the finer ones."""
    plan = make_plan()
    costs = falling_costs(5)
    for target in targets(plan, costs, 12)[1:-1]:
        row, linear, group = (
            promised(greedy.allocate(plan, costs, OPTIONS, target, granularity, GROUPS), costs)
            for granularity in ("row", "linear", "group")
        )
        assert row < linear <= group * 1.3


TINY = {"a": (4, 64), "b": (3, 96)}


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_dealt_as_well_as_any_that_make_the_same_counts(seed: int) -> None:
    """The plan says how many rows are on which grid; by cost they are the rows that the allocator meant, also where
    the costliest rows are not those that gain most."""
    plan, ladder = make_plan(TINY), [OPTIONS[i] for i in (2, 0, 3)]
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for name, (count, _) in TINY.items():
        row, fall = torch.rand(count, generator=generator), 1.3 + 5 * torch.rand(count, generator=generator)
        costs[name] = torch.stack([row * fall**-option.grid.bits for option in OPTIONS])
    three = {name: cost[[2, 0, 3]] for name, cost in costs.items()}
    low, high = sizes(plan, costs, ladder)
    for target in range(low, high, 5):
        allocated = greedy.allocate(plan, three, ladder, target, "row", [])
        best = 0.0
        for name, weight in allocated.weights.items():
            counts = [weight.by_grid.get(option.grid, 0) for option in ladder]
            best += min(
                sum(float(three[name][option, r]) for r, option in enumerate(choice))
                for choice in itertools.product(range(3), repeat=weight.shape[0])
                if [choice.count(i) for i in range(3)] == counts
            )
        assert promised(allocated, costs) == pytest.approx(best, rel=1e-6)


def test_a_target_below_the_smallest_plan_names_it() -> None:
    plan = make_plan()
    costs = falling_costs(0)
    low, _ = sizes(plan, costs)
    assert greedy.allocate(plan, costs, OPTIONS, low, "row", []).nbytes == low
    with pytest.raises(RecipeError, match=rf"{low - 1} bytes; the smallest plan takes .*{low} bytes, everything"):
        greedy.allocate(plan, costs, OPTIONS, low - 1, "row", [])


def test_linears_without_costs_keep_what_they_had_and_are_counted() -> None:
    plan = make_plan()
    costs = falling_costs(0)
    del costs["o"]
    low, high = sizes(plan, costs)
    allocated = greedy.allocate(plan, costs, OPTIONS, (low + high) // 2, "group", GROUPS)
    assert allocated.weights["o"] == plan.weights["o"]
    assert low < allocated.nbytes <= (low + high) // 2


def test_groups_with_skipped_members_are_what_is_left_of_them() -> None:
    plan = make_plan({name: SHAPES[name] for name in ("q", "v", "down")})
    costs = falling_costs(1, {name: SHAPES[name] for name in plan.weights})
    for target in targets(plan, costs, 9):
        allocated = greedy.allocate(plan, costs, OPTIONS, target, "group", GROUPS)
        assert allocated.weights["q"].grid == allocated.weights["v"].grid


def test_outliers_are_bought_where_they_pay() -> None:
    """Rows that only outliers make cheap get them; the count is that share of the row."""
    plan = make_plan({"w": (8, 128)})
    options = [Option(Grid(2, 32, True)), Option(Grid(2, 32, True), 0.02), Option(Grid(3, 32, True))]
    cost = torch.tensor([[9.0] * 8, [8.0, 0.5] * 4, [7.9, 7.9] * 4])
    with_outliers = plan.on({"w": (Rows(options[1].grid, 4, 3), Rows(options[0].grid, 4))})
    allocated = greedy.allocate(plan, {"w": cost}, options, with_outliers.nbytes, "row", [])
    assert allocated.weights["w"].grids == (Rows(options[1].grid, 4, 3), Rows(options[0].grid, 4))


def test_the_bytes_of_a_row_are_its_share_of_the_linear() -> None:
    weight = make_plan({"w": (7, 100)}).weights["w"]
    for option in (Option(Grid(3, 32, True)), Option(Grid(8, -1, True, True)), Option(Grid(2, 16, True), 0.05)):
        on = weight.on(Rows(option.grid, 7, option.kept(100)))
        assert greedy.row_nbytes(weight, option) * 7 == pytest.approx(on.nbytes)


# ---------------------------------------------------------------------------------------------------------- controls


def share_range(plan: Plan) -> tuple[float, float]:
    """The shares of wider rows that, rounded down, give the counts of every linear: from, and up to but without."""
    bits = sorted({rows.grid.bits for weight in plan.weights.values() for rows in weight.grids})
    assert len(bits) <= 2
    wider = [sum(r.count for r in w.grids if r.grid.bits == bits[-1] and len(bits) == 2) for w in plan.weights.values()]
    total = [weight.shape[0] for weight in plan.weights.values()]
    pairs = list(zip(wider, total, strict=True))
    return max(count / n for count, n in pairs), min((count + 1) / n for count, n in pairs)


def test_uniform_is_the_same_share_of_two_neighbouring_widths_everywhere() -> None:
    plan = make_plan()
    for target in targets(plan, falling_costs(0), 60):
        allocated = greedy.uniform(plan, OPTIONS, target)
        assert allocated.nbytes <= target
        low, high = share_range(allocated)
        assert low < high, "one share explains every linear"
        widths = sorted({rows.grid.bits for weight in allocated.weights.values() for rows in weight.grids})
        assert tuple(widths) in [(1,), (2,), (3,), (4,), (8,), (1, 2), (2, 3), (3, 4), (4, 8)]


def test_uniform_spends_what_it_has() -> None:
    """Up to the next row of the linears, all of which may get one at once."""
    plan = make_plan()
    one_row_each = sum(cols * 4 / 8 for _, cols in SHAPES.values())
    marks = 2 * 4 * len(SHAPES)
    for target in targets(plan, falling_costs(0), 30):
        assert greedy.uniform(plan, OPTIONS, target).nbytes > target - one_row_each - marks


def test_uniform_below_the_narrowest_width_is_refused() -> None:
    plan = make_plan()
    low, high = sizes(plan, falling_costs(0))
    assert greedy.uniform(plan, OPTIONS, low).nbytes == low
    assert greedy.uniform(plan, OPTIONS, high).nbytes == high
    with pytest.raises(RecipeError, match=r"every row at 1 bits it takes .*, everything counted"):
        greedy.uniform(plan, OPTIONS, low - 1)


def test_uniform_over_several_group_sizes_begins_with_the_smallest_option() -> None:
    """Large groups take fewer bytes than small ones at the same width."""
    plan = make_plan()
    options = [Option(Grid(bits, size, True, True)) for size in (32, 64) for bits in (1, 2)]
    smallest = plan.on({n: (Rows(Grid(1, 64, True, True), w.shape[0]),) for n, w in plan.weights.items()})
    assert greedy.uniform(plan, options, smallest.nbytes).nbytes == smallest.nbytes


def test_the_budget_beats_uniform_at_equal_bytes() -> None:
    plan = make_plan()
    costs = falling_costs(3)
    for target in targets(plan, costs, 9)[1:-1]:
        bought = promised(greedy.allocate(plan, costs, OPTIONS, target, "row", []), costs)
        allocated = greedy.uniform(plan, OPTIONS, target)
        profile = Profile(options=tuple(OPTIONS), costs=costs)
        random = predicted(profile, allocated, rows.by_score(allocated, rows.random_scores(allocated, 0)))
        assert random is not None
        assert bought < 0.8 * random


# ------------------------------------------------------------------------------------------------------- predictions


def test_predicted_is_the_sum_over_all_rows_one_by_one(generator: torch.Generator) -> None:
    options = (Option(Grid(4, 32, True)), Option(Grid(2, 32, True), 0.05), Option(Grid(2, 32, True)))
    plan = make_plan().on(
        {
            "q": (Rows(options[0].grid, 3), Rows(options[1].grid, 4, 3), Rows(options[2].grid, 5)),
            "o": (Rows(options[2].grid, 4), Rows(options[0].grid, 6)),
            "down": (Rows(options[2].grid, 14),),
        }
    )
    costs = {name: torch.rand(3, SHAPES[name][0], generator=generator) for name in ("q", "o", "down")}
    chosen = {
        "q": torch.tensor([2, 0, 1, 1, 2, 0, 2, 0, 1, 1, 2, 2]),
        "o": torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 1, 0]),
    }
    expected = 0.0
    for r in range(12):
        expected += float(costs["q"][(0, 1, 2)[int(chosen["q"][r])], r])
    for r in range(10):
        expected += float(costs["o"][(2, 0)[int(chosen["o"][r])], r])
    for r in range(14):
        expected += float(costs["down"][2, r])
    assert predicted(Profile(options=options, costs=costs), plan, chosen) == pytest.approx(expected, rel=1e-6)


def test_an_option_without_a_price_predicts_nothing() -> None:
    costs = falling_costs(0)
    profile = Profile(options=tuple(OPTIONS), costs=costs)
    plan = make_plan().on({name: (Rows(OPTIONS[0].grid, count),) for name, (count, _) in SHAPES.items()})
    assert predicted(profile, plan, {}) == pytest.approx(sum(float(cost[0].sum()) for cost in costs.values()))
    assert predicted(profile, plan.on({"q": (Rows(Grid(7), 12),)}), {}) is None
    assert predicted(profile, plan.on({"q": (Rows(OPTIONS[0].grid, 12, 1),)}), {}) is None, "outliers are priced apart"


def test_the_ladder_leads_from_the_smallest_plan_to_the_cheapest() -> None:
    """As `llmsqueeze plan` draws it: bytes and predicted cost of whole plans, each byte buying less than the last."""
    plan = make_plan()
    costs = falling_costs(2, noise=1.0)
    for granularity in ("row", "linear", "group"):
        ladder = greedy.ladder(plan, costs, OPTIONS, granularity, GROUPS)
        low, high = sizes(plan, costs)
        assert (ladder[0][0], ladder[-1][0]) == pytest.approx((low, high))
        assert ladder[0][1] == pytest.approx(sum(float(cost[2].sum()) for cost in costs.values()))
        assert ladder[-1][1] == pytest.approx(sum(float(cost[4].sum()) for cost in costs.values()), rel=1e-4)
        slopes = [(c0 - c1) / (b1 - b0) for (b0, c0), (b1, c1) in itertools.pairwise(ladder)]
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(slopes))
