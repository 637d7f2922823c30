"""How many bytes the linears may take, and the fewest that they can."""

from __future__ import annotations

from dataclasses import replace

from llmsqueeze.allocation import UNBOUNDED, coded
from llmsqueeze.allocation.options import options_of
from llmsqueeze.allocation.plan import Plan, Rows, recipe_grid
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.recipe import Recipe


def target_nbytes(recipe: Recipe, plan: Plan, kept_nbytes: int, nbytes_original: int) -> int:
    """Bytes that the linears of `plan` may take; UNBOUNDED if the recipe names no budget.

    `kept_nbytes`: all weights beside them. Raises RecipeError for a budget that no plan can meet, naming the smallest,
    before anything is measured.
    """
    target = asked_nbytes(recipe, plan, kept_nbytes, nbytes_original)
    if target != UNBOUNDED and (smallest := narrowest(plan, recipe)).nbytes > target:
        raise too_small(recipe, smallest, kept_nbytes)
    return target


def asked_nbytes(recipe: Recipe, plan: Plan, kept_nbytes: int, nbytes_original: int) -> int:
    """`target_nbytes`, whether a plan can meet it or not. Raises RecipeError for a size that asks for nothing."""
    if recipe.size is not None:
        if recipe.size >= nbytes_original:
            raise RecipeError(
                f"{asked_budget(recipe)} is no less than the original's {nbytes_original}: there is nothing to do"
            )
        return recipe.size - kept_nbytes
    if recipe.average_bits is not None:
        return int(recipe.average_bits * plan.numel / 8)
    if recipe.budget_width is not None:
        return uniform_nbytes(plan, recipe, recipe.budget_width)
    return UNBOUNDED


def too_small(recipe: Recipe, smallest: Plan, kept_nbytes: int) -> RecipeError:
    """The error for a budget that not even the smallest plan meets."""
    bare = "steps and tables alone" if recipe.decides == "steps" else f"{smallest.code_bits:g}-bit codes everywhere"
    return RecipeError(
        f"{asked_budget(recipe)} is too small: with {bare} the linears take {smallest.bits_per_weight:.3f} bits per "
        f"weight, everything counted, and all weights {kept_nbytes + smallest.nbytes} bytes, of which {kept_nbytes} "
        "stay as they are"
    )


def asked_budget(recipe: Recipe) -> str:
    """The budget as it was asked for, in bytes or bits."""
    return f"--size {recipe.size} bytes" if recipe.size is not None else f"--bits {recipe.bits}"


def uniform_nbytes(plan: Plan, recipe: Recipe, width: int) -> int:
    """Bytes of the linears of `plan` if all codes had this width, on the recipe's grid."""
    grid = replace(recipe_grid(recipe, width), half=False, dual=False, symmetric=recipe.symmetric)
    bare = {name: replace(w, quantizer="rtn", coded_nbytes=0, rank=0) for name, w in plan.weights.items()}
    return plan.only({name: w.on(Rows(grid, w.shape[0])) for name, w in bare.items()}).nbytes


def narrowest(plan: Plan, recipe: Recipe) -> Plan:
    """The smallest plan that the recipe's method can make of the linears."""
    if recipe.decides == "steps":
        weights = plan.weights.items()
        return plan.having({n: replace(w, coded_nbytes=coded.least_nbytes(w.shape)) for n, w in weights})
    if recipe.decides != "options":
        grids = [recipe_grid(recipe, recipe.code_bits)]
    else:
        grids = [option.grid for option in options_of(recipe) if not option.outliers]
    plans = [plan.on({name: (Rows(grid, w.shape[0]),) for name, w in plan.weights.items()}) for grid in grids]
    return min(plans, key=lambda one: one.nbytes)
