"""What `eval` and `compare` are asked for of a text; nothing heavy is imported here. Of tasks: tasks/options.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.values import choice, whole

PAPERS = "papers"
PROTOCOLS = (PAPERS,)

Limit = int | float


@dataclass(frozen=True)
class Reading:
    """How a text is read; losses/windows.py says which tokens count.

    window: tokens in a window; None: the context of the model, at most 2048. stride: tokens between the beginnings of
    two windows; None: they do not overlap. protocol: `papers`, or None. limit: how many of the windows are read, or
    which share of them; None: all.
    """

    window: int | None = None
    stride: int | None = None
    protocol: str | None = None
    limit: Limit | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for values that are out of range or contradict each other."""
        limit_of(self.limit)
        for name, value, least in (("seq_len", self.window, 2), ("stride", self.stride, 1)):
            if value is not None:
                whole(least)(name, value)
        if self.protocol is not None:
            choice(PROTOCOLS)("protocol", self.protocol)
            if self.stride is not None:
                raise RecipeError("--protocol papers has windows that do not overlap; leave out --stride")
        if self.stride is not None and self.window is not None and self.stride >= self.window:
            raise RecipeError(f"--stride is {self.stride}; it must be below the window of {self.window} tokens")


def limit_of(value: str | Limit | None) -> Limit | None:
    """`--limit`: a whole number of windows and documents, from 1, or a share of them between 0 and 1."""
    if value is None:
        return None
    refusal = RecipeError(f"--limit is {value}; it must be a whole number from 1, or a share such as 0.1, below 1")
    try:
        number = float(value)
    except ValueError as error:
        raise refusal from error
    if isinstance(value, bool) or not (0 < number < 1 or (number >= 1 and number.is_integer())):
        raise refusal
    return number if number < 1 else int(number)


def part_of(total: int, limit: Limit | None) -> int:
    """How many of `total` a limit leaves, counted as lm-eval counts: at least one."""
    if limit is None:
        return total
    return min(total, math.ceil(total * limit) if limit < 1 else int(limit))
