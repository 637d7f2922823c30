"""One Lagrange multiplier for the whole model: the one that makes the coded weights as large as the budget.

    bytes(lambda) = sum over the linears of bytes_i(lambda_i)

bytes_i was measured at some multipliers by coding some rows (measure/costs.py); between them the logarithms are
interpolated, and beyond the finest one bit an octave is added. lambda_i is lambda, but for two things: the user's
factor for a linear (`--plan`), and a cap. If the calibration text is short, a linear gets at least w times the average
bits of all linears, w = PRIOR / (tokens + PRIOR): a gradient measured on a few tokens may be small by chance.

Source: ours; equal slopes are Everett's theorem (1963). Memory: three numbers per linear and multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import BudgetError, RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parts.coding import rans
from llmsqueeze.quantizers.coded import PRIOR
from llmsqueeze.recipe.recipe import Recipe

COARSEST, FINEST = -60.0, 60.0  # binary logarithms of multipliers


def coded(plan: Plan, profile: Profile, recipe: Recipe, blocks: Sequence[Sequence[str]], target: int) -> Plan:
    """The method: see `Allocator`."""
    lacking = next((n for n, w in plan.weights.items() if w.end and n not in profile.moments), None)
    if lacking is not None:
        raise RecipeError(f"the profile does not know what {lacking} costs: it was measured without --code-embeddings")
    return allocate(plan, curves_of(plan, profile.curves), target, profile.labels)


@dataclass(frozen=True)
class Curve:
    """Bytes of a linear and its predicted loss at multipliers whose binary logarithms rise: float64 [points] each."""

    log_multiplier: np.ndarray
    nbytes: np.ndarray
    cost: np.ndarray
    numel: int

    @classmethod
    def of(cls, points: Tensor, numel: int) -> Curve:
        """points [3, points]: as `costs.coded_points` makes them."""
        at, nbytes, cost = points.double().numpy()
        return cls(at, np.minimum.accumulate(nbytes), np.maximum.accumulate(cost), numel)

    @property
    def finest(self) -> float:
        """The finest multiplier that steps are taken from, that of about eight bits. With finer ones many integers do
        not fit into a byte, and take twelve; and 16-bit weights have no more to tell."""
        return float(self.log_multiplier[0]) - 1

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
    """`plan` with the steps of one multiplier for `target` bytes in all. Raises BudgetError as `multiplier_for`."""
    return at_multiplier(plan, curves, multiplier_for(plan, curves, target, tokens), tokens)


def multiplier_for(plan: Plan, curves: Mapping[str, Curve], target: int, tokens: int) -> float:
    """The finest multiplier, as a binary logarithm, with which the plan takes at most `target` bytes. Raises
    BudgetError if even the coarsest steps take more."""
    low, high = COARSEST, FINEST
    smallest = at_multiplier(plan, curves, FINEST, tokens).nbytes
    if smallest > target:
        raise BudgetError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight, {target} bytes; steps and tables alone take "
            f"{8 * smallest / plan.numel:.3f}, {smallest} bytes"
        )
    for _ in range(60):
        middle = (low + high) / 2
        fits = at_multiplier(plan, curves, middle, tokens).nbytes <= target
        low, high = (low, middle) if fits else (middle, high)
    return high


def finest_multiplier(plan: Plan, curves: Mapping[str, Curve]) -> float:
    """The multiplier, as a binary logarithm, below which all linears keep their finest steps."""
    return min(curve.finest - math.log2(plan.weights[name].factor) for name, curve in curves.items())


def at_multiplier(plan: Plan, curves: Mapping[str, Curve], log_multiplier: float, tokens: int) -> Plan:
    """`plan` with the steps of this multiplier, and the bytes they are expected to take."""
    at = {
        name: max(log_multiplier + math.log2(plan.weights[name].factor), curve.finest) for name, curve in curves.items()
    }
    nbytes = {name: curve.bytes_at(at[name]) for name, curve in curves.items()}
    numel = sum(curve.numel for curve in curves.values())
    average, weight = sum(nbytes.values()) / max(numel, 1), PRIOR / (tokens + PRIOR)
    weights = {}
    for name, curve in curves.items():
        if nbytes[name] < weight * average * curve.numel:
            nbytes[name] = weight * average * curve.numel
            at[name] = max(curve.at_bytes(nbytes[name]), curve.finest)
            nbytes[name] = curve.bytes_at(at[name])
        weights[name] = replace(plan.weights[name], step=2.0 ** at[name], coded_nbytes=math.ceil(nbytes[name]))
    return plan.having(weights)


def predicted_of_steps(plan: Plan, curves: Mapping[str, Curve]) -> float:
    """Loss increase (nats per token) of the plan's steps."""
    return sum(curve.cost_at(math.log2(plan.weights[name].step)) for name, curve in curves.items())
