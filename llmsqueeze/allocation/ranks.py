"""Ranks of the low-rank compensation, bought from the same budget as the widths of rows.

    component i of a linear is worth its bytes where  gain_i / (rows + cols + scale) > lambda

gain_i: predicted fall of the loss (nats per token) by the i-th component of the rounding error, where the linear is on
one option; for rows on several, each option's gains count by the share of its cost that its rows have. lambda: what
the last byte buys that the rows get. Rows and ranks are decided in turn (budget.py), for either changes what the other
is worth. Source: ours. Memory: one number per linear, option and rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import WeightPlan

SPAN = 0.01  # of the bytes, over which the price of the last one is taken


def rank_nbytes(weight: WeightPlan) -> int:
    """Bytes of one component."""
    return parts.layout_nbytes(weight.shape, [parts.lowrank_spec(1, weight.dtype)])


def expected_gains(cost: Tensor, gain: Tensor, options: Tensor) -> Tensor:
    """[ranks]: what each component is worth to a linear whose rows are on the options `options` [rows].

    cost [options, rows], gain [options, ranks].
    """
    on = torch.zeros_like(cost).scatter_(0, options[None], 1.0)
    shares = (cost * on).sum(dim=1) / cost.sum(dim=1).clamp(min=torch.finfo(cost.dtype).tiny)
    return shares.to(gain) @ gain


def worthwhile(gain: Tensor, price: float) -> int:
    """How many of the components, in their order, gain more than they cost."""
    return int((gain > price).long().cumprod(dim=0).sum())


def last_byte(ladder: Sequence[tuple[float, float]], nbytes: float) -> float:
    """What a byte buys where `nbytes` have been spent; `ladder`: bytes and cost after every step (greedy.py)."""
    sizes = torch.tensor([size for size, _ in ladder], dtype=torch.float64)
    costs = torch.tensor([cost for _, cost in ladder], dtype=torch.float64)
    last = len(ladder) - 1
    low = int(torch.searchsorted(sizes, nbytes * (1 - SPAN)).clamp(max=last))
    high = int(torch.searchsorted(sizes, nbytes * (1 + SPAN)).clamp(max=last))
    if high == low:
        low, high = max(0, low - 1), min(last, high + 1)
    return float((costs[low] - costs[high]) / (sizes[high] - sizes[low])) if high > low else 0.0
