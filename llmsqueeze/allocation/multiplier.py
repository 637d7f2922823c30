"""One Lagrange multiplier for the whole model: which one makes the coded weights as large as the budget.

    bytes(lambda) = sum over the linears of bytes_i(lambda_i)

bytes_i was measured at some multipliers by coding some rows (price.py); between them the logarithms are interpolated,
and beyond the finest one bit an octave is added. lambda_i is lambda, but for two things: the user's factor for a linear
(`--plan`), and a cap. Where the calibration text is thin a linear gets at least `w` times what all linears get on
average, w = PRIOR / (tokens + PRIOR): a gradient measured on a few tokens may be small by chance.

The last pass is measured: what the linears already written took says how far off the prediction is, and the steps of
those still to come make up for it (`Pace`), until the last fusion group is coded again and again until the whole is
just under the budget. The multiplier so wanders by a few hundredths, which costs to second order only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import BudgetError
from llmsqueeze.parts.coding import rans
from llmsqueeze.quantizers.coded import PRIOR

SLACK = 0.005  # of the budget: the result is under it by no more
AIM = 0.002  # of the budget: the last group aims this far below it
TRIES = 12
MOST_OCTAVES = 4.0  # that the last group's steps may be away from the plan's
M = TypeVar("M")
CREDIT = 0.1  # of the whole: how much of it has to be coded before its surprises count half
COARSEST, FINEST = -60.0, 60.0  # binary logarithms of multipliers


@dataclass(frozen=True)
class Curve:
    """Bytes of a linear and its predicted loss at multipliers whose binary logarithms rise: float64 [points] each."""

    log_multiplier: np.ndarray
    nbytes: np.ndarray
    cost: np.ndarray
    numel: int

    @classmethod
    def of(cls, points: Tensor, numel: int) -> Curve:
        """points [3, points]: as `price.coded_points` makes them."""
        at, nbytes, cost = points.double().numpy()
        return cls(at, np.minimum.accumulate(nbytes), np.maximum.accumulate(cost), numel)

    def bytes_at(self, log_multiplier: float) -> float:
        finer = max(0.0, float(self.log_multiplier[0]) - log_multiplier)
        return float(np.interp(log_multiplier, self.log_multiplier, self.nbytes)) + finer * self.numel / 8

    def cost_at(self, log_multiplier: float) -> float:
        finer = max(0.0, float(self.log_multiplier[0]) - log_multiplier)
        logs = np.log(np.maximum(self.cost, 1e-300))
        return math.exp(float(np.interp(log_multiplier, self.log_multiplier, logs)) - 2 * math.log(2) * finer)

    def at_bytes(self, nbytes: float) -> float:
        """The coarsest multiplier with at least so many bytes, as a binary logarithm."""
        if nbytes > self.nbytes[0]:
            return float(self.log_multiplier[0] - (nbytes - self.nbytes[0]) * 8 / self.numel)
        i = int(np.searchsorted(-self.nbytes, -nbytes, side="right")) - 1
        if i == len(self.nbytes) - 1:
            return float(self.log_multiplier[-1])
        part = (self.nbytes[i] - nbytes) / (self.nbytes[i] - self.nbytes[i + 1])
        return float(self.log_multiplier[i] + part * (self.log_multiplier[i + 1] - self.log_multiplier[i]))


def least_nbytes(shape: tuple[int, int]) -> int:
    """Bytes of a coded linear whose integers are all 0: steps, one table, empty streams."""
    rows, cols = shape
    streams = -(-rows // rans.rows_per_stream(rows, cols))
    return rows + cols + 2 + 6 * streams + 2 + 4


def curves_of(plan: Plan, points: Mapping[str, Tensor]) -> dict[str, Curve]:
    """The curves of the planned linears that were measured."""
    return {name: Curve.of(points[name], w.numel) for name, w in plan.weights.items() if name in points}


def allocate(plan: Plan, curves: Mapping[str, Curve], target: int, tokens: int) -> Plan:
    """`plan` with the steps of one multiplier for `target` bytes in all. Raises BudgetError where none is so small."""
    low, high = COARSEST, FINEST
    smallest = sum(w.nbytes for w in at_multiplier(plan, curves, FINEST, tokens).weights.values())
    if smallest > target:
        raise BudgetError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight, {target} bytes; steps and tables alone take "
            f"{8 * smallest / plan.numel:.3f}, {smallest} bytes"
        )
    for _ in range(60):
        middle = (low + high) / 2
        fits = at_multiplier(plan, curves, middle, tokens).nbytes <= target
        low, high = (low, middle) if fits else (middle, high)
    return at_multiplier(plan, curves, high, tokens)


def at_multiplier(plan: Plan, curves: Mapping[str, Curve], log_multiplier: float, tokens: int) -> Plan:
    """`plan` with the steps of this multiplier, and the bytes they are expected to take."""
    at = {name: log_multiplier + math.log2(plan.weights[name].factor) for name in curves}
    wanted = {name: curve.bytes_at(at[name]) for name, curve in curves.items()}
    numel = sum(curve.numel for curve in curves.values())
    average, weight = sum(wanted.values()) / max(numel, 1), PRIOR / (tokens + PRIOR)
    made = dict(plan.weights)
    for name, curve in curves.items():
        if wanted[name] < weight * average * curve.numel:
            wanted[name] = weight * average * curve.numel
            at[name] = curve.at_bytes(wanted[name])
        made[name] = replace(plan.weights[name], step=2.0 ** at[name], coded_nbytes=math.ceil(wanted[name]))
    return Plan(made)


def predicted(plan: Plan, curves: Mapping[str, Curve]) -> float:
    """Loss increase (nats per token) of the plan's steps."""
    return sum(curve.cost_at(math.log2(plan.weights[name].step)) for name, curve in curves.items())


class Pace:
    """Keeps a run within its budget: what was written so far says how the steps of the rest have to be."""

    def __init__(self, plan: Plan, curves: Mapping[str, Curve], target: int) -> None:
        self.plan, self.curves, self.target = plan, curves, target
        self.spent: dict[str, int] = {}
        self.expected = 0.0  # bytes of what was written, at the steps that it was given

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
            wanted = ratio * sum(self.curves[name].bytes_at(at[name] + middle) for name in left) + fixed
            low, high = (low, middle) if wanted <= rest else (middle, high)
        return high

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

    def settle(self, names: Sequence[str], attempt: Callable[[float], M], nbytes: Callable[[M], dict[str, int]]) -> M:
        """What becomes of `names`, which are next, by `attempt` (octaves -> what is made); `nbytes` of it, by linear.

        The last ones are made until they fit. Raises BudgetError if they do not.
        """
        at = self.shift(names)
        made = attempt(at)
        if set(self.plan.weights) <= {*self.spent, *names}:
            made = self._fitted(names, at, made, attempt, nbytes)
        self.spent |= nbytes(made)
        self.expected += self._expect([name for name in names if name in self.plan.weights], at)
        return made

    def _fitted(
        self,
        names: Sequence[str],
        at: float,
        made: M,
        attempt: Callable[[float], M],
        nbytes: Callable[[M], dict[str, int]],
    ) -> M:
        room, slack = self.target - sum(self.spent.values()), SLACK * self.target
        bit = sum(self.plan.weights[name].numel for name in names) / 8
        known: list[tuple[float, int]] = []
        fits: tuple[float, M] | None = None
        for _ in range(TRIES):
            size = sum(nbytes(made).values())
            known.append((at, size))
            if size <= room:
                if fits is None or at < fits[0]:
                    fits = (at, made)
                if size >= room - slack or (at <= -MOST_OCTAVES and all(one <= room for _, one in known)):
                    break
            at = _nearer(known, room, AIM * self.target, bit)
            made = attempt(at)
        if fits is None:
            raise BudgetError(
                f"what was coded before {names[0]} leaves {room} bytes of the budget, in which it does not fit; ask "
                "for a little more"
            )
        return fits[1]


def _nearer(known: Sequence[tuple[float, int]], room: int, below: float, bit: float) -> float:
    """Octaves at which the size may be `below` the room, from those (octaves, size) that were tried: by the slope
    between the two nearest to it, or of one bit an octave, `bit` bytes."""
    over = max((one for one in known if one[1] > room), default=None)
    fits = min((one for one in known if one[1] <= room), default=None)
    if over is not None and fits is not None:
        part = (over[1] - room + below) / (over[1] - fits[1])
        return over[0] + min(max(part, 0.1), 0.9) * (fits[0] - over[0])
    at, size = known[-1]
    slope = bit
    if len(known) > 1 and at != known[-2][0]:
        slope = max((known[-2][1] - size) / (at - known[-2][0]), bit / 16)
    return min(max(at + (size - room + below) / slope, -MOST_OCTAVES), MOST_OCTAVES)
