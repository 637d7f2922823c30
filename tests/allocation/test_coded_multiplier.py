"""One multiplier for a budget: against a scan over all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import coded_curve, coded_plan

from llmsqueeze import parts
from llmsqueeze.allocation.coded import Curve, allocate, at_multiplier, curves_of, least_nbytes, predicted_of_steps
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import RecipeError
from llmsqueeze.parts import Coded

PLENTY = 10**9  # tokens
SHAPES = {"q": (64, 64), "k": (16, 64), "o": (64, 64), "up": (200, 64), "down": (64, 200)}
MIDDLES = {"q": -3.0, "k": -1.5, "o": 0.25, "up": 2.0, "down": 4.0}
CURVES = {name: coded_curve(shape, MIDDLES[name]) for name, shape in SHAPES.items()}
NUMEL = sum(rows * cols for rows, cols in SHAPES.values())


def bytes_of(bits: float) -> int:
    """Of the whole plan."""
    return int(NUMEL * bits / 8)


def bits_of(plan: Plan, name: str) -> float:
    return plan.weights[name].nbytes * 8 / plan.weights[name].numel


# ------------------------------------------------------------------------------------------------------------ curves

SIMPLE = Curve(np.array([-2.0, 0.0, 1.0]), np.array([300.0, 100.0, 40.0]), np.array([1.0, 16.0, 32.0]), 800)


def test_a_curve_goes_through_its_points_and_straight_between() -> None:
    nbytes = [SIMPLE.bytes_at(at) for at in (-2.0, 0.0, 1.0, -1.0, 0.25)]
    assert nbytes == pytest.approx([300.0, 100.0, 40.0, 200.0, 85.0])


def test_costs_are_straight_between_in_their_logarithms() -> None:
    costs = [SIMPLE.cost_at(at) for at in (-2.0, 0.0, 1.0, -1.0, 0.5)]
    assert costs == pytest.approx([1.0, 16.0, 32.0, 4.0, math.sqrt(512)])


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
    curve = Curve.of(points, 77)
    assert curve.log_multiplier.tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert curve.nbytes.tolist() == [90.0, 50.0, 50.0, 40.0]
    assert curve.cost.tolist() == [1.0, 3.0, 3.0, 5.0]
    assert curve.numel == 77


def test_a_linear_that_costs_nothing_has_a_curve() -> None:
    nothing = replace(SIMPLE, cost=np.zeros(3))
    assert 0 <= nothing.cost_at(-1.0) < 1e-200
    assert nothing.cost_at(-5.0) >= 0


def test_curves_are_those_of_planned_linears_that_were_measured() -> None:
    plan = coded_plan({"a": (4, 8), "b": (2, 3)})
    points = {"a": torch.tensor([[0.0, 1.0], [9.0, 5.0], [1.0, 2.0]]), "c": torch.zeros(3, 2)}
    curves = curves_of(plan, points)
    assert list(curves) == ["a"]
    assert curves["a"].numel == 32
    assert curves["a"].nbytes.tolist() == [9.0, 5.0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (100, 70), (700, 2)])
def test_the_least_bytes_are_those_of_a_part_of_zeros(shape: tuple[int, int]) -> None:
    flat = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape[1], dtype=torch.long)
    assert least_nbytes(shape) == parts.nbytes([Coded.from_integers(torch.zeros(shape), *flat, torch.bfloat16)])


# ----------------------------------------------------------------------------------------------------- one multiplier


def test_a_multiplier_is_every_linears_step() -> None:
    allocated = at_multiplier(coded_plan(SHAPES), CURVES, -0.75, PLENTY)
    for name, weight in allocated.weights.items():
        assert weight.step == pytest.approx(2**-0.75)
        assert weight.coded_nbytes == math.ceil(CURVES[name].bytes_at(-0.75))


def test_the_users_factor_makes_a_linear_coarser_or_finer() -> None:
    factor = {"q": 2.0, "down": 0.25}
    plain = at_multiplier(coded_plan(SHAPES), CURVES, -1.0, PLENTY)
    allocated = at_multiplier(coded_plan(SHAPES, factor), CURVES, -1.0, PLENTY)
    for name, weight in allocated.weights.items():
        moved = math.log2(factor.get(name, 1.0))
        assert weight.step == pytest.approx(plain.weights[name].step * 2**moved)
        assert weight.coded_nbytes == math.ceil(CURVES[name].bytes_at(-1.0 + moved))
        assert weight.factor == factor.get(name, 1.0)


@pytest.mark.parametrize("bits", [9.0, 20.0])
def test_no_step_is_finer_than_what_a_byte_takes(bits: float) -> None:
    """A larger budget is not used up."""
    allocated = allocate(coded_plan(SHAPES, {"o": 0.5}), CURVES, bytes_of(bits), PLENTY)
    assert {name: math.log2(one.step) for name, one in allocated.weights.items()} == pytest.approx(
        {name: curve.finest for name, curve in CURVES.items()}
    )
    assert allocated.nbytes < bytes_of(8.6)


@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 3.3, 5.0])
def test_the_target_is_met_from_below(bits: float) -> None:
    allocated = allocate(coded_plan(SHAPES), CURVES, bytes_of(bits), PLENTY)
    assert 0.999 * bytes_of(bits) < allocated.nbytes <= bytes_of(bits)


@pytest.mark.parametrize("tokens", [16, 500, PLENTY])
@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0, 6.0])
def test_it_is_the_finest_multiplier_of_all_that_fit(bits: float, tokens: int) -> None:
    """Against a scan: bytes of every linear by its curve, thin calibrations and the user's factors counted."""
    factor = {"o": 0.5}
    plan = coded_plan(SHAPES, factor)
    weight = 64 / (64 + tokens)
    best = math.inf
    for at in np.linspace(-20, 12, 6401).tolist():
        own = {name: CURVES[name].bytes_at(at + math.log2(factor.get(name, 1.0))) for name in SHAPES}
        least = weight * sum(own.values()) / NUMEL
        if sum(math.ceil(max(own[n], least * CURVES[n].numel)) for n in SHAPES) <= bytes_of(bits):
            best = at
            break
    allocated = allocate(plan, CURVES, bytes_of(bits), tokens)
    free = [
        n
        for n in SHAPES
        if allocated.weights[n].coded_nbytes > 1.01 * weight * allocated.nbytes / NUMEL * CURVES[n].numel
    ]
    assert free
    for name in free:
        assert math.log2(allocated.weights[name].step / factor.get(name, 1.0)) == pytest.approx(best, abs=0.006)


def test_one_multiplier_is_the_best_use_of_the_bytes() -> None:
    """No bytes moved from one linear to another lower the predicted loss."""
    octaves = np.arange(-8, 8, 0.02).tolist()
    curves = {name: coded_curve(shape, MIDDLES[name], octaves) for name, shape in SHAPES.items()}
    allocated = allocate(coded_plan(SHAPES), curves, bytes_of(3.0), PLENTY)
    best = predicted_of_steps(allocated, curves)
    at = {name: curves[name].bytes_at(math.log2(weight.step)) for name, weight in allocated.weights.items()}
    for giver, taker in itertools.permutations(SHAPES, 2):
        for share in (0.02, 0.1, 0.2):
            nbytes = at | {giver: at[giver] * (1 - share), taker: at[taker] + at[giver] * share}
            assert sum(one.cost_at(one.at_bytes(nbytes[name])) for name, one in curves.items()) > best


def test_what_is_stored_beside_and_what_was_not_measured_is_counted() -> None:
    plan = coded_plan(SHAPES | {"other": (30, 40)})
    plan = plan.having({"q": replace(plan.weights["q"], outliers=100)})
    beside = plan.weights["q"].nbytes - plan.weights["q"].coded_nbytes
    assert beside > 300
    target = bytes_of(3.0) + plan.weights["other"].nbytes + beside
    allocated = allocate(plan, CURVES, target, PLENTY)
    assert allocated.weights["other"] == plan.weights["other"]
    assert allocated.weights["q"].outliers == 100
    assert 0.999 * target < allocated.nbytes <= target
    bare = allocate(coded_plan(SHAPES), CURVES, bytes_of(3.0), PLENTY)
    assert allocated.weights["up"].step == pytest.approx(bare.weights["up"].step, rel=1e-2)


def test_a_target_below_the_smallest_is_refused() -> None:
    least = sum(math.ceil(float(one.nbytes[-1])) for one in CURVES.values())
    allocated = allocate(coded_plan(SHAPES), CURVES, least, PLENTY)
    assert allocated.nbytes == least
    with pytest.raises(RecipeError, match=rf"{least - 1} bytes; steps and tables alone take [\d.]+, {least} bytes"):
        allocate(coded_plan(SHAPES), CURVES, least - 1, PLENTY)


def test_predicted_is_the_sum_over_the_linears() -> None:
    plan = at_multiplier(coded_plan(SHAPES, {"k": 4.0}), CURVES, -2.0, PLENTY)
    expected = sum(CURVES[n].cost_at(0.0 if n == "k" else -2.0) for n in SHAPES)
    assert predicted_of_steps(plan, CURVES) == pytest.approx(expected)
    assert predicted_of_steps(plan, {"k": CURVES["k"]}) == pytest.approx(CURVES["k"].cost_at(0.0))


# ------------------------------------------------------------------------------------------------- thin calibrations


def test_without_tokens_no_linear_gets_less_than_the_average() -> None:
    """So that all get as much, but for those that ask for more."""
    allocated = at_multiplier(coded_plan(SHAPES), CURVES, 0.0, 0)
    free = {name: CURVES[name].bytes_at(0.0) * 8 / CURVES[name].numel for name in SHAPES}
    average = sum(one.bytes_at(0.0) for one in CURVES.values()) * 8 / NUMEL
    for name in SHAPES:
        assert bits_of(allocated, name) == pytest.approx(max(free[name], average), abs=0.01)
        assert math.log2(allocated.weights[name].step) <= 1e-9, "finer than the multiplier, not coarser"
        at = math.log2(allocated.weights[name].step)
        assert math.ceil(CURVES[name].bytes_at(at)) == pytest.approx(allocated.weights[name].coded_nbytes, abs=1)


def test_the_fewer_tokens_the_nearer_the_average() -> None:
    target = bytes_of(3.0)
    least = []
    for tokens in (0, 8, 64, 640, 6400, PLENTY):
        allocated = allocate(coded_plan(SHAPES), CURVES, target, tokens)
        bits = {name: bits_of(allocated, name) for name in SHAPES}
        least.append(min(bits.values()))
        assert 0.999 * target < allocated.nbytes <= target
    assert least == sorted(least, reverse=True)
    assert least[0] > 2 > 0.75 > least[-1]


def test_a_linear_gets_a_share_of_the_average_by_its_tokens() -> None:
    """64 tokens count as much as what is believed without any."""
    allocated = at_multiplier(coded_plan(SHAPES), CURVES, 0.0, 64)
    average = sum(one.bytes_at(0.0) for one in CURVES.values()) * 8 / NUMEL
    capped = [n for n in SHAPES if CURVES[n].bytes_at(0.0) * 8 / CURVES[n].numel < average / 2]
    assert capped
    for name in SHAPES:
        if name in capped:
            assert bits_of(allocated, name) == pytest.approx(average / 2, abs=0.01)
        else:
            assert allocated.weights[name].step == pytest.approx(1.0)


def test_plenty_of_tokens_leave_the_multiplier_alone() -> None:
    for bits in (1.0, 3.0, 5.0):
        allocated = allocate(coded_plan(SHAPES), CURVES, bytes_of(bits), 10**7)
        assert len({weight.step for weight in allocated.weights.values()}) == 1
