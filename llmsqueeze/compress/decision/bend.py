"""A budget for a method whose result has a size of its own: the one option that bends to it.

    width        the widest at which the smallest result fits
    outliers     (GWQ) the largest share that fits
    lorc_rank    (--lorc-rank auto) the largest rank that fits, the same for all linears
    group_size   (all others) the smallest that fits, of those that divide the columns if any does

Bytes are those of the plan, everything counted, so that what is decided here is what is written. Source: ours.
Memory: a plan.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmsqueeze.allocation.plan import Plan, base_plan, short_groups
from llmsqueeze.compress.decision.target import asked_budget, target_nbytes
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.recipe.recipe import Recipe

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
GROUP_SIZES = (-1, 1024, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)  # from the fewest bytes to the most
SHARES = 100_000  # shares of outliers are multiples of 1 / this
MOST_OUTLIERS = 0.5


def bent(recipe: Recipe, skeleton: Skeleton, kept_nbytes: int, original_nbytes: int) -> tuple[Recipe, str]:
    """The recipe with one width and the best value of `recipe.bends` within its budget, and a note that says so.

    kept_nbytes: all weights beside the linears. Raises RecipeError for a budget that nothing of the method meets.
    """
    plan = base_plan(skeleton, recipe)
    target, asked = target_nbytes(recipe, plan, kept_nbytes, original_nbytes), asked_budget(recipe)
    values = values_of(recipe, plan)
    for width in widths(recipe):
        fitting = bisect_right(values, target, key=lambda value: nbytes(_with(recipe, width, value), skeleton))
        if fitting:
            best = _with(recipe, width, values[fitting - 1])
            average = 8 * nbytes(best, skeleton) / plan.numel
            what = in_words(recipe.bends, values[fitting - 1])
            return best, f"{asked}: codes of {width} bits, {what}: {average:.3f} bits per weight, everything counted"
    raise AssertionError("the smallest of these forms is what the budget was compared with")


def widths(recipe: Recipe) -> Sequence[int]:
    """The widths that codes may have, the widest first; two planes of one bit are two."""
    return (2,) if recipe.levels == "dual" else WIDTHS


def values_of(recipe: Recipe, plan: Plan) -> Sequence[Any]:
    """The values of `recipe.bends`, from the fewest bytes to the most."""
    shapes = {name: weight.shape for name, weight in plan.weights.items()}
    if recipe.bends == "outliers":
        return [count / SHARES for count in range(int(MOST_OUTLIERS * SHARES) + 1)]
    if recipe.bends == "lorc_rank":
        return range(1, min(min(shape) for shape in shapes.values()) + 1)
    return [size for size in GROUP_SIZES if short_groups(shapes, (size,)) is None] or GROUP_SIZES


def nbytes(recipe: Recipe, skeleton: Skeleton) -> int:
    """The most bytes that the recipe makes of the linears: which of them have outliers is not known before they are
    ranked."""
    plan = base_plan(skeleton, recipe)
    if not recipe.outliers:
        return plan.nbytes
    kept = {n: replace(w, outliers=math.ceil(recipe.outliers * w.numel)) for n, w in plan.weights.items()}
    return plan.having(kept).nbytes


def _with(recipe: Recipe, width: int, value: Any) -> Recipe:
    decided: dict[str, Any] = {"bits": width, "size": None, "group_size_open": False, recipe.bends: value}
    return replace(recipe, **decided)


def in_words(option: str, value: Any) -> str:
    """What the option became."""
    if option == "outliers":
        return f"{100 * value:.3f} % of the weights as they are"
    if option == "lorc_rank":
        return f"low-rank factors of rank {value}"
    return "one scale a row" if value == -1 else f"groups of {value} columns"
