"""Allocation: which weights get more bits, or stay as they are.

The method NAME, if it decides anything, is the function NAME in the file NAME.py of this folder, with the signature of
`Allocator`. A new method is one such file here, and one entry in the table of methods (recipe/).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.measure.profile import Profile
from llmsqueeze.recipe.methods import in_room
from llmsqueeze.recipe.recipe import Recipe

UNBOUNDED = sys.maxsize  # bytes


class Allocator(Protocol):
    """The signature of every method that decides."""

    def __call__(
        self, plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int
    ) -> Plan:
        """`plan` with the grids or steps of every linear.

        `blocks`: the linears of each decoder block. `target`: bytes that all linears may take; UNBOUNDED if the recipe
        has no budget. Raises RecipeError if nothing fits.
        """
        ...


def allocator(name: str) -> Allocator:
    """The method of this name. Raises ValueError if no file here has it."""
    method: Allocator = in_room(__name__, name, f"no method {name} decides")
    return method
