"""MixLLM: the salience of a row against ordinary backward passes, and which rows of the model get the high width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsqueeze.allocation import mixllm
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.compress.decide import Decision, decide, target_nbytes, wanted_by
from llmsqueeze.compress.job import Job, prepare
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import rounding_error
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.sweeps import Wanted, measure
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.original import Source
from llmsqueeze.model.walk import Walk
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.bundled import make_recipe
from llmsqueeze.recipe.recipe import Recipe

CPU = torch.device("cpu")
HIGH, LOW = Grid(8, 128, True), Grid(4, 128, False)
MIXLLM: dict[str, Any] = {"method": "mixllm", "quantizer": "rtn"}


def demo_job(**settings: Any) -> tuple[Job, Recipe]:
    recipe = make_recipe(MIXLLM | settings)
    return prepare(Source("demo"), recipe, Progress(), text=False), recipe


def test_salience_is_what_rounding_a_row_costs_to_second_order(generator: torch.Generator) -> None:
    """|s + s^2 / 2| with s the change of the loss to first order, row by row and weight by weight."""
    gradient, error = (torch.randn(5, 7, generator=generator) for _ in range(2))
    for r, found in enumerate(mixllm.sample_salience(gradient, error).tolist()):
        s = sum(float(gradient[r, j]) * float(error[r, j]) for j in range(7))
        assert found == pytest.approx(abs(s + s * s / 2), rel=1e-5)


# -------------------------------------------------------------------------------------------------- on the demo


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [torch.randint(5, 300, (1, 30 + s), generator=torch.Generator().manual_seed(s)) for s in range(4)]


@pytest.fixture(scope="module")
def profile(tokens: list[Tensor]) -> Profile:
    """Salience of the demo's rows at 4 and at 3 bits, measured in float64."""
    job, recipe = demo_job()
    with Spill() as spill:
        walk = Walk(job.skeleton, tokens, spill, torch.float64, CPU)
        return measure(walk, walk.embed(), job.plan, recipe, Wanted(salience=(4, 3)), Progress())


@pytest.fixture(scope="module")
def gradients(demo_dir: Path, tokens: list[Tensor]) -> list[dict[str, Tensor]]:
    """Per sample and linear the gradient of the mean loss, by transformers and one backward pass each."""
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float64).eval()
    names = demo_job()[0].plan.weights
    found = []
    for row in tokens:
        model.zero_grad()
        logits = model(input_ids=row, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]).backward()
        found.append({name: model.get_submodule(name).weight.grad.clone() for name in names})
    return found


def slow_salience(folder: Path, gradients: list[dict[str, Tensor]], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean over the samples, from rounding errors held in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    result = {}
    for name in gradients[0]:
        weight = model.get_submodule(name).weight.detach()
        error = rounding_error(weight, Grid(bits, 128, False), torch.bfloat16).to(dtype).double()
        s = torch.stack([(sample[name] * error).sum(dim=1) for sample in gradients])
        result[name] = (s + s.square() / 2).abs().mean(dim=0)
    return result


@pytest.mark.parametrize(("at", "bits"), [(0, 4), (1, 3)], ids=["4 bits", "3 bits"])
def test_measured_salience_is_that_of_ordinary_backward_passes(
    at: int, bits: int, profile: Profile, demo_dir: Path, gradients: list[dict[str, Tensor]]
) -> None:
    expected = slow_salience(demo_dir, gradients, bits, torch.bfloat16)
    assert profile.salience.keys() == expected.keys()
    assert len(expected) == 28
    for name, value in expected.items():
        assert torch.allclose(profile.salience[name][at].double(), value, rtol=1e-5, atol=1e-10), name


def test_holding_rounding_errors_in_bfloat16_hardly_matters(
    profile: Profile, demo_dir: Path, gradients: list[dict[str, Tensor]]
) -> None:
    for name, value in slow_salience(demo_dir, gradients, 4, torch.float64).items():
        assert (profile.salience[name][0].double() - value).norm() < 1e-2 * value.norm(), name


def test_the_rounding_error_is_to_nearest_on_the_range_of_each_group(generator: torch.Generator) -> None:
    """Entry by entry, as the paper's stand-in for what the quantizer will leave."""
    weight = torch.randn(3, 40, generator=generator)
    error = rounding_error(weight, Grid(4, 16, False), torch.float32)
    for r in range(3):
        for start in (0, 16, 32):
            group = weight[r, start : start + 16].double()
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            scale = (high - low) / 15
            zero = round(-low / scale)
            for j, w in enumerate(group.tolist()):
                rounded = scale * (min(max(round(w / scale + zero), 0), 15) - zero)
                assert float(error[r, start + j]) == pytest.approx(rounded - w, abs=1e-6)


def test_only_what_ranks_by_salience_measures_it() -> None:
    assert wanted_by(make_recipe(MIXLLM | {"bits": 3})).salience == (3,)
    assert wanted_by(make_recipe(MIXLLM | {"importance": "reverse"})).salience == (4,)
    assert wanted_by(make_recipe(MIXLLM | {"importance": "random"})).salience == ()
    by_cost = wanted_by(make_recipe(MIXLLM | {"importance": "cost"}))
    assert by_cost.salience == ()
    assert [option.grid for option in by_cost.options] == [LOW]


# ------------------------------------------------------------------------------------------------------ the plan

SHAPES = {"a": (30, 256), "b": (50, 128), "c": (20, 384)}


@pytest.fixture
def plan() -> Plan:
    weights = {n: WeightPlan(n, s, torch.bfloat16, "rtn", (Rows(Grid(3), s[0]),)) for n, s in SHAPES.items()}
    return Plan(weights)


@pytest.fixture
def scores(generator: torch.Generator) -> dict[str, Tensor]:
    """Those of "c" are twice as high as the others': it should get twice its share, not all."""
    made = {name: torch.rand(rows, generator=generator) for name, (rows, _) in SHAPES.items()}
    return made | {"c": made["c"] * 2}


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
    made = mixllm.allocate(plan, scores, [(HIGH, share)], LOW)
    count = {0.0: 0, 0.1: 10, 0.155: 15, 0.29: 29, 1.0: 100}[share]
    owners = [name for name, _ in best(scores, count)]
    assert on(made, HIGH) == {name: owners.count(name) for name in SHAPES}
    assert on(made, LOW) == {name: SHAPES[name][0] - owners.count(name) for name in SHAPES}


def test_several_widths_take_their_share_in_turn(plan: Plan, scores: dict[str, Tensor]) -> None:
    """6 bits for the best 10 %, 4 for the next 55.5 %, 3 for the rest: ends, not shares, are rounded down."""
    grids = [Grid(6, 128, False), Grid(4, 128, False), Grid(3, 128, False)]
    made = mixllm.allocate(plan, scores, [(grids[0], 0.1), (grids[1], 0.555)], grids[2])
    ranked = [name for name, _ in best(scores, 100)]
    for grid, owners in zip(grids, (ranked[:10], ranked[10:65], ranked[65:]), strict=True):
        assert on(made, grid) == {name: owners.count(name) for name in SHAPES}
    assert [rows.grid for rows in made.weights["c"].grids] == grids, "the best-ranked rows first"


def test_of_equal_rows_the_first_are_taken(plan: Plan) -> None:
    made = mixllm.allocate(plan, {n: torch.zeros(r) for n, (r, _) in SHAPES.items()}, [(HIGH, 0.4)], LOW)
    assert on(made, HIGH) == {"a": 30, "b": 10, "c": 0}


def test_a_linear_that_no_sample_reached_stays_low(plan: Plan, scores: dict[str, Tensor]) -> None:
    del scores["b"]
    made = mixllm.allocate(plan, scores, [(HIGH, 0.5)], LOW)
    assert on(made, HIGH)["b"] == 0
    assert sum(on(made, HIGH).values()) == 25, "half of the rows that have a score"


def by_share(plan: Plan, scores: dict[str, Tensor], rows: int) -> Plan:
    return mixllm.allocate(plan, scores, [(HIGH, rows / 100)], LOW)


def test_a_byte_budget_buys_as_many_rows_as_fit(plan: Plan, scores: dict[str, Tensor]) -> None:
    for rows in (0, 1, 17, 60, 99, 100):
        for target in (by_share(plan, scores, rows).nbytes, by_share(plan, scores, rows).nbytes + 20):
            made = mixllm.allocate_bytes(plan, scores, HIGH, LOW, target)
            taken = sum(on(made, HIGH).values())
            assert made.nbytes <= target
            assert made.weights == by_share(plan, scores, taken).weights, "the best-ranked ones"
            if taken < 100:
                assert by_share(plan, scores, taken + 1).nbytes > target


def test_a_byte_budget_below_the_low_width_is_refused(plan: Plan, scores: dict[str, Tensor]) -> None:
    smallest = by_share(plan, scores, 0)
    assert mixllm.allocate_bytes(plan, scores, HIGH, LOW, smallest.nbytes).nbytes == smallest.nbytes
    with pytest.raises(RecipeError, match=rf"at 4 bits it takes {smallest.bits_per_weight:.3f}.*--low-bits"):
        mixllm.allocate_bytes(plan, scores, HIGH, LOW, smallest.nbytes - 1)


# ------------------------------------------------------------------------------------------ from recipe to decision


def decided(profile: Profile, **settings: Any) -> Decision:
    job, recipe = demo_job(**settings)
    target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
    return decide(job.plan, profile, recipe, job.skeleton.linears, target)


def rows_on(decision: Decision, grid: Grid) -> list[tuple[str, int]]:
    """Which rows of the model are on a grid, in the order of the model."""
    found = []
    for name, weight in decision.plan.weights.items():
        held = decision.chosen[name] if weight.mixed else torch.zeros(weight.shape[0], dtype=torch.int64)
        found += [(name, r) for r, i in enumerate(held.tolist()) if weight.grids[i].grid == grid]
    return found


def salience(profile: Profile, at: int = 0) -> dict[str, Tensor]:
    return {name: value[at] for name, value in profile.salience.items()}


def test_the_papers_setting_is_8_bits_symmetric_for_a_tenth_and_4_asymmetric_for_the_rest(profile: Profile) -> None:
    decision = decided(profile)
    grids = {rows.grid for weight in decision.plan.weights.values() for rows in weight.grids}
    assert grids == {HIGH, LOW}
    total = sum(weight.shape[0] for weight in decision.plan.weights.values())
    high = rows_on(decision, HIGH)
    assert len(high) == int(0.1 * total)
    assert sorted(high) == sorted(best(salience(profile), len(high)))


def test_the_rows_chosen_are_as_many_as_the_plan_counts(profile: Profile) -> None:
    decision = decided(profile, mix="8:0.05,6:0.2", bits=3)
    assert any(weight.mixed for weight in decision.plan.weights.values())
    for name, weight in decision.plan.weights.items():
        if weight.mixed:
            counts = torch.bincount(decision.chosen[name], minlength=len(weight.grids)).tolist()
            assert counts == [rows.count for rows in weight.grids]


def test_a_mix_of_three_widths_ranks_at_the_lowest(profile: Profile) -> None:
    """6 and 4 bits are asymmetric as the low rows are; the salience is that of rounding to 3 bits."""
    decision = decided(profile, mix="6:0.1,4:0.6", bits=3)
    total = sum(weight.shape[0] for weight in decision.plan.weights.values())
    ranked = best(salience(profile, 1), total)
    for bits, rows in (
        (6, ranked[: int(0.1 * total)]),
        (4, ranked[int(0.1 * total) : int(0.7 * total)]),
        (3, ranked[int(0.7 * total) :]),
    ):
        assert sorted(rows_on(decision, Grid(bits, 128, False))) == sorted(rows)


def test_the_controls_take_as_many_rows_but_others(profile: Profile) -> None:
    counts = len(rows_on(decided(profile), HIGH))
    worst = best({name: -score for name, score in salience(profile).items()}, counts)
    reverse = rows_on(decided(profile, importance="reverse"), HIGH)
    assert sorted(reverse) == sorted(worst)
    one, same, other = (rows_on(decided(profile, importance="random", seed=seed), HIGH) for seed in (1, 1, 2))
    assert len(one) == counts
    assert one == same != other


def test_fractional_bits_are_the_budget_with_everything_counted(profile: Profile) -> None:
    decision = decided(profile, bits=4.5)
    assert 4.5 - 8 * 400 / decision.plan.numel < decision.plan.bits_per_weight <= 4.5, "within one row"
    high = rows_on(decision, HIGH)
    assert sorted(high) == sorted(best(salience(profile), len(high)))
