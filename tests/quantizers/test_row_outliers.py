"""Outliers of rows: those with the largest w^2 * H[j, j], chosen one by one."""

from __future__ import annotations

import torch
from support import correlated_curvature

from llmsqueeze.quantizers.outliers import row_outliers


def test_a_rows_outliers_are_those_that_would_cost_most_to_lose(generator: torch.Generator) -> None:
    weight, curvature = torch.randn(20, 48, generator=generator), correlated_curvature(48, generator)
    first, next_ones = [], []
    for r in range(20):
        order = sorted(range(48), key=lambda j: -float(weight[r, j] ** 2 * curvature.H[j, j]))
        first.append(set(order[:3]))
        next_ones.append(set(order[3:5]))
    taken = row_outliers(weight, curvature, 3)
    more = row_outliers(weight, curvature, 2, taken)
    assert [set(row.nonzero()[:, 0].tolist()) for row in taken] == first
    assert [set(row.nonzero()[:, 0].tolist()) for row in more] == next_ones, "none is chosen twice"
