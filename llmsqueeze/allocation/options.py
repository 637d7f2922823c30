"""What an allocation needs to know of the model, and the options that it may give to a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmsqueeze.allocation.plan import dual_grid, recipe_grid
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Ranking
from llmsqueeze.measure.request import Request
from llmsqueeze.parts import Grid
from llmsqueeze.recipe.recipe import Recipe


def request_of(recipe: Recipe) -> Request:
    """What the recipe needs to know of the model."""
    grid = recipe_grid(recipe, recipe.code_bits)
    ranking = Ranking(recipe.outlier_ranking, recipe.outliers, recipe.outlier_scope, grid, recipe.seed)
    return Request(
        options=priced(recipe) if recipe.needs_costs else (),
        gains=recipe.buys_ranks,
        rates=recipe.packs and recipe.needs_costs,
        trace=recipe.importance == "trace",
        coded=recipe.needs_steps,
        ends=recipe.code_embeddings,
        salience=salience_grids(recipe, (recipe.code_bits,)) if recipe.needs_salience else (),
        outliers=ranking if recipe.outliers else None,
        lim=recipe.needs_lim,
        zd=recipe.needs_zd,
        groups=recipe.decides == "blocks",
        quantizer=recipe.quantizer,
        search=recipe.search,
        labels=recipe.labels,
        seed=recipe.seed,
    )


def salience_grids(recipe: Recipe, widths: Sequence[int]) -> tuple[Grid, ...]:
    """The grids of the low rows at some widths, for their salience: asymmetric, as in the paper."""
    return tuple(Grid(width, recipe.group_size, symmetric=False) for width in widths)


def options_of(recipe: Recipe) -> tuple[Option, ...]:
    """The options that a row may get. A method of two widths needs the price of the low one only, to rank the rows; of
    both if codes are packed to a size."""
    if recipe.packs_to_size:
        return tuple(Option(grid) for grid in two_grids(recipe))
    if recipe.decides != "options":
        return (Option(recipe_grid(recipe, recipe.code_bits)),)
    sizes = recipe.group_sizes or (recipe.group_size,)
    grids = [replace(recipe_grid(recipe, width), group_size=size) for size in sizes for width in recipe.widths]
    if recipe.dual:
        grids += [replace(dual_grid(recipe), group_size=size) for size in sizes]
    options = [Option(grid) for grid in grids]
    for share in recipe.row_outliers:
        # outliers are pinned to a level 0
        options += [Option(replace(grid, half=False), share) for grid in grids if grid.bits > 1]
    return tuple(options)


def priced(recipe: Recipe) -> tuple[Option, ...]:
    """`options_of`, and the options of a portable twin, which price it beside a native result."""
    options = options_of(recipe)
    if recipe.decides == "options" and recipe.portable is None:
        options += tuple(option for option in options_of(portable_twin(recipe)) if option not in options)
    return options


def portable_twin(recipe: Recipe) -> Recipe:
    """The same recipe with only those options that compressed-tensors can represent."""
    return replace(
        recipe,
        portable=True,
        granularity="group",
        levels="integer",
        widths=tuple(width for width in recipe.widths if width > 1) or (2,),
        symmetric=True,
        row_outliers=(),
        outliers=0.0,
        dual=False,
        lorc_rank=0,
    )


def two_grids(recipe: Recipe) -> tuple[Grid, Grid]:
    """The grids of the high and the low width, of a method that has two."""
    return high_grid(recipe, recipe.high_bits), recipe_grid(recipe, recipe.code_bits)


def high_grid(recipe: Recipe, width: int) -> Grid:
    """The grid of a high width. Rows of 8 bits are symmetric in the paper of the method; narrower ones as the recipe
    says."""
    if recipe.decides == "rows":
        return Grid(width, recipe.group_size, symmetric=width == 8 or recipe.symmetric)
    return recipe_grid(recipe, width)
