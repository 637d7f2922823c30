"""Which rows the plan's counts mean: for every mixed linear the number of the grid [rows] that each row is on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.measure.profile import Profile
from llmsqueeze.recipe.recipe import Recipe


def row_scores(plan: Plan, profile: Profile, recipe: Recipe) -> dict[str, Tensor]:
    """linear -> [rows]: how important the recipe takes each row to be, the same over the whole model."""
    if recipe.importance == "cost":
        return cost_scores(profile)
    if recipe.importance == "salience":
        return salience_scores(profile, recipe.code_bits)
    if recipe.importance == "reverse":
        return {name: -score for name, score in salience_scores(profile, recipe.code_bits).items()}
    return random_scores(plan, recipe.seed)


def by_score(plan: Plan, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows with the highest scores [rows] get a linear's first grid, and so on; of equal ones the first."""
    return {
        name: _deal(weight, torch.sort(scores[name], descending=True, stable=True).indices)
        for name, weight in plan.weights.items()
        if weight.mixed
    }


def by_cost(plan: Plan, costs: Mapping[str, Tensor | None], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A grid goes to the rows that would lose most on the next one: cost [grids, rows] of each linear's grids, in turn.

    Where a linear has no costs (None), `scores` decide. With the counts of a Lagrangian solution these are its rows,
    as long as a row's costs are convex in the bytes.
    """
    chosen = by_score(plan, scores)
    for name in chosen:
        cost, weight = costs[name], plan.weights[name]
        if cost is None:
            continue
        grid_of = torch.full((weight.shape[0],), len(weight.grids) - 1)
        for i, rows in enumerate(weight.grids[:-1]):
            gain = torch.where(grid_of == len(weight.grids) - 1, (cost[i + 1] - cost[i]).double(), -torch.inf)
            grid_of[torch.sort(gain, descending=True, stable=True).indices[: rows.count]] = i
        chosen[name] = grid_of
    return chosen


def salience_scores(profile: Profile, width: int) -> dict[str, Tensor]:
    """linear -> [rows]: MixLLM's salience, if the low rows have this width."""
    i = profile.salience_widths.index(width)
    return {name: salience[i] for name, salience in profile.salience.items()}


def cost_scores(profile: Profile) -> dict[str, Tensor]:
    """linear -> [rows]: one number for the cost of a row at any width, the geometric mean over the options.

    Of half-integer and integer levels of one width, the first counts.
    """
    tiny = torch.finfo(torch.float32).tiny
    kinds = [(o.grid.bits, o.grid.group_size, o.grid.dual, o.outliers) for o in profile.options]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return {name: cost[first].clamp(min=tiny).log().mean(dim=0) for name, cost in profile.costs.items()}


def random_scores(plan: Plan, seed: int) -> dict[str, Tensor]:
    """Scores without merit, by seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(weight.shape[0], generator=generator) for name, weight in plan.weights.items()}


def _deal(weight: WeightPlan, order: Tensor) -> Tensor:
    counts = torch.tensor([rows.count for rows in weight.grids])
    grid_of = torch.empty(weight.shape[0], dtype=torch.int64)
    grid_of[order] = torch.arange(len(counts)).repeat_interleave(counts)
    return grid_of
