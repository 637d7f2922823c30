"""MixLLM: "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System
Design" (arXiv 2412.14590): the output rows that matter most, ranked over the whole model, get more bits.

    width of row r = high if S[r] is among the first k of all rows, else low      S [rows]: measure/salience.py

The high width is 8 bits, symmetric, the low one 4 bits, asymmetric.

What differs from the paper: weights only (activations stay as they are); any quantizer of ours on either set of rows;
no reordering of groups. The budget may be a share of the rows, as in the paper, or bytes. More than two widths: the
widest takes its share of the ranking first, as in the authors' code. Memory: one score per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsqueeze.allocation.options import high_grid, two_grids
from llmsqueeze.allocation.plan import Grids, Plan, Rows
from llmsqueeze.allocation.rows import row_scores
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parts import Grid
from llmsqueeze.recipe.recipe import Recipe


def mixllm(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int) -> Plan:
    """The method: see `Allocator`."""
    scores = row_scores(plan, profile, recipe)
    high, low = two_grids(recipe)
    if recipe.mix:
        return allocate(plan, scores, [(high_grid(recipe, width), share) for width, share in recipe.mix], low)
    return allocate_bytes(plan, scores, high, low, target)


def allocate(plan: Plan, scores: Mapping[str, Tensor], mix: Sequence[tuple[Grid, float]], rest: Grid) -> Plan:
    """`plan` with shares of all rows on the grids of `mix` in turn, best-scored rows first, and the rest on `rest`.

    `scores`: name -> [rows]; linears without scores are all on `rest`.
    """
    ranking = rank_rows(scores)
    ends, total = [], 0.0
    for _, share in mix:
        total += share
        ends.append(int(total * len(ranking) + 1e-9))
    return _cut(plan, scores, ranking, list(zip((grid for grid, _ in mix), ends, strict=True)), rest)


def allocate_bytes(plan: Plan, scores: Mapping[str, Tensor], high: Grid, low: Grid, target: int) -> Plan:
    """As `allocate`, with as many rows on `high` as keep the whole within `target` bytes.

    Raises RecipeError if not even all rows on `low` fit.
    """
    ranking = rank_rows(scores)
    most, fewest = len(ranking), 0
    plan_of = {0: _cut(plan, scores, ranking, [(high, 0)], low)}
    if plan_of[0].nbytes > target:
        smallest = plan_of[0].bits_per_weight
        raise RecipeError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight; with every row at {low.bits} bits it takes "
            f"{smallest:.3f}, everything counted: choose more, or a smaller --low-bits"
        )
    while fewest < most:
        middle = (fewest + most + 1) // 2
        candidate = _cut(plan, scores, ranking, [(high, middle)], low)
        if candidate.nbytes <= target:
            fewest, plan_of[middle] = middle, candidate
        else:
            most = middle - 1
    return plan_of[fewest]


def rank_rows(scores: Mapping[str, Tensor]) -> Tensor:
    """The owner (its number in `scores`) of every row of all linears, best-scored row first; ties as they come."""
    values = torch.cat(list(scores.values()))
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores.values())])
    return owner[torch.sort(values, descending=True, stable=True).indices]


def _cut(
    plan: Plan, scores: Mapping[str, Tensor], ranking: Tensor, ends: Sequence[tuple[Grid, int]], rest: Grid
) -> Plan:
    """Ranked rows up to each end get its grid, the others `rest`."""
    taken: dict[str, list[Rows]] = {name: [] for name in plan.weights}
    start = 0
    for grid, end in ends:
        counts = torch.bincount(ranking[start:end], minlength=len(scores)).tolist()
        for name, count in zip(scores, counts, strict=True):
            taken[name].append(Rows(grid, count))
        start = end
    grids: dict[str, Grids] = {}
    for name, weight in plan.weights.items():
        left = weight.shape[0] - sum(rows.count for rows in taken[name])
        grids[name] = (*taken[name], Rows(rest, left))
    return plan.on(grids)
