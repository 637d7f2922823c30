"""A fusion group compressed: the parts of its linears, and the weights that are their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.weights.weight import WeightSettings, compress_weight
from llmsqueeze.formats.verify import named
from llmsqueeze.parts import LowRank, Part
from llmsqueeze.quantizers import coded
from llmsqueeze.quantizers.curvature import Curvature


class Compressed(NamedTuple):
    """A linear's parts, their sum [rows, cols], and its relative output error. sensitivity: of a coded linear, the cost
    of rounding it again: nats per token and square of an error in steps. chance: the share of its inputs' moments that
    is chance, if they were measured. tokens: of an expert, how many were sent to it."""

    parts: Sequence[Part]
    dense: Tensor
    error: float
    sensitivity: float | None
    chance: float | None = None
    tokens: int | None = None


def compress_group(
    group: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    curvature: Curvature | None,
    decision: Decision,
    settings: WeightSettings,
    octaves: float,
) -> dict[str, Compressed]:
    """The linears of a fusion group, weights and targets [rows, cols]; coded ones with steps that are `octaves` coarser
    than planned."""
    gradients = decision.coding.row_gradient if decision.coding else {}
    compressed = {}
    for name, target in targets.items():
        planned, chosen, mask = decision.plan.weights[name], decision.chosen.get(name), None
        planned = replace(planned, step=planned.step * 2.0**octaves)
        if planned.outliers:
            mask = decision.candidates[name].mask(planned.outliers, planned.shape)
        gradient = gradients.get(name)
        with named(name):
            result = compress_weight(group[name], target, planned, curvature, mask, chosen, settings, gradient)
        again = coded.sensitivity(planned.step, curvature) if gradient is not None and curvature is not None else None
        compressed[name] = Compressed(*result, again)
    return compressed


def compressed_nbytes(compressed: dict[str, Compressed]) -> dict[str, int]:
    """Bytes of each linear's parts."""
    return {name: parts.nbytes(one.parts) for name, one in compressed.items()}


def final_plan(planned: WeightPlan, weight_parts: Sequence[Part]) -> WeightPlan:
    """The plan of a linear after its compression: with its coded sizes, without a compensation that did not help."""
    if any(parts.is_coded(part.spec()) for part in weight_parts):
        planned = replace(planned, final=tuple(part.spec() for part in weight_parts))
    return planned if any(isinstance(part, LowRank) for part in weight_parts) else replace(planned, rank=0)


def with_final(plan: Plan, compressed: Mapping[str, Compressed]) -> Plan:
    """The plan with these linears after their compression."""
    return plan.having({name: final_plan(plan.weights[name], one.parts) for name, one in compressed.items()})
