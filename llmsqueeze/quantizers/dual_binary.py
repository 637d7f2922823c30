"""Flexible dual binarization: "DB-LLM: Accurate Dual-Binarization for Efficient LLMs" (arXiv 2402.11960).

    w ~= alpha1 * b1 + alpha2 * b2                   b1, b2 in {0, 1}: levels alpha2, 0, alpha1 + alpha2, alpha1
    start: alpha1 = 2 s, alpha2 = -s                 levels -s, 0, s, 2 s: nearest-level rounding, exactly
    b1 = H(+-(w - (alpha1 + alpha2) / 2)),  b2 = H(+-(alpha1 b1 + alpha2 / 2 - w))        H(0) = 1, +- = sign of alpha1

w [rows, cols]; s, alpha1, alpha2 one per row and group of columns; b1, b2 of the shape of w. The levels are in order
while alpha2 < 0 < alpha1 + alpha2 < alpha1 or its mirror, and then the thresholds are the midpoints between them.

What differs from the paper, whose code is not published: s is searched under the second moments of the inputs, not
taken from the range (`--quantizer rtn` without `search` is that); the mirrored levels -2s, -s, 0, s are tried too;
the bits come from GPTQ's error feedback and coordinate descent through the four levels, the alphas from least squares,
as in descent.py. Training the alphas afterwards (deviation-aware distillation) is compensate/distill.py. Memory: that
of the quantizer, with twice the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts.dual_binary import planes_of

# of alpha1, that distillation keeps between two levels: half of it is more than two alphas lose to bfloat16, 2 * 2**-8
MARGIN = 0.02


def start(s: Tensor) -> tuple[Tensor, Tensor]:
    """alpha1 and alpha2 for the scale `s` of an even two-bit grid; negative scales give the mirrored levels.

    Exact in any float dtype that holds 2 s.
    """
    return 2 * s, -s


def encode(w: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """The code (float32, 0 to 3 along the levels) of the nearest level; shapes as they broadcast."""
    sign = alpha1.sign()
    first = (w - (alpha1 + alpha2) / 2) * sign >= 0
    second = (alpha1 * first + alpha2 / 2 - w) * sign >= 0
    return torch.where(first, 3.0, 1.0) - second.float()


def decode(code: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """The level of a code; shapes as they broadcast."""
    first, second = planes_of(code)
    return first * alpha1 + second * alpha2


def in_order(alpha1: Tensor, alpha2: Tensor) -> Tensor:
    """bool: where the levels keep their order. Where they do not, a threshold lies beyond a level."""
    return (alpha1 * alpha2 < 0) & (alpha2.abs() < alpha1.abs())


def put_in_order(alpha1: Tensor, alpha2: Tensor, sign: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Alphas moved to where their levels are in order again, by `MARGIN`; `sign` of alpha1 is to be kept.

    The third result is bool: where anything had to move. All shapes are equal.
    """
    first, second = alpha1 * sign, alpha2 * sign
    tiny = torch.finfo(alpha1.dtype).tiny
    margin = (MARGIN * torch.maximum(first.abs(), second.abs())).clamp(min=tiny)
    # half of it may be used up before anything moves, so that what was moved stays where it is
    moved = (second > -margin / 2) | (first + second < margin / 2)
    kept_second = torch.minimum(second, -margin)
    kept_first = torch.maximum(first, margin - kept_second)
    return torch.where(moved, kept_first * sign, alpha1), torch.where(moved, kept_second * sign, alpha2), moved
