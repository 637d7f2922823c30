"""Layer-wise widths: "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
Bit-Levels" (arXiv 2406.17415): the important decoder blocks get the high of two widths.

    width of block i = high for the first blocks by importance (LIM, ZD: measure/importance.py) that fit, else low

What differs from the paper: the bytes that are too few for one more block widen fusion groups of the next important
ones; orders without merit are there as controls: random, reverse (of LIM), first, last, both-ends.

Another order is by what the low width costs (`cost`: the predicted loss of a block's linears, measure/costs.py). With a
bound on quality the split between the widths is found by bisection on the measured loss of held-back text: the search
of "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization" (arXiv
2306.04879), which sees what layers do to each other because it measures. What differs: the unit is a block, not a
layer; there is one split between two widths; our costs are the sensitivity. Memory: two numbers per block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsqueeze.allocation.options import options_of, two_grids
from llmsqueeze.allocation.plan import Plan, Rows, fused
from llmsqueeze.allocation.prediction import costs_of
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parts import Grid
from llmsqueeze.recipe.recipe import Recipe


def layerwise(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int) -> Plan:
    """The method: see `Allocator`."""
    high, low = two_grids(recipe)
    return allocate(plan, blocks, ranked(plan, profile, recipe, blocks), high, low, target, profile.groups)


def sizes(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]]) -> list[float]:
    """Bits per weight of every plan of the method, rising: fusion group after fusion group gets the high width. Each
    has room for half a byte more, which rounding may take."""
    high, low = two_grids(recipe)
    plan = _on(list(plan.weights), low, plan)
    nbytes = [plan.nbytes]
    for index in ranked(plan, profile, recipe, blocks):
        for names in fused(blocks[index], profile.groups):
            plan = _on(names, high, plan)
            nbytes.append(plan.nbytes)
    return [8 * (size + 0.5) / plan.numel for size in sorted(set(nbytes))]


def ranked(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]]) -> list[int]:
    """Block numbers by the recipe's ranking, the most important first."""
    if recipe.importance == "cost":
        return by_cost(plan, blocks, costs_of(profile, options_of(recipe)))
    return order_blocks(recipe.importance, len(blocks), profile.lim, profile.zd, recipe.seed)


def by_cost(plan: Plan, blocks: Sequence[Sequence[str]], costs: Mapping[str, Tensor]) -> list[int]:
    """Block numbers, that first which loses most for its weights; costs: linear -> [1, rows] at the low width."""

    def lost(names: Sequence[str]) -> float:
        weights = sum(plan.weights[name].numel for name in names if name in plan.weights)
        return sum(float(costs[name].sum()) for name in names if name in costs) / max(1, weights)

    return sorted(range(len(blocks)), key=lambda i: -lost(blocks[i]))


def order_blocks(importance: str, count: int, lim: Sequence[float], zd: Sequence[float], seed: int) -> list[int]:
    """Block numbers, the most important first; ties in the order of the model."""
    numbers = range(count)
    if importance == "lim":
        return sorted(numbers, key=lambda i: -lim[i])
    if importance == "reverse":
        return sorted(numbers, key=lambda i: lim[i])
    if importance == "zd":
        return sorted(numbers, key=lambda i: zd[i])
    if importance == "first":
        return list(numbers)
    if importance == "last":
        return list(reversed(numbers))
    if importance == "both-ends":
        return sorted(numbers, key=lambda i: min(i, count - 1 - i))
    assert importance == "random"
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def allocate(
    plan: Plan,
    blocks: Sequence[Sequence[str]],
    order: Sequence[int],
    high: Grid,
    low: Grid,
    target: int,
    groups: Sequence[Sequence[str]] = (),
) -> Plan:
    """`plan` with every linear on `low`, but those of the first blocks in `order` on `high` while it stays within
    `target` bytes; then, in the same order, those of the fusion `groups` (without any, single linears) that still fit.

    Raises RecipeError if even the low width does not fit.
    """
    plan = _on(list(plan.weights), low, plan)
    if plan.nbytes > target:
        raise RecipeError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight; with every block at {low.bits} bits it "
            f"takes {plan.bits_per_weight:.3f}, everything counted: choose more, or a smaller --low-bits"
        )
    whole = [blocks[index] for index in order]
    for names in [*whole, *(part for block in whole for part in fused(block, groups))]:
        candidate = _on(names, high, plan)
        if candidate.nbytes <= target:
            plan = candidate
    return plan


def _on(names: Sequence[str], grid: Grid, plan: Plan) -> Plan:
    return plan.on({n: (Rows(grid, plan.weights[n].shape[0]),) for n in names if n in plan.weights})
