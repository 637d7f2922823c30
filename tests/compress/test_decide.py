"""From recipe and profile to a decision: which rows, which blocks, within how many bytes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import coded_curve, coded_plan
from torch import Tensor

from llmsqueeze.allocation import coded, layerwise, rows
from llmsqueeze.allocation.options import request_of
from llmsqueeze.allocation.plan import base_plan
from llmsqueeze.compress.decision.decide import Decision, decide
from llmsqueeze.compress.decision.outlook import POINTS, curve
from llmsqueeze.compress.decision.target import target_nbytes
from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.model.original import Source
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.methods import METHODS
from llmsqueeze.recipe.resolve import make_recipe

HIGH, LOW = Grid(8, 128, True), Grid(4, 128, False)
MIXLLM: dict[str, Any] = {"method": "mixllm", "quantizer": "rtn"}


@pytest.fixture(scope="module")
def job(demo_of: Callable[[int], Path]) -> Job:
    return open_job(Source(str(demo_of(2))), make_recipe({"method": "rtn"}), Progress())


@pytest.fixture(scope="module")
def profile(job: Job) -> Profile:
    """Salience of all rows at 4 and at 3 bits, at random."""
    generator = torch.Generator().manual_seed(0)
    salience = {name: torch.rand(2, w.shape[0], generator=generator) for name, w in job.plan.weights.items()}
    return Profile(salience_widths=(4, 3), salience=salience)


def decided(job: Job, fixed: dict[str, Any], profile: Profile, **settings: Any) -> Decision:
    recipe = make_recipe(fixed | settings)
    job = replace(job, plan=base_plan(job.skeleton, recipe))
    target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
    return decide(job.plan, profile, recipe, job.skeleton.linears, target)


def test_only_what_ranks_by_salience_measures_it() -> None:
    assert request_of(make_recipe(MIXLLM | {"bits": 3})).salience_widths == (3,)
    assert request_of(make_recipe(MIXLLM | {"importance": "reverse"})).salience_widths == (4,)
    assert request_of(make_recipe(MIXLLM | {"importance": "random"})).salience == ()
    by_cost = request_of(make_recipe(MIXLLM | {"importance": "cost"}))
    assert by_cost.salience == ()
    assert [option.grid for option in by_cost.options] == [LOW]


def rows_on(decision: Decision, grid: Grid) -> list[tuple[str, int]]:
    """Which rows of the model are on a grid, in the order of the model."""
    rows = []
    for name, weight in decision.plan.weights.items():
        grid_of = decision.chosen[name] if weight.mixed else torch.zeros(weight.shape[0], dtype=torch.int64)
        rows += [(name, r) for r, i in enumerate(grid_of.tolist()) if weight.grids[i].grid == grid]
    return rows


def best(scores: dict[str, Tensor], count: int) -> list[tuple[str, int]]:
    """The best-scored rows of all linears together, one by one."""
    pairs = [(-float(s), i, name, r) for i, (name, v) in enumerate(scores.items()) for r, s in enumerate(v)]
    return [(name, r) for _, _, name, r in sorted(pairs)[:count]]


def test_the_papers_setting_is_8_bits_symmetric_for_a_tenth_and_4_asymmetric_for_the_rest(
    job: Job, profile: Profile
) -> None:
    decision = decided(job, MIXLLM, profile)
    grids = {rows.grid for weight in decision.plan.weights.values() for rows in weight.grids}
    assert grids == {HIGH, LOW}
    total = sum(weight.shape[0] for weight in decision.plan.weights.values())
    high = rows_on(decision, HIGH)
    assert len(high) == int(0.1 * total)
    assert sorted(high) == sorted(best(rows.salience_scores(profile, 4), len(high)))


def test_the_rows_chosen_are_as_many_as_the_plan_counts(job: Job, profile: Profile) -> None:
    decision = decided(job, MIXLLM, profile, mix="8:0.05,6:0.2", bits=3)
    assert any(weight.mixed for weight in decision.plan.weights.values())
    for name, weight in decision.plan.weights.items():
        if weight.mixed:
            counts = torch.bincount(decision.chosen[name], minlength=len(weight.grids)).tolist()
            assert counts == [rows.count for rows in weight.grids]


def test_a_mix_of_three_widths_ranks_at_the_lowest(job: Job, profile: Profile) -> None:
    """6 and 4 bits are asymmetric as the low rows are; the salience is that of rounding to 3 bits."""
    decision = decided(job, MIXLLM, profile, mix="6:0.1,4:0.6", bits=3)
    total = sum(weight.shape[0] for weight in decision.plan.weights.values())
    ranked = best(rows.salience_scores(profile, 3), total)
    for bits, expected in (
        (6, ranked[: int(0.1 * total)]),
        (4, ranked[int(0.1 * total) : int(0.7 * total)]),
        (3, ranked[int(0.7 * total) :]),
    ):
        assert sorted(rows_on(decision, Grid(bits, 128, False))) == sorted(expected)


def test_the_controls_take_as_many_rows_but_others(job: Job, profile: Profile) -> None:
    counts = len(rows_on(decided(job, MIXLLM, profile), HIGH))
    worst = best({name: -score for name, score in rows.salience_scores(profile, 4).items()}, counts)
    reverse = rows_on(decided(job, MIXLLM, profile, importance="reverse"), HIGH)
    assert sorted(reverse) == sorted(worst)
    one, same, other = (
        rows_on(decided(job, MIXLLM, profile, importance="random", seed=seed), HIGH) for seed in (1, 1, 2)
    )
    assert len(one) == counts
    assert one == same != other


def test_fractional_bits_are_the_budget_with_everything_counted(job: Job, profile: Profile) -> None:
    decision = decided(job, MIXLLM, profile, bits=4.5)
    assert 4.5 - 8 * 400 / decision.plan.numel < decision.plan.bits_per_weight <= 4.5, "within one row"
    high = rows_on(decision, HIGH)
    assert sorted(high) == sorted(best(rows.salience_scores(profile, 4), len(high)))


@pytest.mark.parametrize("importance", METHODS["layerwise"].importance)
def test_every_order_spends_the_same_budget(importance: str, job: Job) -> None:
    """Its blocks are equal: `--bits 3.2` is room for one of the two and a little, with everything counted."""
    settings = {"method": "layerwise", "importance": importance, "bits": 3.2, "quantizer": "rtn"}
    recipe = make_recipe(settings)
    request = request_of(recipe)
    assert (request.lim, request.zd) == (importance in ("lim", "reverse"), importance == "zd")
    assert bool(request.options) == (importance == "cost")
    blocks = job.skeleton.linears
    costs = {name: torch.full((1, job.skeleton.shape(name)[0]), float(i)) for i in (0, 1) for name in blocks[i]}
    measured = {"lim": (-0.9, -0.2), "zd": (0.2, 0.1), "groups": tuple(tuple(names) for names in blocks)}
    profile = Profile(**measured, options=request.options, costs=costs if request.options else {})
    plan = decided(job, settings, profile).plan
    given = profile.lim, profile.zd, recipe.seed
    order = [1, 0] if importance == "cost" else layerwise.order_blocks(importance, 2, *given)
    for index, names in enumerate(job.skeleton.linears):
        assert {plan.weights[name].grid.bits for name in names} == {4 if index == order[0] else 2}
    assert plan.bits_per_weight <= 3.2


SIZED: dict[str, dict[str, Any]] = {
    "budget": {"method": "budget", "importance": "uniform"},
    "budget with 3 bits at least": {"method": "budget", "importance": "uniform", "widths": "3,4"},
    "layerwise": {"method": "layerwise", "importance": "first"},
    "mixllm": {"method": "mixllm", "importance": "random"},
}


@pytest.mark.parametrize("name", SIZED)
def test_a_size_that_is_too_small_names_the_smallest_possible_one(name: str, job: Job) -> None:
    """To the byte, embeddings and all other weights included."""

    def settings(size: int) -> dict[str, Any]:
        return SIZED[name] | {"size": size, "quantizer": "rtn"}

    with pytest.raises(RecipeError, match="60000 bytes is too small") as caught:
        decided(job, settings(60_000), Profile())
    smallest = int(re.findall(r"all weights (\d+) bytes", str(caught.value))[0])
    plan = decided(job, settings(smallest), Profile()).plan
    assert plan.nbytes == smallest - job.kept_nbytes
    with pytest.raises(RecipeError, match="is too small"):
        decided(job, settings(smallest - 1), Profile())
    with pytest.raises(RecipeError, match=rf"original's {job.checkpoint.nbytes}: there is nothing to do"):
        decided(job, settings(job.checkpoint.nbytes), Profile())


def test_the_curve_of_coded_weights_goes_through_the_plans_of_every_budget() -> None:
    """Point by point the slow way: the multiplier for a point's size is found from its size alone."""
    shapes = {"q": (64, 64), "up": (200, 64), "down": (64, 200)}
    plan = coded_plan(shapes)
    made = {name: coded_curve(shape, middle) for (name, shape), middle in zip(shapes.items(), (-3, 0, 2), strict=True)}
    points = {name: torch.from_numpy(np.stack([c.log_multiplier, c.nbytes, c.cost])) for name, c in made.items()}
    profile = Profile(curves=points, labels=10**9)
    found = curve(plan, make_recipe({"method": "coded", "bits": 3.0}), profile)
    curves = coded.curves_of(plan, points)
    assert len(found) == POINTS
    least, most = (
        coded.at_multiplier(plan, curves, end, profile.labels).bits_per_weight for end in (coded.FINEST, coded.COARSEST)
    )
    assert [found[0][0], found[-1][0]] == pytest.approx([max(least, 0.5), min(most, 10.0)], abs=2e-3)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found))
    for bits, predicted in found[:: POINTS // 20]:
        sized = coded.allocate(plan, curves, round(bits * plan.numel / 8), profile.labels)
        assert coded.predicted_of_steps(sized, curves) == pytest.approx(predicted, rel=2e-3)
