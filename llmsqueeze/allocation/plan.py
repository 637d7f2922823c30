"""What was decided: for every linear its quantizer, grids and number of outliers, with the bytes that costs exactly.

Decisions are counts: how many rows of a linear have which grid. Which rows they are follows from a ranking of the rows
(the first grid takes the best-ranked ones), as the outliers follow from theirs. `specs` is the same description that
the file carries, so planned bytes and written bytes cannot differ.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from llmsqueeze import parts
from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.model.linears import is_transposed
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import Grid, Spec
from llmsqueeze.recipe.conflicts import unportable
from llmsqueeze.recipe.recipe import Recipe

Format = Literal["native", "compressed-tensors"]
BESIDE_NBYTES: dict[Format, int] = {"native": 0, "compressed-tensors": 16}  # the latter stores each weight's shape
BESIDE_GROUPS = {8: (128, 64, 32), 4: (32, 64, 128)}  # width -> group sizes of what is rounded beside the budget
TOWER_BITS = 8
UNMEASURED_BITS = 7  # of a weight in a linear to be coded that no sample reaches


@dataclass(frozen=True)
class Rows:
    """How many rows of a linear are on a grid, and how many weights of each of them stay as they are."""

    grid: Grid
    count: int
    outliers: int = 0


Grids = tuple[Rows, ...]


@dataclass(frozen=True)
class WeightPlan:
    """One linear: shape [rows, cols], the dtype its scales and outliers are stored in, and what it becomes.

    grids: how many rows are on which grid, the best-ranked rows first; none for a coded linear. outliers: how many
    weights stay as they are by a ranking of single weights (GWQ's), over those that `grids` give to rows. rank: of the
    low-rank compensation. end: embeddings or head.

    Of a coded linear: step: the multiplier of its steps; factor: that multiplier over the model's; coded_nbytes:
    expected bytes of its coded part. rates: expected bits of a code on a grid, if codes are stored entropy-coded.
    final: the parts after compression, if their sizes are not known before. pieces: how many linears of the Hub's files
    it is (an expert's gate and up are one linear here).
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    quantizer: str
    grids: Grids = ()
    outliers: int = 0
    rank: int = 0
    step: float = 0.0
    factor: float = 1.0
    coded_nbytes: int = 0
    rates: tuple[tuple[Grid, float], ...] = ()
    final: tuple[Spec, ...] = ()
    end: bool = False
    pieces: int = 1

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def coded(self) -> bool:
        """Whether it is coded, not on grids."""
        return self.quantizer == "coded"

    @property
    def grid(self) -> Grid:
        """The grid of most rows."""
        return max(self.grids, key=lambda rows: rows.count).grid

    @property
    def mixed(self) -> bool:
        return len(self.grids) > 1

    @property
    def code_bits(self) -> float:
        """Mean width of the codes; of a coded linear the bits of a weight."""
        if self.coded:
            words = sum(2 * spec["words"] for spec in self.final if spec["part"] == "coded")
            return (words or self.coded_nbytes) * 8 / self.numel
        return sum(rows.grid.bits * rows.count for rows in self.grids) / self.shape[0]

    @property
    def kept(self) -> int:
        """All weights that stay as they are."""
        return self.outliers + sum(rows.count * rows.outliers for rows in self.grids)

    @property
    def specs(self) -> list[Spec]:
        """The file's description of its parts; before compression without the coded one."""
        if self.final:
            return list(self.final)
        mixed = len(self.by_grid) > 1
        specs = [parts.grid_spec(grid, self.dtype, n if mixed else None) for grid, n in self.by_grid.items()]
        specs += [parts.lowrank_spec(self.rank, self.dtype)] if self.rank else []
        return [*specs, parts.sparse_spec(self.kept, self.dtype)] if self.kept else specs

    @property
    def by_grid(self) -> dict[Grid, int]:
        """How many rows each grid has, in the order of `grids`."""
        counts: dict[Grid, int] = {}
        for rows in self.grids:
            counts[rows.grid] = counts.get(rows.grid, 0) + rows.count
        return counts

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        expected = 0 if self.final else self.coded_nbytes - self.saved_nbytes
        return parts.layout_nbytes(self.shape, self.specs) + expected

    @property
    def saved_nbytes(self) -> int:
        """Bytes that entropy-coded codes are expected to save."""
        return int(sum(self.saved_of_row(grid) * count for grid, count in self.by_grid.items()))

    def saved_of_row(self, grid: Grid) -> float:
        """The same, of a row on this grid."""
        rate = dict(self.rates).get(grid, float(grid.bits))
        return (grid.bits - rate) * self.shape[1] / 8

    def on(self, *grids: Rows) -> WeightPlan:
        """The same linear with these grids; those without rows are left out, neighbours that agree are joined."""
        joined: list[Rows] = []
        for rows in grids:
            if joined and replace(joined[-1], count=rows.count) == rows:
                joined[-1] = replace(rows, count=joined[-1].count + rows.count)
            elif rows.count:
                joined.append(rows)
        assert sum(rows.count for rows in joined) == self.shape[0], "every row has one grid"
        return replace(self, grids=tuple(joined))


@dataclass(frozen=True)
class Plan:
    """The linears to compress, and the format of the result. Everything else stays as it is, but for what is rounded
    to a fixed width beside them: linears of other towers and projectors, embeddings and head. A budget of bits does
    not count it."""

    weights: Mapping[str, WeightPlan]
    format: Format = "native"
    beside: Mapping[str, WeightPlan] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored for the linears."""
        return sum(self.nbytes_of(name) for name in self.weights)

    def nbytes_of(self, name: str) -> int:
        """Bytes of everything stored for one linear."""
        return self.weights[name].nbytes + BESIDE_NBYTES[self.format] * self.weights[name].pieces

    @property
    def towers(self) -> dict[str, WeightPlan]:
        """The rounded linears of other towers and projectors."""
        return {name: weight for name, weight in self.beside.items() if not weight.end}

    @property
    def ends(self) -> dict[str, WeightPlan]:
        """The rounded embeddings and head."""
        return {name: weight for name, weight in self.beside.items() if weight.end}

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every linear's scales and outliers."""
        return {name: weight.dtype for name, weight in self.weights.items()}

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized linears, in bits, per weight of theirs."""
        return self.nbytes * 8 / self.numel

    @property
    def code_bits(self) -> float:
        """Mean width of the codes; a whole number where it is one."""
        mean = round(sum(weight.code_bits * weight.numel for weight in self.weights.values()) / self.numel, 6)
        return int(mean) if mean == int(mean) else mean

    @property
    def mixed(self) -> bool:
        """Whether any linear has rows on different grids."""
        return any(weight.mixed for weight in self.weights.values())

    @property
    def portable(self) -> bool:
        """Whether it is to be written as compressed-tensors."""
        return self.format == "compressed-tensors"

    def on(self, grids: Mapping[str, Grids]) -> Plan:
        """The same linears, those named with other grids."""
        return self.having({name: self.weights[name].on(*rows) for name, rows in grids.items()})

    def having(self, weights: Mapping[str, WeightPlan]) -> Plan:
        """The same plan with these linears instead of those of their names."""
        return replace(self, weights={**self.weights, **weights})

    def only(self, weights: Mapping[str, WeightPlan]) -> Plan:
        """These linears alone, in the same format."""
        return replace(self, weights=weights)


def planned_linears(skeleton: Skeleton, skip: Sequence[str]) -> list[str]:
    """The linears that can be compressed, but those that `skip` names. Raises RecipeError for a pattern that matches
    none."""
    names = skeleton.all_linears
    skipped = set()
    for pattern in skip:
        matched = {name for name in names if fnmatch.fnmatch(name, pattern) or leaf(name) == pattern}
        if not matched:
            leaves = sorted({leaf(name) for name in names})
            hint = nearest(pattern, [*leaves, *names])
            raise RecipeError(f"--skip {pattern!r} matches no linear{hint or ';'} there are {', '.join(leaves)}")
        skipped |= matched
    return [name for name in names if name not in skipped]


def leaf(linear: str) -> str:
    """The last part of a linear's name, for an expert's without its number."""
    return next(part for part in reversed(linear.split(".")) if not part.isdigit())


def fused(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The linears `names` as fusion groups; those that are in none of `groups` come last, each alone."""
    together = [tuple(name for name in group if name in names) for group in groups]
    grouped = {name for group in together for name in group}
    return [*filter(None, together), *((name,) for name in names if name not in grouped)]


def dtype_of_parts(stored: torch.dtype) -> torch.dtype:
    """The dtype of scales and outliers of a weight that is stored so: nothing here computes in more than float32."""
    return torch.float32 if stored == torch.float64 else stored


def base_plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Every linear on the recipe's grid, but those that `skip` names."""
    weights = {name: _base_weight(skeleton, name, recipe) for name in planned_linears(skeleton, recipe.skip)}
    if not weights:
        raise RecipeError("--skip leaves no linear to compress")
    if (recipe.code_embeddings or recipe.embeddings) and skeleton.is_enclosed:
        option = "--code-embeddings" if recipe.code_embeddings else f"--embeddings {recipe.embeddings}"
        raise RecipeError(f"{option} does not apply: this model is compressed as one block, with its embeddings in it")
    if recipe.code_embeddings:
        weights = {name: _to_be_coded(skeleton, name, end=True) for name in skeleton.ends} | weights
    why = why_native(recipe, skeleton, weights)
    if why and recipe.portable:
        raise RecipeError(f"--portable contradicts {why}")
    if why or recipe.portable is False:
        return Plan(weights, beside=plans_beside(skeleton, recipe))
    return Plan(weights, "compressed-tensors")


def plans_beside(skeleton: Skeleton, recipe: Recipe) -> dict[str, WeightPlan]:
    """What is rounded to a fixed width beside the linears."""
    towers = _tower_plans(skeleton) if recipe.rounds_towers else {}
    ends = skeleton.ends if recipe.embeddings else []
    return towers | {name: _rounded(skeleton, name, recipe.embeddings, end=True) for name in ends}


def _tower_plans(skeleton: Skeleton) -> dict[str, WeightPlan]:
    """The linears of other towers and projectors, at 8 bits. Raises RecipeError if there are none."""
    names = skeleton.tower_linears
    if not names:
        kind = type(skeleton.model).__name__
        raise RecipeError(f"--vision rtn8 belongs to multimodal models: {kind} has no tower for another sense")
    return {name: _rounded(skeleton, name, TOWER_BITS) for name in names}


def _rounded(skeleton: Skeleton, name: str, bits: int, end: bool = False) -> WeightPlan:
    """A weight that is rounded to nearest at a fixed width."""
    rows, cols = shape = skeleton.shape(name)
    size = next((size for size in BESIDE_GROUPS[bits] if cols % size == 0), -1)
    grids = (Rows(Grid(bits, size, True), rows),)
    return WeightPlan(name, shape, dtype_of_parts(skeleton.dtype(name)), "rtn", grids, end=end)


def _base_weight(skeleton: Skeleton, name: str, recipe: Recipe) -> WeightPlan:
    rows, cols = shape = skeleton.shape(name)
    if recipe.rank > min(shape):
        raise RecipeError(f"--lorc-rank {recipe.rank} is more than {name} has: it is {rows} x {cols}")
    if recipe.quantizer == "coded":
        return replace(_to_be_coded(skeleton, name), rank=recipe.rank)
    grids = (Rows(recipe_grid(recipe, recipe.code_bits), rows),)
    dtype, pieces = dtype_of_parts(skeleton.dtype(name)), skeleton.pieces(name)
    return WeightPlan(name, shape, dtype, recipe.quantizer, grids, rank=recipe.rank, pieces=pieces)


def _to_be_coded(skeleton: Skeleton, name: str, end: bool = False) -> WeightPlan:
    rows, cols = shape = skeleton.shape(name)
    expected = rows * cols * UNMEASURED_BITS // 8
    return WeightPlan(name, shape, dtype_of_parts(skeleton.dtype(name)), "coded", coded_nbytes=expected, end=end)


def why_native(recipe: Recipe, skeleton: Skeleton, weights: Mapping[str, WeightPlan]) -> str | None:
    """What the recipe makes of these linears that compressed-tensors has no place for, and why; None if nothing. A
    folder that stock transformers does not open is written only if the recipe asks for it."""
    reason = next((f"{setting}: {why}" for setting, why in unportable(recipe)), None)
    reason = reason or unfit(recipe, skeleton, weights)
    if reason is None and recipe.portable is None:
        reason = skeleton.obstacle_in_stock
    return reason


def unfit(recipe: Recipe, skeleton: Skeleton, weights: Mapping[str, WeightPlan]) -> str | None:
    """What of the linears themselves compressed-tensors has no place for, whatever becomes of them."""
    transposed = next((name for name in weights if is_transposed(skeleton.module(name))), None)
    if transposed is not None:
        return f"{transposed}: a weight that is stored transposed (Conv1D)"
    if isinstance(skeleton.experts_in_files, str):
        return skeleton.experts_in_files
    if shared := next((name for name in skeleton.shared if name in weights), None):
        return f"{shared}: a weight that {len(skeleton.sharing(shared))} linears share"
    shapes = {name: weight.shape for name, weight in weights.items()}
    return short_groups(shapes, recipe.group_sizes or (recipe.group_size,))


def short_groups(shapes: Mapping[str, tuple[int, int]], sizes: Sequence[int]) -> str | None:
    """A group size that leaves a short last group, which compressed-tensors does not have, and which would not."""
    for size in sizes:
        uneven = [name for name, (_, cols) in shapes.items() if size != -1 and cols % min(size, cols)]
        if uneven:
            fitting = [g for g in (128, 64, 32, 16, 8) if not any(cols % g for _, cols in shapes.values())]
            hint = f"--group-size {fitting[0]}, or -1 for whole rows" if fitting else "--group-size -1 for whole rows"
            name = uneven[0]
            return f"group size {size}: it does not divide the {shapes[name][1]} columns of {name}; take {hint}"
    return None


def dual_grid(recipe: Recipe) -> Grid:
    """The recipe's grid for dual binarization."""
    return Grid(2, recipe.group_size, symmetric=True, dual=True)


def recipe_grid(recipe: Recipe, bits: int) -> Grid:
    """The recipe's grid at another width; one bit has half-integer levels only, and by width so have two."""
    if recipe.levels == "dual":
        return dual_grid(recipe)
    half = bits == 1 or (recipe.symmetric and (recipe.levels == "half" or (recipe.levels == "by-width" and bits == 2)))
    return Grid(bits, recipe.group_size, recipe.symmetric or half, half)
