"""A decision: what every linear becomes, from the recipe and the profile.

Every method writes its own field of the plan: GWQ the outliers, then layer-wise importance, MixLLM or the budget the
grids, within what the outliers leave of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmsqueeze.allocation import gwq, layerwise, mixllm, multiplier, rows
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.allocation.prediction import predicted, taken_outliers
from llmsqueeze.compress.decision.options import mixllm_grid, two_grids
from llmsqueeze.compress.decision.rows_and_ranks import chosen_rows, predicted_portable, within_bytes
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.profile import Profile
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.recipe.recipe import Recipe

PACK_MARGIN = 0.01  # of a budget: what entropy-coded codes may take more than they were expected to


@dataclass(frozen=True)
class Coding:
    """Of coded linears, beside the plan. curves: bytes and loss at other steps; row_gradient: linear -> [rows]; target:
    bytes that all linears may take; moments: of embeddings and head, [cols, cols]."""

    curves: Mapping[str, multiplier.Curve]
    row_gradient: Mapping[str, Tensor]
    target: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What every linear becomes.

    chosen: linear -> [rows], which of its grids a row is on, for every mixed linear. candidates: linear -> its
    outliers. predicted: loss increase in nats per token, if there are costs that promise one; predicted_portable: the
    same for a plan of the same bytes that compressed-tensors can represent. coding: if linears are coded.
    """

    plan: Plan
    chosen: Mapping[str, Tensor] = field(default_factory=dict)
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    predicted: float | None = None
    predicted_portable: float | None = None
    coding: Coding | None = None


def decide(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Decision:
    """What every planned linear becomes. `target`: bytes that they may take, if the recipe has a budget."""
    if recipe.outliers:
        plan = gwq.allocate(plan, profile.candidates, recipe.outliers, recipe.outlier_scope)
    if recipe.packs_to_size or (recipe.packs and recipe.method == "budget"):
        assert target is not None, "there is a budget"
        plan, target = packed(plan, profile), int(target * (1 - PACK_MARGIN))
    if recipe.method == "layerwise":
        plan = _layerwise(plan, profile, recipe, blocks, target)
    elif recipe.method == "mixllm":
        plan = _mixllm(plan, profile, recipe, target)
    elif recipe.method == "budget":
        assert target is not None, "method budget has a budget"
        decision = with_rows(within_bytes(plan, profile, recipe, target), profile, recipe)
        return replace(decision, predicted_portable=predicted_portable(plan, profile, recipe, target))
    elif recipe.method == "coded":
        return coded(plan, profile, target)
    return with_rows(plan, profile, recipe)


def packed(plan: Plan, profile: Profile) -> Plan:
    """The plan with the bits of entropy-coded codes on each option."""
    grids = [option.grid for option in profile.options]
    rates = {name: tuple(zip(grids, bits.tolist(), strict=True)) for name, bits in profile.rates.items()}
    return plan.having({name: replace(weight, rates=rates.get(name, ())) for name, weight in plan.weights.items()})


def coded(plan: Plan, profile: Profile, target: int | None) -> Decision:
    """The decision to code the planned linears within `target` bytes."""
    assert target is not None, "method coded has a budget"
    curves = multiplier.curves_of(plan, profile.curves)
    lacking = next((n for n, w in plan.weights.items() if w.end and n not in profile.moments), None)
    if lacking is not None:
        raise RecipeError(f"the profile does not know what {lacking} costs: it was measured without --code-embeddings")
    plan = multiplier.allocate(plan, curves, target, profile.labels)
    gradient = {name: shrunk_gradient(profile.row_gradient[name], profile.labels) for name in curves}
    promised = multiplier.predicted(plan, curves)
    coding = Coding(curves, gradient, target, profile.moments)
    return Decision(plan, {}, taken_outliers(profile, plan), promised, coding=coding)


def with_rows(plan: Plan, profile: Profile, recipe: Recipe) -> Decision:
    """The decision that a plan's counts stand for: which rows, which outliers, and what the costs promise."""
    chosen: dict[str, Tensor] = {}
    if plan.mixed and recipe.method == "budget" and recipe.importance == "cost":
        chosen = chosen_rows(plan, profile)
    elif plan.mixed:
        chosen = rows.by_score(plan, row_scores(plan, profile, recipe))
    promised = predicted(profile, plan, chosen) if profile.costs else None
    return Decision(plan, chosen, taken_outliers(profile, plan), promised)


def row_scores(plan: Plan, profile: Profile, recipe: Recipe) -> dict[str, Tensor]:
    """linear -> [rows]: how important the recipe takes each row to be, the same over the whole model."""
    if recipe.importance == "cost":
        return rows.cost_scores(profile)
    if recipe.importance == "salience":
        return rows.salience_scores(profile, recipe.code_bits)
    if recipe.importance == "reverse":
        return {name: -score for name, score in rows.salience_scores(profile, recipe.code_bits).items()}
    return rows.random_scores(plan, recipe.seed)


def _layerwise(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Plan:
    assert target is not None
    order = layerwise.order_blocks(recipe.importance, len(blocks), profile.lim, profile.zd, recipe.seed)
    high, low = two_grids(recipe)
    return layerwise.allocate(plan, blocks, order, high, low, target, profile.groups)


def _mixllm(plan: Plan, profile: Profile, recipe: Recipe, target: int | None) -> Plan:
    scores = row_scores(plan, profile, recipe)
    high, low = two_grids(recipe)
    if recipe.mix:
        mix = [(mixllm_grid(recipe, width), share) for width, share in recipe.mix]
        return mixllm.allocate(plan, scores, mix, low)
    assert target is not None
    return mixllm.allocate_bytes(plan, scores, high, low, target)
