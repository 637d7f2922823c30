"""Coded weights rounded again onto a grid that compressed-tensors holds, and what that costs.

    predicted loss = sensitivity * sum over r, j of ((w - rounded) / step[r, j])^2

Neither the calibration text nor the gradient is there any more, but the steps remember both: a step of row r and column
j is lambda * u[j] / sqrt(g[r]), so an error in steps says what it costs (quantize/coded.py), and the scales of the grid
are searched under the inverse squares of the column steps. Errors of w from the original are in neither: w is what the
coded folder holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmsqueeze import parts
from llmsqueeze.parts import Affine, Grid, Integers, Part
from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.rtn import rtn


def reround(held: Sequence[Part], grid: Grid) -> tuple[Affine, float]:
    """The sum of `held`, coded integers among them, on the grid; and the sum of the squared errors in steps."""
    weight = parts.sum_of_parts(held)
    integers = next(part for part in held if isinstance(part, Integers))
    rows, cols = (powers(exponent) for exponent in integers.exponents())
    rounded = rtn(weight, grid, integers.dtype, Curvature.of_columns(cols.pow(-2)), search=True)
    error = (weight - rounded.dense()).div_(cols).div_(rows[:, None])
    made = parts.of_codes(rounded.codes, rounded.scale, rounded.zero, grid)
    assert isinstance(made, Affine)
    return made, float(error.square_().sum())
