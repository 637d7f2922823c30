"""Outliers of a weight: the single weights that would cost most to round.

    score[r, j] = W[r, j]^2 * H[j, j]

W [rows, cols]; H [cols, cols] the damped second moments of the inputs (curvature.py): the score is the output error of
a weight that is set to 0. Memory: one copy of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.quantizers.curvature import Curvature


def row_outliers(weight: Tensor, curvature: Curvature, count: int, taken: Tensor | None = None) -> Tensor:
    """bool [rows, cols]: the `count` weights with the largest score in every row.

    `taken` bool [rows, cols]: weights that are outliers already, and are not chosen again.
    """
    score = weight.square() * curvature.diagonal
    if taken is not None:
        score = score.masked_fill(taken, -torch.inf)
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, score.topk(count, dim=1).indices, True)
