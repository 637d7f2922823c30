"""What a fusion group becomes: the parts of its linears, and the weights that these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.compress.decide import Decision
from llmsqueeze.compress.weight import compress_weight
from llmsqueeze.formats.verify import named
from llmsqueeze.parts import LowRank, Part
from llmsqueeze.quantizers import coded
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.recipe.recipe import Recipe

NOTHING = torch.empty(0)


class Compressed(NamedTuple):
    """A linear's parts, their sum, its relative output error; of a coded one what rounding it again would cost: nats
    per token and square of an error in steps."""

    parts: list[Part]
    dense: Tensor
    error: float
    sensitivity: float | None


def compress_group(
    group: dict[str, Tensor],
    targets: dict[str, Tensor],
    curvature: Curvature | None,
    decided: Decision,
    recipe: Recipe,
    shift: float,
) -> dict[str, Compressed]:
    """The linears of a fusion group, weights and targets [rows, cols]; coded ones with steps `shift` octaves coarser
    than planned."""
    gradients = decided.coding.row_gradient if decided.coding else {}
    found = {}
    for name, target in targets.items():
        planned, chosen, mask = decided.plan.weights[name], decided.chosen.get(name), None
        planned = replace(planned, step=planned.step * 2.0**shift)
        if planned.outliers:
            mask = decided.candidates[name].mask(planned.outliers, planned.shape)
        with named(name):
            gradient = gradients.get(name)
            made = compress_weight(group[name], target, planned, curvature, mask, chosen, recipe, gradient)
        again = coded.sensitivity(planned.step, curvature) if gradient is not None and curvature is not None else None
        found[name] = Compressed(*made, again)
    return found


def compressed_nbytes(made: dict[str, Compressed]) -> dict[str, int]:
    return {name: parts.nbytes(found.parts) for name, found in made.items()}


def as_made(planned: WeightPlan, weight_parts: Sequence[Part]) -> WeightPlan:
    """The plan of a linear as it came out."""
    if any(parts.is_coded(part.spec()) for part in weight_parts):
        planned = replace(planned, made=tuple(part.spec() for part in weight_parts))
    return planned if any(isinstance(part, LowRank) for part in weight_parts) else replace(planned, rank=0)


def with_made(plan: Plan, ends: dict[str, Compressed]) -> Plan:
    """The plan with these as they came out."""
    return Plan({n: as_made(w, ends[n].parts) if n in ends else w for n, w in plan.weights.items()})
