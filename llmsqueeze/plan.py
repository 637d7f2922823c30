"""What was decided: for every linear its quantizer, grid and number of outliers, with the bytes that costs exactly.

Decisions are counts; which weights the outliers are is in the profile. `specs` is the same description that the file
carries, so planned bytes and written bytes cannot differ.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch

from llmsqueeze import parts
from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.parts import Grid, Spec
from llmsqueeze.recipe import Recipe
from llmsqueeze.skeleton import Skeleton


@dataclass(frozen=True)
class WeightPlan:
    """One linear: shape [rows, cols], the dtype its scales and outliers are stored in, and what it becomes."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    quantizer: str
    grid: Grid
    outliers: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def specs(self) -> list[Spec]:
        affine = parts.affine_spec(self.grid, self.dtype)
        return [affine, parts.sparse_spec(self.outliers, self.dtype)] if self.outliers else [affine]

    @property
    def nbytes(self) -> int:
        return parts.layout_nbytes(self.shape, self.specs)


@dataclass(frozen=True)
class Plan:
    """The linears to compress, by block. Everything else stays as it is."""

    weights: dict[str, WeightPlan]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized linears, in bits, per weight of theirs."""
        return self.nbytes * 8 / self.numel


def base_plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Every linear of the blocks on the recipe's grid, but those that `skip` names."""
    names = [name for block in skeleton.linears for name in block]
    skipped = set()
    for pattern in recipe.skip:
        matched = {name for name in names if fnmatch.fnmatch(name, pattern) or name.split(".")[-1] == pattern}
        if not matched:
            leaves = sorted({name.split(".")[-1] for name in names})
            hint = nearest(pattern, [*leaves, *names])
            raise RecipeError(f"skip pattern {pattern!r} matches no linear{hint or ';'} there are {', '.join(leaves)}")
        skipped |= matched
    grid = Grid(recipe.bits, recipe.group_size, recipe.symmetric)
    assert recipe.quantizer is not None, "the recipe is resolved"
    weights = {
        name: WeightPlan(name, skeleton.shape(name), skeleton.dtype(name), recipe.quantizer, grid)
        for name in names
        if name not in skipped
    }
    if not weights:
        raise RecipeError("skip leaves no linear to compress")
    return Plan(weights)
