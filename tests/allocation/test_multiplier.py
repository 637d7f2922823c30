"""One multiplier for a budget: against a scan over all of them, and runs whose bytes are not as predicted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsqueeze import parts
from llmsqueeze.allocation import multiplier
from llmsqueeze.allocation.multiplier import Curve, Pace, allocate, at_multiplier, curves_of, least_nbytes, predicted
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import OCTAVES
from llmsqueeze.parts import Coded

quick = settings(max_examples=40, deadline=None, derandomize=True)
PLENTY = 10**9  # tokens


def curve(shape: tuple[int, int], middle: float, octaves: Sequence[float] = OCTAVES) -> Curve:
    """Bits come to none at the binary logarithm `middle`, and steps and tables take the rest; a byte anywhere buys the
    square of the multiplier, whose 24th a weight costs where steps are fine."""
    numel = shape[0] * shape[1]
    at = middle + np.array(octaves)
    bits = 0.5 * np.log2(1 + 4.0 ** (middle - at))
    cost = numel / 24 * 4.0**middle * np.log1p(4.0 ** (at - middle))
    return Curve(at, bits * numel / 8 + sum(shape) + 20, cost, numel)


def make_plan(shapes: Mapping[str, tuple[int, int]], factor: Mapping[str, float] | None = None) -> Plan:
    weights = {}
    for name, shape in shapes.items():
        expected = shape[0] * shape[1] * 7 // 8
        made = WeightPlan(name, shape, torch.bfloat16, "coded", coded_nbytes=expected)
        weights[name] = replace(made, factor=(factor or {}).get(name, 1.0))
    return Plan(weights)


SHAPES = {"q": (64, 64), "k": (16, 64), "o": (64, 64), "up": (200, 64), "down": (64, 200)}
MIDDLES = {"q": -3.0, "k": -1.5, "o": 0.25, "up": 2.0, "down": 4.0}
CURVES = {name: curve(shape, MIDDLES[name]) for name, shape in SHAPES.items()}
NUMEL = sum(rows * cols for rows, cols in SHAPES.values())


def bytes_of(bits: float) -> int:
    """Of the whole plan."""
    return int(NUMEL * bits / 8)


def bits_of(plan: Plan, name: str) -> float:
    return plan.weights[name].nbytes * 8 / plan.weights[name].numel


# ------------------------------------------------------------------------------------------------------------ curves

SIMPLE = Curve(np.array([-2.0, 0.0, 1.0]), np.array([300.0, 100.0, 40.0]), np.array([1.0, 16.0, 32.0]), 800)


def test_a_curve_goes_through_its_points_and_straight_between() -> None:
    found = [SIMPLE.bytes_at(at) for at in (-2.0, 0.0, 1.0, -1.0, 0.25)]
    assert found == pytest.approx([300.0, 100.0, 40.0, 200.0, 85.0])


def test_costs_are_straight_between_in_their_logarithms() -> None:
    found = [SIMPLE.cost_at(at) for at in (-2.0, 0.0, 1.0, -1.0, 0.5)]
    assert found == pytest.approx([1.0, 16.0, 32.0, 4.0, math.sqrt(512)])


def test_finer_than_measured_a_bit_an_octave_is_added_and_the_loss_quartered() -> None:
    assert SIMPLE.bytes_at(-3.0) == pytest.approx(300 + 100)
    assert SIMPLE.bytes_at(-4.5) == pytest.approx(300 + 250)
    assert SIMPLE.cost_at(-3.0) == pytest.approx(0.25)
    assert SIMPLE.cost_at(-4.0) == pytest.approx(1 / 16)


def test_coarser_than_measured_nothing_changes() -> None:
    assert SIMPLE.bytes_at(9.0) == pytest.approx(40)
    assert SIMPLE.cost_at(9.0) == pytest.approx(32)


def test_the_multiplier_of_so_many_bytes_inverts_the_bytes_of_a_multiplier() -> None:
    for one in (SIMPLE, *CURVES.values()):
        for at in np.linspace(one.log_multiplier[0] - 5, one.log_multiplier[-1], 57).tolist():
            assert one.at_bytes(one.bytes_at(at)) == pytest.approx(at, abs=1e-6)
    assert SIMPLE.at_bytes(10.0) == 1.0, "nothing is coarser than the coarsest"


def test_of_multipliers_with_the_same_bytes_the_coarsest_counts() -> None:
    flat = Curve(np.array([-2.0, -1.0, 0.0, 1.0, 2.0]), np.array([300.0, 100.0, 100.0, 100.0, 40.0]), np.ones(5), 800)
    assert flat.at_bytes(100) == 1.0
    assert flat.at_bytes(200) == -1.5
    assert flat.at_bytes(70) == 1.5
    assert flat.at_bytes(40) == flat.at_bytes(10) == 2.0
    assert flat.at_bytes(400) == -3.0, "a bit an octave beyond the finest"


def test_what_was_measured_is_made_to_fall_and_rise() -> None:
    points = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [90.0, 50.0, 60.0, 40.0], [1.0, 3.0, 2.0, 5.0]])
    found = Curve.of(points, 77)
    assert found.log_multiplier.tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert found.nbytes.tolist() == [90.0, 50.0, 50.0, 40.0]
    assert found.cost.tolist() == [1.0, 3.0, 3.0, 5.0]
    assert found.numel == 77


def test_a_linear_that_costs_nothing_has_a_curve() -> None:
    nothing = replace(SIMPLE, cost=np.zeros(3))
    assert 0 <= nothing.cost_at(-1.0) < 1e-200
    assert nothing.cost_at(-5.0) >= 0


def test_curves_are_those_of_planned_linears_that_were_measured() -> None:
    plan = make_plan({"a": (4, 8), "b": (2, 3)})
    points = {"a": torch.tensor([[0.0, 1.0], [9.0, 5.0], [1.0, 2.0]]), "c": torch.zeros(3, 2)}
    found = curves_of(plan, points)
    assert list(found) == ["a"]
    assert found["a"].numel == 32
    assert found["a"].nbytes.tolist() == [9.0, 5.0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (100, 70), (700, 2)])
def test_the_least_bytes_are_those_of_a_part_of_zeros(shape: tuple[int, int]) -> None:
    flat = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape[1], dtype=torch.long)
    assert least_nbytes(shape) == parts.nbytes([Coded.from_integers(torch.zeros(shape), *flat, torch.bfloat16)])


# ----------------------------------------------------------------------------------------------------- one multiplier


def test_a_multiplier_is_every_linears_step() -> None:
    found = at_multiplier(make_plan(SHAPES), CURVES, -0.75, PLENTY)
    for name, weight in found.weights.items():
        assert weight.step == pytest.approx(2**-0.75)
        assert weight.coded_nbytes == math.ceil(CURVES[name].bytes_at(-0.75))


def test_the_users_factor_makes_a_linear_coarser_or_finer() -> None:
    factor = {"q": 2.0, "down": 0.25}
    plain = at_multiplier(make_plan(SHAPES), CURVES, -1.0, PLENTY)
    found = at_multiplier(make_plan(SHAPES, factor), CURVES, -1.0, PLENTY)
    for name, weight in found.weights.items():
        moved = math.log2(factor.get(name, 1.0))
        assert weight.step == pytest.approx(plain.weights[name].step * 2**moved)
        assert weight.coded_nbytes == math.ceil(CURVES[name].bytes_at(-1.0 + moved))
        assert weight.factor == factor.get(name, 1.0)


@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 3.3, 5.0, 9.0, 20.0])
def test_the_target_is_met_from_below(bits: float) -> None:
    found = allocate(make_plan(SHAPES), CURVES, bytes_of(bits), PLENTY)
    assert 0.999 * bytes_of(bits) < found.nbytes <= bytes_of(bits)


@pytest.mark.parametrize("tokens", [16, 500, PLENTY])
@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0, 6.0])
def test_it_is_the_finest_multiplier_of_all_that_fit(bits: float, tokens: int) -> None:
    """Against a scan: bytes of every linear by its curve, thin calibrations and the user's factors counted."""
    factor = {"o": 0.5}
    plan = make_plan(SHAPES, factor)
    weight = 64 / (64 + tokens)
    best = math.inf
    for at in np.linspace(-20, 12, 6401).tolist():
        own = {name: CURVES[name].bytes_at(at + math.log2(factor.get(name, 1.0))) for name in SHAPES}
        least = weight * sum(own.values()) / NUMEL
        if sum(math.ceil(max(own[n], least * CURVES[n].numel)) for n in SHAPES) <= bytes_of(bits):
            best = at
            break
    found = allocate(plan, CURVES, bytes_of(bits), tokens)
    free = [n for n in SHAPES if found.weights[n].coded_nbytes > 1.01 * weight * found.nbytes / NUMEL * CURVES[n].numel]
    assert free
    for name in free:
        assert math.log2(found.weights[name].step / factor.get(name, 1.0)) == pytest.approx(best, abs=0.006)


def test_one_multiplier_is_the_best_use_of_the_bytes() -> None:
    """No bytes moved from one linear to another lower the predicted loss."""
    octaves = np.arange(-8, 8, 0.02).tolist()
    curves = {name: curve(shape, MIDDLES[name], octaves) for name, shape in SHAPES.items()}
    found = allocate(make_plan(SHAPES), curves, bytes_of(3.0), PLENTY)
    best = predicted(found, curves)
    at = {name: curves[name].bytes_at(math.log2(weight.step)) for name, weight in found.weights.items()}
    for giver, taker in itertools.permutations(SHAPES, 2):
        for share in (0.02, 0.1, 0.2):
            nbytes = at | {giver: at[giver] * (1 - share), taker: at[taker] + at[giver] * share}
            assert sum(one.cost_at(one.at_bytes(nbytes[name])) for name, one in curves.items()) > best


def test_what_is_stored_beside_and_what_was_not_measured_is_counted() -> None:
    plan = make_plan(SHAPES | {"other": (30, 40)})
    plan.weights["q"] = replace(plan.weights["q"], outliers=100)
    beside = plan.weights["q"].nbytes - plan.weights["q"].coded_nbytes
    assert beside > 300
    target = bytes_of(3.0) + plan.weights["other"].nbytes + beside
    found = allocate(plan, CURVES, target, PLENTY)
    assert found.weights["other"] == plan.weights["other"]
    assert found.weights["q"].outliers == 100
    assert 0.999 * target < found.nbytes <= target
    bare = allocate(make_plan(SHAPES), CURVES, bytes_of(3.0), PLENTY)
    assert found.weights["up"].step == pytest.approx(bare.weights["up"].step, rel=1e-2)


def test_a_target_below_the_smallest_is_refused() -> None:
    least = sum(math.ceil(float(one.nbytes[-1])) for one in CURVES.values())
    found = allocate(make_plan(SHAPES), CURVES, least, PLENTY)
    assert found.nbytes == least
    with pytest.raises(RecipeError, match=rf"{least - 1} bytes; steps and tables alone take [\d.]+, {least} bytes"):
        allocate(make_plan(SHAPES), CURVES, least - 1, PLENTY)


def test_predicted_is_the_sum_over_the_linears() -> None:
    plan = at_multiplier(make_plan(SHAPES, {"k": 4.0}), CURVES, -2.0, PLENTY)
    expected = sum(CURVES[n].cost_at(0.0 if n == "k" else -2.0) for n in SHAPES)
    assert predicted(plan, CURVES) == pytest.approx(expected)
    assert predicted(plan, {"k": CURVES["k"]}) == pytest.approx(CURVES["k"].cost_at(0.0))


# ------------------------------------------------------------------------------------------------- thin calibrations


def test_without_tokens_no_linear_gets_less_than_the_average() -> None:
    """So that all get as much, but for those that ask for more."""
    found = at_multiplier(make_plan(SHAPES), CURVES, 0.0, 0)
    free = {name: CURVES[name].bytes_at(0.0) * 8 / CURVES[name].numel for name in SHAPES}
    average = sum(one.bytes_at(0.0) for one in CURVES.values()) * 8 / NUMEL
    for name in SHAPES:
        assert bits_of(found, name) == pytest.approx(max(free[name], average), abs=0.01)
        assert math.log2(found.weights[name].step) <= 1e-9, "finer than the multiplier, not coarser"
        at = math.log2(found.weights[name].step)
        assert math.ceil(CURVES[name].bytes_at(at)) == pytest.approx(found.weights[name].coded_nbytes, abs=1)


def test_the_fewer_tokens_the_nearer_the_average() -> None:
    target = bytes_of(3.0)
    least = []
    for tokens in (0, 8, 64, 640, 6400, PLENTY):
        found = allocate(make_plan(SHAPES), CURVES, target, tokens)
        bits = {name: bits_of(found, name) for name in SHAPES}
        least.append(min(bits.values()))
        assert 0.999 * target < found.nbytes <= target
    assert least == sorted(least, reverse=True)
    assert least[0] > 2 > 0.75 > least[-1]


def test_a_linear_gets_a_share_of_the_average_by_its_tokens() -> None:
    """64 tokens count as much as what is believed without any."""
    found = at_multiplier(make_plan(SHAPES), CURVES, 0.0, 64)
    average = sum(one.bytes_at(0.0) for one in CURVES.values()) * 8 / NUMEL
    capped = [n for n in SHAPES if CURVES[n].bytes_at(0.0) * 8 / CURVES[n].numel < average / 2]
    assert capped
    for name in SHAPES:
        if name in capped:
            assert bits_of(found, name) == pytest.approx(average / 2, abs=0.01)
        else:
            assert found.weights[name].step == pytest.approx(1.0)


def test_plenty_of_tokens_leave_the_multiplier_alone() -> None:
    for bits in (1.0, 3.0, 5.0):
        found = allocate(make_plan(SHAPES), CURVES, bytes_of(bits), 10**7)
        assert len({weight.step for weight in found.weights.values()}) == 1


# -------------------------------------------------------------------------------------------------------------- pace

Sizes = dict[str, int]


class Run:
    """A run over fusion groups whose sizes are not quite as predicted."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, tuple[int, int]]],
        error: Callable[[str, float], float],
        bits: float = 3.0,
        seed: int = 0,
    ) -> None:
        """`error`: of a linear at so many octaves, what its size is of the predicted one."""
        shapes = {name: shape for group in groups for name, shape in group.items()}
        rng = np.random.default_rng(seed)
        self.groups = [list(group) for group in groups]
        self.curves = {name: curve(shape, float(rng.uniform(-2, 2))) for name, shape in shapes.items()}
        numel = sum(one.numel for one in self.curves.values())
        self.target, self.error = int(numel * bits / 8), error
        self.plan = allocate(make_plan(shapes), self.curves, self.target, PLENTY)
        self.pace = Pace(self.plan, self.curves, self.target)
        self.tried: list[tuple[str, float]] = []

    def sizes(self, names: Sequence[str], octaves: float) -> Sizes:
        found = {}
        for name in names:
            weight = self.plan.weights[name]
            own = self.curves[name].bytes_at(math.log2(weight.step) + octaves) * self.error(name, octaves)
            found[name] = round(own) + weight.nbytes - weight.coded_nbytes
        return found

    def settle(self, names: Sequence[str]) -> tuple[float, Sizes]:
        def attempt(octaves: float) -> tuple[float, Sizes]:
            self.tried.append((names[0], octaves))
            return octaves, self.sizes(names, octaves)

        return self.pace.settle(names, attempt, lambda made: made[1])

    def total(self) -> int:
        return sum(sum(self.settle(names)[1].values()) for names in self.groups)


def blocks(count: int, seed: int) -> list[dict[str, tuple[int, int]]]:
    """So many fusion groups of one to three linears, of sizes that differ threefold; the last is a large one."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        linears = int(rng.integers(1, 4))
        cols = 1200 if i == count - 1 else int(rng.integers(400, 1200))
        made.append({f"{i}.{j}": (1000 // linears, cols) for j in range(linears)})
    return made


def off_by(share: float) -> Callable[[str, float], float]:
    return lambda _name, _octaves: 1 + share


def off_by_chance(seed: int, share: float) -> Callable[[str, float], float]:
    """Every linear by its own, and a little by every attempt."""

    def error(name: str, octaves: float) -> float:
        own = np.random.default_rng([seed, *map(ord, name)]).uniform(-share, share)
        jitter = np.random.default_rng([seed, int(abs(octaves) * 1e6)]).uniform(-0.001, 0.001)
        return float(1 + own + jitter)

    return error


GROUPS = (2, 3, 5, 10, 30)


@pytest.mark.parametrize("count", GROUPS)
@pytest.mark.parametrize("share", [-0.1, -0.03, 0.0, 0.03, 0.1])
def test_a_run_that_is_off_everywhere_ends_just_under_its_budget(share: float, count: int) -> None:
    run = Run(blocks(count, 3), off_by(share))
    assert 0.995 * run.target <= run.total() <= run.target
    assert len(run.tried) <= count + multiplier.TRIES


@quick
@given(st.integers(0, 2**20), st.integers(2, 30), st.sampled_from([0.02, 0.05, 0.1]), st.sampled_from([1.5, 3.0, 5.0]))
def test_a_run_that_is_off_by_chance_ends_just_under_its_budget(
    seed: int, count: int, share: float, bits: float
) -> None:
    run = Run(blocks(count, seed), off_by_chance(seed, share), bits, seed)
    assert 0.995 * run.target <= run.total() <= run.target


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_run_that_is_as_predicted_keeps_to_its_plan(count: int) -> None:
    """But for the last group, which aims a little below."""
    run = Run(blocks(count, 1), off_by(0.0))
    run.total()
    assert all(abs(octaves) < 1e-3 for _, octaves in run.tried[:count])
    assert run.tried[count:] == [], "what fits is not made again"


@pytest.mark.parametrize("share", [-0.1, 0.1])
def test_a_run_that_is_off_learns_by_how_much(share: float) -> None:
    """The steps of all that is left make up for what was written, more and more as it shows."""
    run = Run(blocks(30, 5), off_by(share))
    run.total()
    moved = [octaves * math.copysign(1, share) for _, octaves in run.tried[:30]]
    assert moved[0] == pytest.approx(0, abs=1e-3)
    assert 0 < moved[1] < moved[5] < moved[15]
    assert max(moved[:29]) < 0.8, "10 % is a third of a bit at 3 bits; the last bear what was learnt late"


@pytest.mark.parametrize("share", [-0.1, 0.1])
def test_a_lasting_surprise_is_taken_for_what_it_is(share: float) -> None:
    """What was made with steps that make up for it is compared with what such steps should have taken."""
    run = Run(blocks(30, 5), off_by(share))
    for names in run.groups[:-1]:
        run.settle(names)
    spent = sum(run.pace.spent.values())
    assert spent == pytest.approx((1 + share) * run.pace.expected, rel=0.01)


def test_every_group_is_made_once_but_the_last() -> None:
    run = Run(blocks(12, 2), off_by(0.07))
    run.total()
    names = [name for name, _ in run.tried]
    assert [names.count(group[0]) for group in run.groups[:-1]] == [1] * 11
    assert 1 < names.count(run.groups[-1][0]) <= multiplier.TRIES + 1


def test_half_a_surprise_is_believed_when_a_tenth_is_written() -> None:
    """Against a scan: all that is left, at the sizes that the surprise makes likely, takes what is left."""
    groups = [{f"{i}.{j}": (300, 500) for j in range(2)} for i in range(10)]
    run = Run(groups, lambda name, _octaves: 1.2 if name.startswith("0.") else 1.0)
    expected = sum(run.plan.weights[name].nbytes for name in groups[0])
    spent = sum(run.settle(run.groups[0])[1].values())
    assert spent == pytest.approx(1.2 * expected, rel=1e-3)
    tenth = 0.1 * run.plan.nbytes
    ratio = (spent + tenth) / (expected + tenth)
    assert 1.08 < ratio < 1.12
    left = [name for group in run.groups[1:] for name in group]

    def likely(octaves: float) -> float:
        return ratio * sum(run.curves[n].bytes_at(math.log2(run.plan.weights[n].step) + octaves) for n in left)

    best = next(o for o in np.arange(0, 3, 0.001).tolist() if likely(o) <= run.target - spent)
    assert run.pace.shift(run.groups[1]) == pytest.approx(best, abs=0.003)


def test_what_is_not_coded_by_steps_takes_what_was_planned() -> None:
    """Linears that were not measured, and what is stored beside the others."""
    run = Run(blocks(4, 6), off_by(0.0))
    plain = run.pace.shift(run.groups[0])
    fixed = WeightPlan("fixed", (100, 100), torch.bfloat16, "coded", coded_nbytes=8750)
    weights = dict(run.plan.weights) | {"fixed": fixed}
    first = run.groups[0][0]
    weights[first] = replace(weights[first], outliers=500)
    beside = weights[first].nbytes - run.plan.weights[first].nbytes
    assert beside > 0
    roomy = Pace(Plan(weights), run.curves, run.target + 8750 + beside)
    assert roomy.shift(run.groups[0]) == pytest.approx(plain, abs=1e-6)
    tight = Pace(Plan(weights), run.curves, run.target)
    assert tight.shift(run.groups[0]) > plain + 0.001


def test_a_last_group_that_does_not_fit_is_refused() -> None:
    run = Run(blocks(3, 7), off_by(0.0))
    names = run.groups[-1]
    for group in run.groups[:-1]:
        run.settle(group)
    room = run.target - sum(run.pace.spent.values())
    tried = []

    def attempt(octaves: float) -> Sizes:
        tried.append(octaves)
        return {names[0]: room + 1, **dict.fromkeys(names[1:], 0)}

    with pytest.raises(RecipeError, match=rf"before {names[0]} leaves {room} bytes of the budget, in which it does"):
        run.pace.settle(names, attempt, lambda made: made)
    assert len(tried) <= multiplier.TRIES + 1
    assert max(tried) <= 4


def test_a_last_group_that_cannot_grow_is_taken_as_it_is() -> None:
    """Finer and finer steps are tried, down to so many octaves."""
    run = Run(blocks(3, 7), off_by(0.0))
    names = run.groups[-1]
    for group in run.groups[:-1]:
        run.settle(group)
    tried = []

    def attempt(octaves: float) -> Sizes:
        tried.append(octaves)
        return dict.fromkeys(names, 1)

    assert run.pace.settle(names, attempt, lambda made: made) == dict.fromkeys(names, 1)
    assert min(tried) == -multiplier.MOST_OCTAVES
    assert len(tried) < multiplier.TRIES


@pytest.mark.parametrize("slope", [0.4, 3.0, 5.0])
def test_sizes_that_do_not_fall_by_a_bit_an_octave_are_closed_in_on(slope: float) -> None:
    run = Run([{"w": (300, 500)}], off_by(0.0))

    def attempt(octaves: float) -> Sizes:
        return {"w": round(1.2 * run.target - slope * 150_000 / 8 * octaves)}

    assert 0.995 * run.target <= run.pace.settle(["w"], attempt, lambda made: made)["w"] <= run.target


@pytest.mark.parametrize("slope", [0.08, 0.3])
def test_sizes_that_hardly_fall_are_closed_in_on_too(slope: float) -> None:
    """Below a bit a weight an octave is worth a small part of one."""
    run = Run([{"w": (300, 500)}], off_by(0.0))

    def attempt(octaves: float) -> Sizes:
        return {"w": round(1.02 * run.target - slope * 150_000 / 8 * (2 - 2 * 0.8**octaves))}

    assert 0.995 * run.target <= run.pace.settle(["w"], attempt, lambda made: made)["w"] <= run.target


def test_the_last_group_alone_is_fitted_from_far_away() -> None:
    """A single group whose sizes are half or twice what was predicted."""
    for share in (-0.5, 0.5, 0.9):
        run = Run(blocks(1, 8), off_by(share))
        assert 0.995 * run.target <= run.total() <= run.target


def test_groups_of_which_nothing_is_planned_do_no_harm() -> None:
    """Linears that were skipped: the last one planned ends the run."""
    run = Run(blocks(3, 9), off_by(0.05))
    for group in run.groups:
        run.settle(group)
    spent = dict(run.pace.spent)
    assert set(spent) == set(run.plan.weights)
    assert 0.995 * run.target <= sum(spent.values()) <= run.target
