"""A decision: what every linear becomes, from the recipe and the profile.

Every method writes its own field of the plan: GWQ the outliers, then layer-wise importance, MixLLM or the budget the
grids, within what the outliers leave of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmsqueeze.allocation import allocator, gwq, rows
from llmsqueeze.allocation.budget import chosen_rows, predicted_native, predicted_portable
from llmsqueeze.allocation.coded import Curve, curves_of, predicted_of_steps
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.allocation.prediction import predicted, taken_outliers
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.profile import Profile
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.recipe.recipe import Recipe

PACK_MARGIN = 0.01  # of a budget: what entropy-coded codes may take more than they were expected to


@dataclass(frozen=True)
class Coding:
    """Of coded linears, beside the plan. curves: bytes and loss at other steps; row_gradient: linear -> [rows]; target:
    bytes that all linears may take; moments: of embeddings and head, [cols, cols]."""

    curves: Mapping[str, Curve]
    row_gradient: Mapping[str, Tensor]
    target: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What every linear becomes.

    chosen: linear -> [rows], which of its grids a row is on, for every mixed linear. candidates: linear -> its
    outliers. predicted: loss increase in nats per token, if there are costs that promise one; predicted_portable: the
    same for a plan of the same bytes that compressed-tensors can represent; predicted_native: if the plan is one, for
    the same bytes in our own format. coding: if linears are coded. block_scores: ranking (lim, zd) -> its score of
    every block, if blocks are ranked by one.
    """

    plan: Plan
    chosen: Mapping[str, Tensor] = field(default_factory=dict)
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    predicted: float | None = None
    predicted_portable: float | None = None
    predicted_native: float | None = None
    coding: Coding | None = None
    block_scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def decide(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int) -> Decision:
    """What every planned linear becomes. `target`: bytes that they may take; UNBOUNDED if the recipe has no budget."""
    if recipe.outliers:
        plan = gwq.allocate(plan, profile.candidates, recipe.outliers, recipe.outlier_scope)
    undecided = plan
    if recipe.packs_to_size or (recipe.packs and recipe.decides == "options"):
        undecided, target = packed(plan, profile), int(target * (1 - PACK_MARGIN))
    if recipe.decides:
        plan = allocator(recipe.method)(undecided, profile, recipe, blocks, target)
    decision = completed(plan, profile, recipe, target)
    if recipe.decides == "options":
        about = undecided, profile, recipe, target
        portable, native = predicted_portable(*about), predicted_native(*about)
        return replace(decision, predicted_portable=portable, predicted_native=native)
    return decision


def completed(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> Decision:
    """The decision for a plan whose widths or steps are decided, by this run or in a plan file."""
    return with_steps(plan, profile, target) if recipe.needs_steps else with_rows(plan, profile, recipe)


def packed(plan: Plan, profile: Profile) -> Plan:
    """The plan with the bits of entropy-coded codes on each option."""
    grids = [option.grid for option in profile.options]
    rates = {name: tuple(zip(grids, bits.tolist(), strict=True)) for name, bits in profile.rates.items()}
    return plan.having({name: replace(weight, rates=rates.get(name, ())) for name, weight in plan.weights.items()})


def with_steps(plan: Plan, profile: Profile, target: int) -> Decision:
    """The decision that a plan's steps stand for: how they are paced, and what the costs promise."""
    curves = curves_of(plan, profile.curves)
    gradient = {name: shrunk_gradient(profile.row_gradient[name], profile.labels) for name in curves}
    promised = predicted_of_steps(plan, curves)
    coding = Coding(curves, gradient, target, profile.moments)
    return Decision(plan, {}, taken_outliers(profile, plan), promised, coding=coding)


def with_rows(plan: Plan, profile: Profile, recipe: Recipe) -> Decision:
    """The decision that a plan's counts stand for: which rows, which outliers, and what the costs promise."""
    chosen: dict[str, Tensor] = {}
    if plan.mixed and recipe.decides == "options" and recipe.needs_costs:
        chosen = chosen_rows(plan, profile)
    elif plan.mixed:
        chosen = rows.by_score(plan, rows.row_scores(plan, profile, recipe))
    promises = profile.costs and recipe.importance != "trace"  # an average of a linear ranks, but promises nothing
    promised = predicted(profile, plan, chosen) if promises else None
    scores = {name: values for name, values in (("lim", profile.lim), ("zd", profile.zd)) if name in recipe.measures}
    return Decision(plan, chosen, taken_outliers(profile, plan), promised, block_scores=scores)
