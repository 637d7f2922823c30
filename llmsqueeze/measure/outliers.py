"""Outlier rankings of GWQ, "Gradient-Aware Weight Quantization for Large Language Models" (arXiv 2411.00850).

    G = sum over samples of |dL_s / dW|      the weights with the largest G are the outliers, about 1 %

W, G [rows, cols]; L_s the mean next-token loss of calibration sample s, labels the text itself. Five rankings:

    gradient         G, the paper's
    gradient-weight  sum_s (dL_s/dW)^2 * W^2: the cost of setting the weight to zero, to second order
    gradient-error   sum_s (dL_s/dW)^2 * (W - rounded W)^2: the cost of rounding it on the range of its group
    magnitude        |W|, needs no data
    random           the control

What differs from the paper: gradients come from the block walk, one block at a time. Memory: one float32 accumulator
per linear of the resident block, then 8 bytes for each candidate that is kept (the top 2 % by default): its flat index
and its score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.recipe import NEEDS_GRADIENTS

CANDIDATES = 0.02


@dataclass(frozen=True)
class Candidates:
    """The best-ranked weights of one matrix, best first: flat index [k], int32 if that suffices; score float32 [k]."""

    index: Tensor
    score: Tensor

    def first(self, count: int) -> Candidates:
        """The best `count` of them without their scores, in memory of their own."""
        return Candidates(self.index[:count].clone(), self.score[:0].clone())

    def mask(self, count: int, shape: tuple[int, int]) -> Tensor:
        """bool [rows, cols]: the `count` best candidates."""
        mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
        mask[self.index[:count].long()] = True
        return mask.view(shape)


@dataclass(frozen=True)
class Ranking:
    """How outliers are ranked. name: one of the five. count: how many candidates a matrix of so many weights offers is
    `candidate_count` of fraction and scope. grid: `gradient-error` rounds to it. seed: of `random`."""

    name: str
    fraction: float
    scope: str
    grid: Grid
    seed: int

    @property
    def needs_gradients(self) -> bool:
        return self.name in NEEDS_GRADIENTS

    def candidates(
        self, weight: Tensor, statistic: Tensor | None, dtype: torch.dtype, block: int, position: int
    ) -> Candidates:
        """The candidates of `weight` [rows, cols], the linear number `position` of its block, scales in `dtype`.

        `statistic` [rows, cols] sums `of_sample` up.
        """
        error = weight - rtn(weight, self.grid, dtype).dense() if self.name == "gradient-error" else None
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + block * 1009 + position) % (1 << 63))
        scores = score(weight, statistic, error, self.name, generator)
        return best(scores, candidate_count(weight.numel(), self.fraction, self.scope))


def candidate_count(numel: int, fraction: float, scope: str) -> int:
    """How many candidates a matrix of `numel` weights offers: the top 2 %, more if more outliers are asked for.

    Over the whole model some matrices take several times their share, hence the factor.
    """
    share = fraction if scope == "layer" else 4 * fraction
    return min(numel, round(max(CANDIDATES, share) * numel))


def of_sample(gradient: Tensor, ranking: str) -> Tensor:
    """What one sample's gradient [rows, cols] adds to the statistic of the ranking."""
    return gradient.abs() if ranking == "gradient" else gradient.square()


def score(
    weight: Tensor,
    statistic: Tensor | None,
    rounding_error: Tensor | None,
    ranking: str,
    generator: torch.Generator,
) -> Tensor:
    """float32 [rows, cols]: the higher, the more a weight is an outlier.

    `statistic` sums `of_sample` up; `rounding_error` = weight - rounded weight is for `gradient-error` alone.
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
