"""From what was asked for and what was measured to what will be done: recipe and profile -> plan.

Every method writes its own field of the plan: GWQ the outliers, then layer-wise importance, MixLLM or the budget the
grids, within what the outliers leave of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmsqueeze.allocate import budget, gwq, layerwise, mixllm
from llmsqueeze.allocate.gwq import Candidates
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure import Wanted
from llmsqueeze.parts import Grid
from llmsqueeze.plan import Plan, recipe_grid
from llmsqueeze.price import Option
from llmsqueeze.profile import Profile, random_scores
from llmsqueeze.recipe import Recipe


@dataclass(frozen=True)
class Decision:
    """What will be done with every linear.

    scores: linear -> [rows], which rows the plan's counts mean; empty where no linear is mixed. candidates: which
    weights its outliers are. predicted: loss increase in nats per token, where there are costs that promise one.
    """

    plan: Plan
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    predicted: float | None = None


def wanted_by(recipe: Recipe) -> Wanted:
    """What the recipe needs to know of the model."""
    return Wanted(
        options=options_of(recipe) if recipe.needs_costs else (),
        salience=(recipe.code_bits,) if recipe.needs_salience else (),
        outliers=bool(recipe.outlier_fraction),
        lim=recipe.needs_lim,
        zd=recipe.importance == "zd",
    )


def options_of(recipe: Recipe) -> tuple[Option, ...]:
    """What the allocator may give to a row, and for `mixllm` ranked by cost what its low rows get."""
    if recipe.method != "auto":
        return (Option(recipe_grid(recipe, recipe.code_bits)),)
    assert recipe.widths is not None, "the recipe is filled in"
    sizes = recipe.group_sizes or (recipe.group_size,)
    grids = [replace(recipe_grid(recipe, width), group_size=size) for size in sizes for width in recipe.widths]
    found = [Option(grid) for grid in grids]
    for share in recipe.row_outliers or ():
        # a weight that stays needs a level 0 under it
        found += [Option(replace(grid, half=False), share) for grid in grids if grid.bits > 1]
    return tuple(found)


def decide(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Decision:
    """What to do with every planned linear. `target`: bytes they may take, where the recipe has a budget."""
    if recipe.outlier_fraction:
        plan = gwq.allocate(plan, profile.candidates, recipe.outlier_fraction, recipe.outlier_scope)
    decision = Decision(plan)
    if recipe.method == "layerwise":
        decision = Decision(_layerwise(plan, profile, recipe, blocks, target))
    elif recipe.method == "mixllm":
        decision = _mixllm(plan, profile, recipe, target)
    elif recipe.method == "auto":
        assert target is not None, "method auto has a budget"
        decision = _auto(plan, profile, recipe, target)
    return replace(decision, candidates=profile.trimmed(decision.plan).candidates)


def target_nbytes(recipe: Recipe, numel: int, kept_nbytes: int, nbytes_original: int) -> int | None:
    """Bytes that the planned linears may take; None where the recipe names no budget.

    `kept_nbytes`: all weights beside them. Raises RecipeError for a size that no plan can have.
    """
    if recipe.size is not None:
        if recipe.size >= nbytes_original:
            raise RecipeError(
                f"size {recipe.size} bytes is no less than the original's {nbytes_original}: there is nothing to do"
            )
        if recipe.size <= kept_nbytes:
            raise RecipeError(
                f"size {recipe.size} bytes: what stays as it is (embeddings, norms, head, skipped linears) takes "
                f"{kept_nbytes} already"
            )
        return recipe.size - kept_nbytes
    if recipe.average_bits is not None:
        return int(recipe.average_bits * numel / 8)
    return None


def _layerwise(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Plan:
    assert recipe.importance is not None
    assert recipe.high_bits is not None
    assert recipe.low_bits is not None
    assert target is not None
    order = layerwise.order_blocks(recipe.importance, len(blocks), profile.lim, profile.zd, recipe.seed)
    high, low = recipe_grid(recipe, recipe.high_bits), recipe_grid(recipe, recipe.low_bits)
    return layerwise.allocate(plan, blocks, order, high, low, target)


def _mixllm(plan: Plan, profile: Profile, recipe: Recipe, target: int | None) -> Decision:
    assert recipe.high_bits is not None
    assert recipe.importance is not None
    if recipe.importance == "random":
        scores = random_scores(plan, recipe.seed)
    else:
        scores = profile.row_scores(recipe.importance, recipe.code_bits)
    low = recipe_grid(recipe, recipe.code_bits)
    if recipe.mix is not None:
        mix = [(_mixllm_grid(recipe, width), share) for width, share in recipe.mix]
        return Decision(mixllm.allocate(plan, scores, mix, low), scores)
    assert target is not None
    high = _mixllm_grid(recipe, recipe.high_bits)
    return Decision(mixllm.allocate_bytes(plan, scores, high, low, target), scores)


def _mixllm_grid(recipe: Recipe, width: int) -> Grid:
    """Rows of 8 bits are symmetric in the paper; narrower ones as the recipe says."""
    return Grid(width, recipe.group_size, symmetric=width == 8 or bool(recipe.symmetric))


def _auto(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> Decision:
    options = options_of(recipe)
    if recipe.importance == "uniform":
        scores = random_scores(plan, recipe.seed)
        found = budget.uniform(plan, [option for option in options if not option.outliers], target)
        return Decision(found, scores, predicted=profile.predicted(found, scores) if profile.costs else None)
    assert recipe.granularity is not None
    at = [profile.options.index(option) for option in options]
    costs = {name: cost[at] for name, cost in profile.costs.items()}
    scores = profile.row_scores("cost")
    found = budget.allocate(plan, costs, options, target, recipe.granularity, profile.groups)
    return Decision(found, scores, predicted=profile.predicted(found, scores))
