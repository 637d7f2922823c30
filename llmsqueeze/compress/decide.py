"""From what was asked for and what was measured to what will be done: recipe and profile -> plan.

Every method writes its own field of the plan: GWQ the outliers, then layer-wise importance, MixLLM or the budget the
grids, within what the outliers leave of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmsqueeze.allocation import budget, gwq, layerwise, mixllm, multiplier, ranks, rows
from llmsqueeze.allocation.plan import SHAPE_NBYTES, Plan, Rows, dual_grid, recipe_grid
from llmsqueeze.allocation.prediction import option_of, options_of_rows, predicted, taken_outliers
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Candidates, Ranking
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.recipe.recipe import Recipe

ROUNDS = 6  # of rows and ranks in turn
PACK_MARGIN = 0.01  # of a budget: what entropy-coded codes may take more than they were expected to


@dataclass(frozen=True)
class Coding:
    """What coding goes by, beside the plan: bytes and loss at other steps, every linear's gradient [rows], and the
    bytes that all linears may take. moments: of what lies outside the blocks, [cols, cols]."""

    curves: Mapping[str, multiplier.Curve]
    row_gradient: Mapping[str, Tensor]
    target: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What will be done with every linear.

    chosen: linear -> [rows], which of its grids a row is on, for every mixed linear. candidates: which weights its
    outliers are. predicted: loss increase in nats per token, where there are costs that promise one;
    predicted_portable: what the same bytes promise where only what compressed-tensors holds is allowed. coding: where
    linears are coded.
    """

    plan: Plan
    chosen: Mapping[str, Tensor] = field(default_factory=dict)
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    predicted: float | None = None
    predicted_portable: float | None = None
    coding: Coding | None = None


def request_of(recipe: Recipe) -> Request:
    """What the recipe needs to know of the model."""
    grid = recipe_grid(recipe, recipe.code_bits)
    ranking = Ranking(recipe.outlier_ranking, recipe.outliers, recipe.outlier_scope, grid, recipe.seed)
    return Request(
        options=priced(recipe) if recipe.needs_costs else (),
        gains=recipe.buys_ranks,
        rates=recipe.packs and recipe.needs_costs,
        coded=recipe.needs_steps,
        ends=recipe.code_embeddings,
        salience=salience_grids(recipe, (recipe.code_bits,)) if recipe.needs_salience else (),
        outliers=ranking if recipe.outliers else None,
        lim=recipe.needs_lim,
        zd=recipe.needs_zd,
        quantizer=recipe.quantizer,
        search=recipe.search,
        labels=recipe.labels,
        seed=recipe.seed,
    )


def salience_grids(recipe: Recipe, widths: Sequence[int]) -> tuple[Grid, ...]:
    """The low grids of MixLLM at some widths: asymmetric, as in the paper."""
    return tuple(Grid(width, recipe.group_size, symmetric=False) for width in widths)


def options_of(recipe: Recipe) -> tuple[Option, ...]:
    """What the allocator may give to a row; for `mixllm` ranked by cost what its low rows get, and where codes are
    packed to a size both widths."""
    if recipe.packs_to_size:
        return tuple(Option(grid) for grid in two_grids(recipe))
    if recipe.method != "budget":
        return (Option(recipe_grid(recipe, recipe.code_bits)),)
    sizes = recipe.group_sizes or (recipe.group_size,)
    grids = [replace(recipe_grid(recipe, width), group_size=size) for size in sizes for width in recipe.widths]
    if recipe.dual:
        grids += [replace(dual_grid(recipe), group_size=size) for size in sizes]
    found = [Option(grid) for grid in grids]
    for share in recipe.row_outliers:
        # a weight that stays needs a level 0 under it
        found += [Option(replace(grid, half=False), share) for grid in grids if grid.bits > 1]
    return tuple(found)


def priced(recipe: Recipe) -> tuple[Option, ...]:
    """`options_of`, and what tells the price of a portable result beside one that is not."""
    found = options_of(recipe)
    if recipe.method == "budget" and recipe.portable is None:
        found += tuple(option for option in options_of(portable_twin(recipe)) if option not in found)
    return found


def portable_twin(recipe: Recipe) -> Recipe:
    """The same budget of method budget with nothing in it but what compressed-tensors holds."""
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


def decide(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Decision:
    """What to do with every planned linear. `target`: bytes they may take, where the recipe has a budget."""
    if recipe.outliers:
        plan = gwq.allocate(plan, profile.candidates, recipe.outliers, recipe.outlier_scope)
    if recipe.packs_to_size or (recipe.packs and recipe.method == "budget"):
        assert target is not None, "there is a budget"
        plan, target = packed(plan, profile), int(target * (1 - PACK_MARGIN))
    if recipe.method == "layerwise":
        plan = _layerwise(plan, profile, recipe, blocks, target)
    elif recipe.method == "mixllm":
        plan = _mixllm(plan, profile, recipe, target)
    elif recipe.method == "budget":
        assert target is not None, "method budget has a budget"
        decision = with_rows(_auto(plan, profile, recipe, target), profile, recipe)
        return replace(decision, predicted_portable=_predicted_portable(plan, profile, recipe, target))
    elif recipe.method == "coded":
        return coded(plan, profile, target)
    return with_rows(plan, profile, recipe)


def packed(plan: Plan, profile: Profile) -> Plan:
    """The plan's linears with what entropy-coded codes of each option take."""
    known = {
        name: tuple(zip((option.grid for option in profile.options), rates.tolist(), strict=True))
        for name, rates in profile.rates.items()
    }
    return Plan({name: replace(weight, rates=known.get(name, ())) for name, weight in plan.weights.items()})


def coded(plan: Plan, profile: Profile, target: int | None) -> Decision:
    """The decision to code the planned linears within `target` bytes."""
    assert target is not None, "method coded has a budget"
    curves = multiplier.curves_of(plan, profile.curves)
    lacking = next((n for n, w in plan.weights.items() if w.outer and n not in profile.moments), None)
    if lacking is not None:
        raise RecipeError(f"the profile does not know what {lacking} costs: it was measured without --code-embeddings")
    found = multiplier.allocate(plan, curves, target, profile.labels)
    gradient = {name: shrunk_gradient(profile.row_gradient[name], profile.labels) for name in curves}
    promised = multiplier.predicted(found, curves)
    return Decision(
        found, {}, taken_outliers(profile, found), promised, coding=Coding(curves, gradient, target, profile.moments)
    )


def _predicted_portable(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> float | None:
    """What a portable plan of the same bytes promises; None where it is one, or where that was not measured."""
    twin = portable_twin(recipe)
    options = options_of(twin)
    if plan.portable or recipe.importance != "cost" or any(option not in profile.options for option in options):
        return None
    bare = Plan({name: replace(w, outliers=0, rank=0, beside=SHAPE_NBYTES) for name, w in plan.weights.items()})
    try:
        return predicted(profile, _auto(bare, profile, twin, target), {})
    except RecipeError:
        return None  # so few bytes hold none


def with_rows(plan: Plan, profile: Profile, recipe: Recipe) -> Decision:
    """The decision that a plan's counts stand for: which rows, which outliers, and what the costs promise."""
    chosen: dict[str, Tensor] = {}
    if plan.mixed and recipe.method == "budget" and recipe.importance == "cost":
        chosen = _chosen_rows(plan, profile)
    elif plan.mixed:
        chosen = rows.by_score(plan, row_scores(plan, profile, recipe))
    promised = predicted(profile, plan, chosen) if profile.costs else None
    return Decision(plan, chosen, taken_outliers(profile, plan), promised)


def row_scores(plan: Plan, profile: Profile, recipe: Recipe) -> dict[str, Tensor]:
    """linear -> [rows]: how important the recipe takes each row to be, the same over the whole model."""
    if recipe.importance == "cost":
        return rows.cost_scores(profile)
    if recipe.importance == "salience":
        return rows.salience_scores(profile, recipe.code_bits)
    if recipe.importance == "reverse":
        return {name: -score for name, score in rows.salience_scores(profile, recipe.code_bits).items()}
    return rows.random_scores(plan, recipe.seed)


def _costs_on_grids(plan: Plan, profile: Profile) -> dict[str, Tensor | None]:
    """Costs [grids, rows] of every linear on the grids that it has; None where one has no price."""
    found: dict[str, Tensor | None] = {}
    for name, weight in plan.weights.items():
        at = [option_of(profile, part, weight.shape[1]) for part in weight.grids]
        priced = name in profile.costs and None not in at
        found[name] = profile.costs[name][at] if priced else None
    return found


def target_nbytes(recipe: Recipe, plan: Plan, kept_nbytes: int, nbytes_original: int) -> int | None:
    """Bytes that the linears of `plan` may take; None where the recipe names no budget.

    `kept_nbytes`: all weights beside them. Raises RecipeError for a budget that no plan can meet, naming the smallest,
    before anything is measured.
    """
    if recipe.size is not None:
        target, asked = recipe.size - kept_nbytes, f"--size {recipe.size} bytes"
    elif recipe.average_bits is not None:
        target, asked = int(recipe.average_bits * plan.numel / 8), f"--bits {recipe.average_bits}"
    elif recipe.budget_width is not None:
        target, asked = uniform_nbytes(plan, recipe, recipe.budget_width), f"--bits {recipe.budget_width}"
    else:
        return None
    if recipe.size is not None and recipe.size >= nbytes_original:
        raise RecipeError(f"{asked} is no less than the original's {nbytes_original}: there is nothing to do")
    smallest = narrowest(plan, recipe)
    if smallest.nbytes > target:
        bare = "steps and tables alone" if recipe.method == "coded" else f"{smallest.code_bits:g}-bit codes everywhere"
        raise RecipeError(
            f"{asked} is too small: with {bare} the linears take "
            f"{smallest.bits_per_weight:.3f} bits per weight, everything counted, and all weights "
            f"{kept_nbytes + smallest.nbytes} bytes, of which {kept_nbytes} stay as they are"
        )
    return target


def uniform_nbytes(plan: Plan, recipe: Recipe, width: int) -> int:
    """Bytes of the linears of `plan` if all codes had this width, on the recipe's grid."""
    grid = replace(recipe_grid(recipe, width), half=False, dual=False, symmetric=recipe.symmetric)
    bare = {name: replace(w, quantizer="rtn", coded_nbytes=0, rank=0) for name, w in plan.weights.items()}
    return Plan({name: w.on(Rows(grid, w.shape[0])) for name, w in bare.items()}).nbytes


def narrowest(plan: Plan, recipe: Recipe) -> Plan:
    """The smallest plan that the recipe's method can make of the linears."""
    if recipe.method == "coded":
        return Plan({n: replace(w, coded_nbytes=multiplier.least_nbytes(w.shape)) for n, w in plan.weights.items()})
    if recipe.method != "budget":
        grids = [recipe_grid(recipe, recipe.code_bits)]
    else:
        grids = [option.grid for option in options_of(recipe) if not option.outliers]
    plans = [plan.on({name: (Rows(grid, w.shape[0]),) for name, w in plan.weights.items()}) for grid in grids]
    return min(plans, key=lambda one: one.nbytes)


def _layerwise(
    plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int | None
) -> Plan:
    assert target is not None
    order = layerwise.order_blocks(recipe.importance, len(blocks), profile.lim, profile.zd, recipe.seed)
    high, low = two_grids(recipe)
    return layerwise.allocate(plan, blocks, order, high, low, target)


def _mixllm(plan: Plan, profile: Profile, recipe: Recipe, target: int | None) -> Plan:
    scores = row_scores(plan, profile, recipe)
    high, low = two_grids(recipe)
    if recipe.mix:
        mix = [(_mixllm_grid(recipe, width), share) for width, share in recipe.mix]
        return mixllm.allocate(plan, scores, mix, low)
    assert target is not None
    return mixllm.allocate_bytes(plan, scores, high, low, target)


def two_grids(recipe: Recipe) -> tuple[Grid, Grid]:
    """The wide and the narrow grid of `layerwise` and `mixllm`."""
    if recipe.method == "mixllm":
        return _mixllm_grid(recipe, recipe.high_bits), recipe_grid(recipe, recipe.code_bits)
    return recipe_grid(recipe, recipe.high_bits), recipe_grid(recipe, recipe.low_bits)


def _mixllm_grid(recipe: Recipe, width: int) -> Grid:
    """Rows of 8 bits are symmetric in the paper; narrower ones as the recipe says."""
    return Grid(width, recipe.group_size, symmetric=width == 8 or recipe.symmetric)


def _auto(plan: Plan, profile: Profile, recipe: Recipe, target: int) -> Plan:
    options = options_of(recipe)
    if recipe.importance == "uniform":
        return budget.uniform(plan, [option for option in options if not option.outliers], target)
    at = [profile.options.index(option) for option in options]
    costs = {name: cost[at] for name, cost in profile.costs.items()}
    best = budget.allocate(plan, costs, options, target, recipe.granularity, profile.groups)
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
    least, current, scaled = predicted(profile, best, _chosen_rows(best, profile)), best, costs
    for _ in range(ROUNDS):
        spent = sum(w.rank * ranks.rank_nbytes(w) for w in current.weights.values())
        ladder = budget.ladder(current, scaled, options, recipe.granularity, profile.groups)
        price, chosen = ranks.last_byte(ladder, target - spent), _chosen_rows(current, profile)
        bought, scaled = {}, dict(costs)
        for name, weight in current.weights.items():
            held = options_of_rows(profile, weight, chosen.get(name)) if name in profile.gains else None
            if held is not None:
                gain = ranks.expected_gains(profile.costs[name], profile.gains[name], held)
                bought[name] = ranks.worthwhile(gain, price * ranks.rank_nbytes(weight))
                whole = profile.costs[name].gather(0, held[None]).sum()
                scaled[name] = costs[name] * (1 - gain[: bought[name]].sum() / whole)
        ranked = Plan({name: replace(w, rank=bought.get(name, 0)) for name, w in current.weights.items()})
        try:
            current = budget.allocate(ranked, scaled, options, target, recipe.granularity, profile.groups)
        except RecipeError:
            break  # so many ranks leave too little for the rows
        promised = predicted(profile, current, _chosen_rows(current, profile))
        if promised is not None and least is not None and promised < least:
            best, least = current, promised
    return best


def _chosen_rows(plan: Plan, profile: Profile) -> dict[str, Tensor]:
    """Which grids the rows of mixed linears are on, by what they cost."""
    return rows.by_cost(plan, _costs_on_grids(plan, profile), rows.cost_scores(profile)) if plan.mixed else {}
