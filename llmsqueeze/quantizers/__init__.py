"""Quantizers: how one weight matrix is rounded.

The rounding method NAME is the function NAME in the file NAME.py of this folder, with the signature of `Rounder`. A new
method is one such file here, and one entry in the table of methods (recipe/).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.recipe.methods import in_room

# rows are independent, so a weight is rounded some rows at a time; a GPU is kept busy only by many
ROUNDING_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}


class Rounder(Protocol):
    """The signature of every rounding method."""

    def __call__(
        self,
        weight: Tensor,
        grid: Grid,
        dtype: torch.dtype,
        curvature: Curvature,
        pinned: Tensor | None = None,
        search: bool = False,
    ) -> Rounded:
        """Rounds `weight` [rows, cols] (float32) to `grid` under the curvature of the output error.

        `dtype`: of the scales in the file. `pinned` bool [rows, cols]: outliers, which get the code of level 0.
        `search`: search the scales under the curvature's diagonal, instead of taking them from the range.
        """
        ...


def rounder(name: str) -> Rounder:
    """The rounding method of this name. Raises ValueError if no file here has it."""
    method: Rounder = in_room(__name__, name, f"no rounding method {name}")
    return method


def rows_at_a_time(weight: Tensor) -> int:
    """How many rows of `weight` [rows, cols] are rounded at once."""
    return max(1, ROUNDING_BYTES[weight.device.type] // (4 * weight.shape[1]))
