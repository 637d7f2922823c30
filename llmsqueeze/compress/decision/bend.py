"""A budget for a method whose result has a size of its own: the one option that bends to it.

    width        the widest at which the smallest result fits
    outliers     (GWQ) the largest share that fits
    lorc_rank    (--lorc-rank auto) the largest rank that fits, the same for all linears
    group_size   (all others) the smallest that fits, of those that divide the columns if any does, or one scale a row

Bytes are those of the plan, everything counted, so that what is decided here is what is written. Source: ours.
Memory: a plan.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmsqueeze.allocation.plan import Plan, base_plan, planned_linears
from llmsqueeze.compress.decision.target import asked_budget, asked_nbytes, narrowest, too_small
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.recipe.recipe import Recipe

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
GROUP_SIZES = (1024, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)  # from the fewest bytes to the most
SMALLEST = GROUP_SIZES[-1]
SHARES = 100_000  # shares of outliers are multiples of 1 / this
MOST_OUTLIERS = 0.5


def bent(recipe: Recipe, skeleton: Skeleton, kept_nbytes: int, original_nbytes: int) -> tuple[Recipe, str]:
    """The recipe with one width and the best value of `recipe.bends` within its budget, and a note that says so.

    kept_nbytes: all weights beside the linears. Raises RecipeError for a budget that nothing of the method meets.
    """
    shapes = {name: skeleton.shape(name) for name in planned_linears(skeleton, recipe.skip)}
    values = values_of(recipe, shapes)
    smallest = _with(recipe, widths(recipe)[-1], values[0])
    plan = most(smallest, skeleton)
    target = asked_nbytes(recipe, plan, kept_nbytes, original_nbytes)
    if plan.nbytes > target:
        raise too_small(recipe, plan, kept_nbytes)
    for width in widths(recipe):
        fitting = bisect_right(values, target, key=lambda value: most(_with(recipe, width, value), skeleton).nbytes)
        if fitting:
            best = _with(recipe, width, values[fitting - 1])
            average = most(best, skeleton).bits_per_weight
            what = in_words(recipe.bends, values[fitting - 1])
            asked = asked_budget(recipe)
            return best, f"{asked}: codes of {width} bits, {what}: {average:.3f} bits per weight, everything counted"
    raise AssertionError("the smallest form fits")


def lowered(recipe: Recipe, skeleton: Skeleton, kept_nbytes: int, original_nbytes: int) -> Recipe:
    """The recipe of a method that gives rows a high and a low width, with a low one that fits its budget, if nobody
    asked for one."""
    if not (recipe.decides == "rows" and recipe.low_bits_open and recipe.has_budget):
        return recipe
    for low in range(recipe.low_bits, WIDTHS[-1] - 1, -1):
        narrower = replace(recipe, low_bits=low)
        plan = base_plan(skeleton, narrower)
        if narrowest(plan, narrower).nbytes <= asked_nbytes(recipe, plan, kept_nbytes, original_nbytes):
            return narrower
    return recipe


def widths(recipe: Recipe) -> Sequence[int]:
    """The widths that codes may have, the widest first; two planes of one bit are two."""
    return (2,) if recipe.levels == "dual" else WIDTHS


def values_of(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> Sequence[Any]:
    """The values of `recipe.bends`, from the fewest bytes to the most. shapes: linear -> [rows, cols].

    Groups that leave a short last one are for our own format, where no size of `GROUP_SIZES` divides all columns.
    """
    if recipe.bends == "outliers":
        return [count / SHARES for count in range(int(MOST_OUTLIERS * SHARES) + 1)]
    if recipe.bends == "lorc_rank":
        return range(1, min(min(shape) for shape in shapes.values()) + 1)
    columns = {cols for _, cols in shapes.values()}
    sizes = [size for size in GROUP_SIZES if size < max(columns)]
    dividing = [size for size in sizes if not any(cols % min(size, cols) for cols in columns)]
    if not dividing:
        common = math.gcd(*columns)
        dividing = [size for size in range(common, SMALLEST - 1, -1) if common % size == 0]
    return [-1, *(dividing or ([] if recipe.portable else sizes))]


def most(recipe: Recipe, skeleton: Skeleton) -> Plan:
    """The plan of the recipe with the most bytes that it can have: which of the linears have outliers is not known
    before they are ranked."""
    plan = base_plan(skeleton, recipe)
    if not recipe.outliers:
        return plan
    kept = {n: replace(w, outliers=math.ceil(recipe.outliers * w.numel)) for n, w in plan.weights.items()}
    return plan.having(kept)


def _with(recipe: Recipe, width: int, value: Any) -> Recipe:
    decided: dict[str, Any] = {"bits": width, "size": None, "group_size_open": False, recipe.bends: value}
    return replace(recipe, **decided)


def in_words(option: str, value: Any) -> str:
    """What the option became."""
    if option == "outliers":
        return f"{100 * value:.3f} % of the weights as they are" if value else "no outliers, for which no byte is left"
    if option == "lorc_rank":
        return f"low-rank factors of rank {value}"
    return "one scale a row" if value == -1 else f"groups of {value} columns"
