"""GWQ: "Gradient-Aware Weight Quantization for Large Language Models" (arXiv 2411.00850): outliers by gradient.

    G = sum over samples of |dL_s / dW|      the weights with the largest G stay at 16 bits, about 1 %

W, G [rows, cols]; L_s the mean next-token loss of calibration sample s, labels the text itself. Five rankings:

    gradient         G, the paper's
    gradient-weight  sum_s (dL_s/dW)^2 * W^2: what setting the weight to zero would cost, to second order
    gradient-error   sum_s (dL_s/dW)^2 * (W - rounded W)^2: what rounding it to the group's range costs
    magnitude        |W|, needs no data
    random           the control

What differs from the paper: its text does not say whether the 1 % is per matrix or over the model, so `layer` (per
weight matrix) is the default and `global` the alternative; gradients come from the block walk, one block at a time.
Memory: one float32 accumulator per linear of the resident block, then 8 bytes for each of the candidates kept
(the top 2 % by default): their flat index and score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmsqueeze.allocation.plan import Plan

CANDIDATES = 0.02


@dataclass(frozen=True)
class Candidates:
    """The best-ranked weights of one matrix, best first: flat index [k], int32 if that suffices; score float32 [k]."""

    index: Tensor
    score: Tensor


def candidate_count(numel: int, outliers: float, scope: str) -> int:
    """How many candidates a matrix of `numel` weights offers: the top 2 %, more if more outliers are asked for.

    Over the whole model some matrices take several times their share, hence the factor.
    """
    share = outliers if scope == "layer" else 4 * outliers
    return min(numel, round(max(CANDIDATES, share) * numel))


def accumulate(total: Tensor | None, gradient: Tensor, ranking: str) -> Tensor:
    """Adds one sample's gradient [rows, cols] to the running statistic of the ranking."""
    value = gradient.abs() if ranking == "gradient" else gradient.square()
    return value if total is None else total.add_(value)


def score(
    weight: Tensor,
    statistic: Tensor | None,
    rounding_error: Tensor | None,
    ranking: str,
    generator: torch.Generator,
) -> Tensor:
    """float32 [rows, cols]: how much each weight deserves to stay.

    `statistic` comes from `accumulate`; `rounding_error` = weight - rounded weight is for `gradient-error` alone.
    """
    if ranking == "random":
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    if ranking == "magnitude":
        return weight.abs()
    assert statistic is not None, "this ranking needs gradients"
    if ranking == "gradient":
        return statistic
    if ranking == "gradient-weight":
        return statistic * weight.square()
    assert rounding_error is not None
    return statistic * rounding_error.square()


def best(scores: Tensor, count: int) -> Candidates:
    """The `count` highest scores; of equal ones the first in row order, so that the choice is the same everywhere."""
    flat = scores.reshape(-1)
    if count == 0:
        return Candidates(torch.empty(0, dtype=torch.int32), torch.empty(0))
    bar = flat.topk(count).values[-1]
    above, ties = (flat > bar).nonzero()[:, 0], (flat == bar).nonzero()[:, 0]
    index = torch.cat([above, ties[: count - len(above)]])
    order = torch.sort(flat[index], descending=True, stable=True).indices
    narrow = torch.int32 if flat.numel() < 1 << 31 else torch.int64
    return Candidates(index[order].to(narrow).cpu(), flat[index[order]].cpu())


def first(candidates: Candidates, count: int) -> Candidates:
    """The best `count` of the candidates, in memory of their own."""
    return Candidates(candidates.index[:count].clone(), candidates.score[:0].clone())


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
    return Plan({name: replace(weight, outliers=counts[name]) for name, weight in plan.weights.items()})


def _global_counts(plan: Plan, candidates: Mapping[str, Candidates], total: int) -> dict[str, int]:
    names = [name for name in plan.weights if name in candidates]
    scores = torch.cat([candidates[name].score for name in names])
    owner = torch.cat([torch.full((len(candidates[name].score),), i) for i, name in enumerate(names)])
    taken = torch.sort(scores, descending=True, stable=True).indices[:total]
    counts = torch.bincount(owner[taken], minlength=len(names)).tolist()
    return dict.fromkeys(plan.weights, 0) | dict(zip(names, counts, strict=True))


def outlier_mask(candidates: Candidates, count: int, shape: tuple[int, int]) -> Tensor:
    """bool [rows, cols]: the `count` best candidates."""
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[candidates.index[:count].long()] = True
    return mask.view(shape)
