"""Method budget: widths of rows and ranks of the compensation, bought in turn within the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from llmsqueeze.allocation import greedy, ranks, rows
from llmsqueeze.allocation.options import options_of, portable_twin
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.allocation.prediction import costs_of, option_of, options_of_rows, predicted
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.profile import Profile
from llmsqueeze.recipe.recipe import Recipe

ROUNDS = 6  # of rows and ranks in turn


def budget(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int) -> Plan:
    """The method: see `Allocator`."""
    return within_bytes(plan, profile, recipe, target)


def within_bytes(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> Plan:
    """The plan that promises most within `target` bytes."""
    options = options_of(recipe)
    if recipe.importance == "uniform":
        return greedy.uniform(plan, [option for option in options if not option.outliers], target)
    costs = costs_of(profile, options)
    best = greedy.allocate(plan, costs, options, target, recipe.granularity, profile.groups)
    return _with_ranks(best, profile, recipe, options, costs, target) if recipe.buys_ranks else best


def _with_ranks(
    best: Plan,
    profile: Profile,
    recipe: Recipe,
    options: Sequence[Option],
    costs: Mapping[str, Tensor],
    target: int,
) -> Plan:
    """Rows and ranks in turn, from rows alone; the plan that promises most on the way."""
    least, current, scaled = predicted(profile, best, chosen_rows(best, profile)), best, costs
    for _ in range(ROUNDS):
        spent = sum(w.rank * ranks.rank_nbytes(w) for w in current.weights.values())
        ladder = greedy.ladder(current, scaled, options, recipe.granularity, profile.groups)
        price, chosen = ranks.last_byte(ladder, target - spent), chosen_rows(current, profile)
        bought, scaled = {}, dict(costs)
        for name, weight in current.weights.items():
            on = options_of_rows(profile, weight, chosen.get(name)) if name in profile.gains else None
            if on is not None:
                gain = ranks.expected_gains(profile.costs[name], profile.gains[name], on)
                bought[name] = ranks.worthwhile(gain, price * ranks.rank_nbytes(weight))
                whole = profile.costs[name].gather(0, on[None]).sum()
                scaled[name] = costs[name] * (1 - gain[: bought[name]].sum() / whole)
        ranked = current.having({name: replace(w, rank=bought.get(name, 0)) for name, w in current.weights.items()})
        try:
            current = greedy.allocate(ranked, scaled, options, target, recipe.granularity, profile.groups)
        except RecipeError:
            break  # so many ranks leave too little for the rows
        promised = predicted(profile, current, chosen_rows(current, profile))
        if promised is not None and least is not None and promised < least:
            best, least = current, promised
    return best


def chosen_rows(plan: Plan, profile: Profile) -> dict[str, Tensor]:
    """Which grids the rows of mixed linears are on, by what they cost."""
    return rows.by_cost(plan, _costs_on_grids(plan, profile), rows.cost_scores(profile)) if plan.mixed else {}


def _costs_on_grids(plan: Plan, profile: Profile) -> dict[str, Tensor | None]:
    """Costs [grids, rows] of every linear on its grids; None if one of them has no price."""
    costs: dict[str, Tensor | None] = {}
    for name, weight in plan.weights.items():
        options = [option_of(profile, part, weight.shape[1]) for part in weight.grids]
        priced = name in profile.costs and None not in options
        costs[name] = profile.costs[name][options] if priced else None
    return costs


def predicted_portable(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> float | None:
    """The loss increase that a portable plan of the same bytes promises; None if `plan` is portable, or if that was not
    measured."""
    twin = portable_twin(recipe)
    options = options_of(twin)
    if plan.portable or recipe.importance != "cost" or any(option not in profile.options for option in options):
        return None
    bare = Plan({n: replace(w, outliers=0, rank=0) for n, w in plan.weights.items()}, "compressed-tensors")
    try:
        return predicted(profile, within_bytes(bare, profile, twin, target), {})
    except RecipeError:
        return None  # so few bytes hold none


def predicted_native(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> float | None:
    """The loss increase that the same bytes promise in our own format, with a width for every row; None if `plan` is
    not portable, or if rows have no costs."""
    if not plan.portable or recipe.importance != "cost" or recipe.granularity != "group":
        return None
    twin = replace(recipe, portable=False, granularity="row")
    try:
        best = within_bytes(Plan(plan.weights), profile, twin, target)
    except RecipeError:
        return None
    return predicted(profile, best, chosen_rows(best, profile))
