"""GWQ: "Gradient-Aware Weight Quantization for Large Language Models" (arXiv 2411.00850): outliers by gradient.

    outliers of W = the k weights of W [rows, cols] that measure/outliers.py ranks first, k about 1 % of all

They stay at 16 bits. What differs from the paper: its text does not say whether the 1 % is per matrix or over the
model, so `layer` (per weight matrix) is the default and `global` the alternative. Memory: the scores of all candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.measure.outliers import Candidates


def allocate(plan: Plan, candidates: Mapping[str, Candidates], outliers: float, scope: str) -> Plan:
    """`plan` with the number of outliers of each weight: the top fraction per matrix, or over all of them."""
    if scope == "layer":
        # a linear that no sample reached has no candidates
        counts = {
            name: min(round(outliers * weight.numel), len(candidates[name].index)) if name in candidates else 0
            for name, weight in plan.weights.items()
        }
    else:
        counts = _global_counts(plan, candidates, round(outliers * plan.numel))
    return plan.having({name: replace(weight, outliers=counts[name]) for name, weight in plan.weights.items()})


def _global_counts(plan: Plan, candidates: Mapping[str, Candidates], total: int) -> dict[str, int]:
    names = [name for name in plan.weights if name in candidates]
    scores = torch.cat([candidates[name].score for name in names])
    owner = torch.cat([torch.full((len(candidates[name].score),), i) for i, name in enumerate(names)])
    taken = torch.sort(scores, descending=True, stable=True).indices[:total]
    counts = torch.bincount(owner[taken], minlength=len(names)).tolist()
    return dict.fromkeys(plan.weights, 0) | dict(zip(names, counts, strict=True))
