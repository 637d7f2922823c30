"""Coded weights rounded onto a grid that compressed-tensors can represent, and the predicted cost of that.

    predicted loss = sensitivity * sum over r, j of ((w - rounded) / step[r, j])^2

The calibration text and the gradient are gone, but the steps keep both: the step of row r and column j is
lambda * u[j] / sqrt(g[r]) (quantizers/coded.py), so an error in steps gives its cost, and the scales of the grid are
searched under the inverse squares of the column steps. Errors of w from the original are in neither: w is the weight in
the coded folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsqueeze import parts
from llmsqueeze.allocation.plan import short_groups
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats.entries import Entry
from llmsqueeze.parts import Affine, Coded, Grid, Integers, Part
from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.values import group_size as checked_group_size
from llmsqueeze.recipe.values import whole

GROUP_SIZES = (128, 64, 32)  # the first that leaves no short group is the default


def grid_for(entries: Mapping[str, Entry], portable: bool, bits: int | None, group_size: int | None) -> Grid | None:
    """The grid for coded weights; None if there are none or if they stay coded (not `portable`).

    Raises RecipeError for bits or a group size if nothing is rounded, and for those that do not fit.
    """
    if not portable or not any(spec["part"] == Coded.kind for entry in entries.values() for spec in entry.specs):
        for name, value in (("--bits", bits), ("--group-size", group_size)):
            if value is not None:
                raise RecipeError(
                    f"{name} {value} does not apply: only --to compressed-tensors rounds weights again, and only "
                    "coded ones"
                )
        return None
    width = whole(2, 8)("bits", 4 if bits is None else bits)
    shapes = {name: entry.shape for name, entry in entries.items()}
    if group_size is None:
        fitting = (size for size in GROUP_SIZES if short_groups(shapes, [size]) is None)
        return Grid(width, next(fitting, -1), symmetric=True)
    if why := short_groups(shapes, [checked_group_size("group_size", group_size)]):
        raise RecipeError(why)
    return Grid(width, group_size, symmetric=True)


def predicted_cost(record: Mapping[str, Any], squares: Mapping[str, float]) -> float | None:
    """Predicted loss (nats per token) of squared errors in steps; None if the folder's record has no sensitivities."""
    sensitivities = record.get("sensitivities", {})
    if any(name not in sensitivities for name in squares):
        return None
    return float(sum(sensitivities[name] * square for name, square in squares.items()))


def reround(weight_parts: Sequence[Part], grid: Grid) -> tuple[Affine, float]:
    """The sum of the parts, coded integers among them, on the grid; and the sum of the squared errors in steps."""
    weight = parts.sum_of_parts(weight_parts)
    integers = next(part for part in weight_parts if isinstance(part, Integers))
    rows, cols = (powers(exponent) for exponent in integers.exponents())
    rounded = rtn(weight, grid, integers.dtype, Curvature.of_diagonal(cols.pow(-2)), search=True)
    error = (weight - rounded.dense()).div_(cols).div_(rows[:, None])
    return Affine.from_codes(rounded.codes, rounded.scale, rounded.zero, grid), float(error.square_().sum())
