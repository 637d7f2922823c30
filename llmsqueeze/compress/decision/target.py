"""How many bytes the linears may take, and the fewest that they can."""

from __future__ import annotations

from dataclasses import replace

from llmsqueeze.allocation import UNBOUNDED, coded
from llmsqueeze.allocation.options import options_of
from llmsqueeze.allocation.plan import Plan, Rows, recipe_grid
from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.recipe import Recipe

NARROWEST = 2  # bits of the codes of a method whose budget bends one option


def target_nbytes(recipe: Recipe, plan: Plan, kept_nbytes: int, nbytes_original: int) -> int:
    """Bytes that the linears of `plan` may take; UNBOUNDED if the recipe names no budget.

    `kept_nbytes`: all weights beside them. Raises RecipeError for a budget that no plan can meet, naming the smallest,
    before anything is measured.
    """
    if recipe.size is not None:
        target = recipe.size - kept_nbytes
    elif recipe.average_bits is not None:
        target = int(recipe.average_bits * plan.numel / 8)
    elif recipe.budget_width is not None:
        target = uniform_nbytes(plan, recipe, recipe.budget_width)
    else:
        return UNBOUNDED
    asked = asked_budget(recipe)
    if recipe.size is not None and recipe.size >= nbytes_original:
        raise RecipeError(f"{asked} is no less than the original's {nbytes_original}: there is nothing to do")
    smallest = narrowest(plan, recipe)
    if smallest.nbytes > target:
        bare = "steps and tables alone" if recipe.decides == "steps" else f"{smallest.code_bits:g}-bit codes everywhere"
        raise RecipeError(
            f"{asked} is too small: with {bare} the linears take "
            f"{smallest.bits_per_weight:.3f} bits per weight, everything counted, and all weights "
            f"{kept_nbytes + smallest.nbytes} bytes, of which {kept_nbytes} stay as they are"
        )
    return target


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
    if recipe.bends:
        whole_rows = recipe.bends == "group_size"
        recipe = replace(recipe, bits=NARROWEST, group_size=-1 if whole_rows else recipe.group_size)
        ranks = 1 if recipe.bends == "lorc_rank" else recipe.rank
        plan = plan.having({n: replace(w, rank=ranks) for n, w in plan.weights.items()})
    if recipe.decides != "options":
        grids = [recipe_grid(recipe, recipe.code_bits)]
    else:
        grids = [option.grid for option in options_of(recipe) if not option.outliers]
    plans = [plan.on({name: (Rows(grid, w.shape[0]),) for name, w in plan.weights.items()}) for grid in grids]
    return min(plans, key=lambda one: one.nbytes)
