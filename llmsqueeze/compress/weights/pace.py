"""The pace of a run that codes weights within a budget.

    octaves = shift of all steps to come, so that  spent + ratio * predicted(octaves) = budget

The bytes that the linears already written took give the ratio to the prediction, and the steps of those still to come
make up for it. The last fusion group is coded again and again until the whole is just under the budget. The multiplier
(allocation/coded.py) so moves by a few hundredths, which costs to second order only. Source: ours. Memory: one
result of the last group besides the one in hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from llmsqueeze.allocation.coded import Curve
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import BudgetError

SLACK = 0.005  # of the budget: the result is under it by no more
BELOW = 0.002  # of the budget: the last group is to come out so far below it
TRIES = 12
MOST_OCTAVES = 4.0  # that the last group's steps may be away from the plan's
CREDIT = 0.1  # of the whole: how much of it has to be coded before its surprises count half
R = TypeVar("R")


class Pace:
    """Keeps a run within its budget: the bytes written so far say how the steps of the rest have to be."""

    def __init__(self, plan: Plan, curves: Mapping[str, Curve], target: int) -> None:
        self.plan, self.curves, self.target = plan, curves, target
        self.spent: dict[str, int] = {}
        self.expected = 0.0  # bytes predicted for what was written, at its steps

    def state(self) -> dict[str, Any]:
        """What was written so far, as JSON."""
        return {"spent": dict(self.spent), "expected": self.expected}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of another run of the same plan."""
        self.spent, self.expected = dict(state["spent"]), state["expected"]

    def shift(self, names: Sequence[str]) -> float:
        """By how many octaves the steps of `names`, which are next, differ from the plan's."""
        left = [name for name in self.plan.weights if name not in self.spent and name in self.curves]
        rest = self.target - sum(self.spent.values()) - len(left)  # a byte each for rounding
        rest -= sum(self.plan.weights[n].nbytes for n in self.plan.weights if n not in self.spent and n not in left)
        fixed = sum(self.plan.weights[name].nbytes - self.plan.weights[name].coded_nbytes for name in left)
        at = {name: math.log2(self.plan.weights[name].step) for name in left}
        ratio, low, high = self._surprise(), -8.0, 8.0
        for _ in range(50):
            middle = (low + high) / 2
            coded = (self.curves[n].bytes_at(max(at[n] + middle, self.curves[n].finest)) for n in left)
            nbytes = ratio * sum(coded) + fixed
            low, high = (low, middle) if nbytes <= rest else (middle, high)
        return max(high, self._finest(names))

    def _finest(self, names: Sequence[str]) -> float:
        """The least octaves at which none of the linears gets finer steps than are taken at all."""
        coded = [name for name in names if name in self.curves]
        return max((self.curves[n].finest - math.log2(self.plan.weights[n].step) for n in coded), default=-math.inf)

    def _surprise(self) -> float:
        """How much larger than predicted the rest is likely to be, from what was written, the less of it the less."""
        prior = CREDIT * self.plan.nbytes
        return (sum(self.spent.values()) + prior) / (self.expected + prior)

    def _expect(self, names: Sequence[str], shift: float) -> float:
        """Bytes of `names` with steps `shift` octaves coarser than planned."""
        total = 0.0
        for name in names:
            planned = self.plan.weights[name]
            total += planned.nbytes
            if name in self.curves:
                total += self.curves[name].bytes_at(math.log2(planned.step) + shift) - planned.coded_nbytes
        return total

    def within_budget(
        self, names: Sequence[str], compress_at: Callable[[float], R], nbytes: Callable[[R], dict[str, int]]
    ) -> R:
        """The linears `names`, which are next, compressed by `compress_at` (octaves -> result); `nbytes` of a result,
        by linear.

        The last ones are compressed until they fit. Raises BudgetError if they do not.
        """
        octaves = self.shift(names)
        result = compress_at(octaves)
        if set(self.plan.weights) <= {*self.spent, *names}:
            result = self._fitted(names, octaves, result, compress_at, nbytes)
        self.spent |= nbytes(result)
        self.expected += self._expect([name for name in names if name in self.plan.weights], octaves)
        return result

    def _fitted(
        self,
        names: Sequence[str],
        octaves: float,
        result: R,
        compress_at: Callable[[float], R],
        nbytes: Callable[[R], dict[str, int]],
    ) -> R:
        room, slack = self.target - sum(self.spent.values()), SLACK * self.target
        bit = sum(self.plan.weights[name].numel for name in names) / 8
        tried: list[tuple[float, int]] = []
        finest = max(-MOST_OCTAVES, self._finest(names))
        best: tuple[float, R] | None = None
        for _ in range(TRIES):
            size = sum(nbytes(result).values())
            tried.append((octaves, size))
            if size <= room:
                if best is None or octaves < best[0]:
                    best = (octaves, result)
                if size >= room - slack or (octaves <= finest and all(one <= room for _, one in tried)):
                    break
            octaves = max(_nearer(tried, room, BELOW * self.target, bit), finest)
            result = compress_at(octaves)
        if best is None:
            raise BudgetError(
                f"the linears coded before {names[0]} leave {room} bytes of the budget, and it does not fit into them; "
                "ask for a little more"
            )
        return best[1]


def _nearer(tried: Sequence[tuple[float, int]], room: int, below: float, bit: float) -> float:
    """Octaves at which the size may be `below` the room, from the (octaves, size) that were tried: by the slope
    between the two nearest to it, or of one bit an octave, `bit` bytes."""
    over = max((one for one in tried if one[1] > room), default=None)
    fits = min((one for one in tried if one[1] <= room), default=None)
    if over is not None and fits is not None:
        part = (over[1] - room + below) / (over[1] - fits[1])
        return over[0] + min(max(part, 0.1), 0.9) * (fits[0] - over[0])
    at, size = tried[-1]
    slope = bit
    if len(tried) > 1 and at != tried[-2][0]:
        slope = max((tried[-2][1] - size) / (at - tried[-2][0]), bit / 16)
    return min(max(at + (size - room + below) / slope, -MOST_OCTAVES), MOST_OCTAVES)
