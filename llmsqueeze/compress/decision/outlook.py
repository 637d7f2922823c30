"""The promises of a plan, as rows of a table and points of a curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmsqueeze.allocation import coded, greedy
from llmsqueeze.allocation.options import options_of
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.allocation.prediction import costs_of, predicted
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.measure.profile import Profile
from llmsqueeze.recipe.recipe import Recipe

POINTS = 200


def table(
    decision: Decision, blocks: Sequence[Sequence[str]], outer: Sequence[str], profile: Profile
) -> list[dict[str, Any]]:
    """One row per kind of linear, its blocks folded together: widths, outliers, bytes, predicted cost. outer: the
    linears that are in no block.

    `high_share`: share of rows above the narrowest width of the whole plan. `blocks`: width -> the blocks whose linear
    has it; '2+4' if its rows have several.
    """
    block_of = {name: number for number, names in enumerate(blocks) for name in names}
    narrowest = min((rows.grid.bits for weight in decision.plan.weights.values() for rows in weight.grids), default=0)
    folded: dict[str, list[WeightPlan]] = {}
    for names in [[name for name, weight in decision.plan.weights.items() if weight.end], *blocks, outer]:
        for name in names:
            if name in decision.plan.weights:
                pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
                folded.setdefault(pattern, []).append(decision.plan.weights[name])
    return [_row(pattern, weights, decision, profile, narrowest, block_of) for pattern, weights in folded.items()]


def _row(
    pattern: str,
    weights: list[WeightPlan],
    decision: Decision,
    profile: Profile,
    narrowest: int,
    block_of: Mapping[str, int],
) -> dict[str, Any]:
    counts: dict[int, int] = {}
    places: dict[str, set[int]] = {}
    for weight in weights:
        if weight.name in block_of:
            places.setdefault(widths_of(weight), set()).add(block_of[weight.name])
        for rows in weight.grids:
            counts[rows.grid.bits] = counts.get(rows.grid.bits, 0) + rows.count
    total, numel = sum(counts.values()), sum(weight.numel for weight in weights)
    part = decision.plan.only({weight.name: weight for weight in weights})
    return {
        "pattern": pattern,
        "count": len(weights),
        "rows": {str(bits): counts[bits] / total for bits in sorted(counts)},
        "blocks": {widths: sorted(numbers) for widths, numbers in places.items()},
        "high_share": sum(n for bits, n in counts.items() if bits > narrowest) / max(total, 1),
        "dual": sum(rows.count for weight in weights for rows in weight.grids if rows.grid.dual) / max(total, 1),
        "rank": sum(weight.rank for weight in weights) / len(weights),
        "outliers": sum(weight.kept for weight in weights) / numel,
        "nbytes": part.nbytes,
        "bits_per_weight": round(part.bits_per_weight, 6),
        "predicted_loss_increase": _predicted(part, decision, profile),
    }


def widths_of(weight: WeightPlan) -> str:
    """'4', '2+4' if its rows have two widths, or 'coded'."""
    return "+".join(map(str, sorted({rows.grid.bits for rows in weight.grids if rows.count}))) or "coded"


def _predicted(part: Plan, decision: Decision, profile: Profile) -> float | None:
    if decision.coding is not None:
        curves = {name: curve for name, curve in decision.coding.curves.items() if name in part.weights}
        return coded.predicted_of_steps(part, curves)
    return predicted(profile, part, decision.chosen) if decision.predicted is not None else None


def curve(plan: Plan, recipe: Recipe, profile: Profile) -> list[tuple[float, float]]:
    """(bits per weight, predicted loss increase) from the smallest plan to the largest; [] without costs."""
    if recipe.needs_steps:
        return _coded_curve(plan, profile)
    if recipe.decides != "options" or not recipe.needs_costs:
        return []
    options = options_of(recipe)
    ladder = greedy.ladder(plan, costs_of(profile, options), options, recipe.granularity, profile.groups)
    sizes = torch.tensor([nbytes for nbytes, _ in ladder])
    points = torch.linspace(float(sizes[0]), float(sizes[-1]), POINTS, dtype=sizes.dtype)
    at = torch.searchsorted(sizes, points).clamp(max=len(ladder) - 1).unique().tolist()
    return [(8 * ladder[i][0] / plan.numel, ladder[i][1]) for i in at]


def _coded_curve(plan: Plan, profile: Profile) -> list[tuple[float, float]]:
    """The same of coded weights, from half a bit, or the least that steps and tables take, to ten, or the finest steps:
    bits fall about evenly as the logarithm of the multiplier rises."""
    curves, tokens = coded.curves_of(plan, profile.curves), profile.labels
    least = coded.at_multiplier(plan, curves, coded.FINEST, tokens).nbytes
    ends = [max(least, int(bits * plan.numel / 8)) for bits in (0.5, 10.0)]
    first, last = (coded.multiplier_for(plan, curves, nbytes, tokens) for nbytes in ends)
    last = max(last, coded.finest_multiplier(plan, curves))
    sized = [coded.at_multiplier(plan, curves, at, tokens) for at in torch.linspace(first, last, POINTS).tolist()]
    return [(one.bits_per_weight, coded.predicted_of_steps(one, curves)) for one in sized]
