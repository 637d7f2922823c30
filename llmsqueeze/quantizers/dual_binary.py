"""Flexible dual binarization: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (arXiv 2402.11960).

    w ~= alpha1 * b1 + alpha2 * b2                   b1, b2 in {0, 1}: levels alpha2, 0, alpha1 + alpha2, alpha1
    start: alpha1 = 2 s, alpha2 = -s                 levels -s, 0, s, 2 s: nearest-level rounding, exactly
    b1 = H(+-(w - (alpha1 + alpha2) / 2)),  b2 = H(+-(alpha1 b1 + alpha2 / 2 - w))        H(0) = 1, +- = sign of alpha1

w [rows, cols]; s, alpha1, alpha2 one per row and group of columns; b1, b2 of the shape of w. The levels are in order if
alpha2 < 0 < alpha1 + alpha2 < alpha1, or its mirror. The thresholds are then the midpoints between the levels.

What differs from the paper, whose code is not published: s is searched under the second moments of the inputs, and not
taken from the range (`--quantizer rtn` without `search` takes it from the range). The mirrored levels -2s, -s, 0, s are
tried too. The bits come from GPTQ's error feedback and coordinate descent through the four levels, and the alphas from
least squares, as in descent.py. Distillation (distillation/) can train the alphas afterwards. Memory: that of the
quantizer, with twice the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts.dual_binary import planes_of

# the least distance of two levels in distillation, as a share of alpha1. Half of it is more than bfloat16 rounds two
# alphas, 2 * 2**-8
MARGIN = 0.02


def start(s: Tensor) -> tuple[Tensor, Tensor]:
    """alpha1 and alpha2 for the scale `s` of an even two-bit grid; negative scales give the mirrored levels.

    They are exact in any float dtype that has 2 s.
    """
    return 2 * s, -s


def nearest_code(w: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """The code (float32, 0 to 3 in the order of the levels) of the level nearest to `w`; all shapes broadcast."""
    sign = alpha1.sign()
    first = (w - (alpha1 + alpha2) / 2) * sign >= 0
    second = (alpha1 * first + alpha2 / 2 - w) * sign >= 0
    return torch.where(first, 3.0, 1.0) - second.float()


def level_of(code: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """The level of a code; all shapes broadcast."""
    first, second = planes_of(code)
    return first * alpha1 + second * alpha2


def in_order(alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """bool: whether the levels are in order. If they are not, a threshold lies beyond a level."""
    return (alpha1 * alpha2 < 0) & (alpha2.abs() < alpha1.abs())


def put_in_order(alpha1: Tensor, alpha2: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest alphas whose levels are in order, at least `MARGIN` apart; alpha1 keeps the sign `sign`.

    The third result is bool: whether the alphas moved. All shapes are equal.
    """
    first, second = alpha1 * sign, alpha2 * sign
    tiny = torch.finfo(alpha1.dtype).tiny
    margin = (MARGIN * torch.maximum(first.abs(), second.abs())).clamp(min=tiny)
    # alphas move only if they are within half of the margin: those that moved once do not move again
    moved = (second > -margin / 2) | (first + second < margin / 2)
    new_second = torch.minimum(second, -margin)
    new_first = torch.maximum(first, margin - new_second)
    return torch.where(moved, new_first * sign, alpha1), torch.where(moved, new_second * sign, alpha2), moved
