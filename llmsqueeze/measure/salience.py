"""Salience of output rows, from "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and
Highly-efficient System Design" (arXiv 2412.14590).

    S[r] = mean over samples of |s + s^2 / 2|,   s = G_r . d_r,   d_r = W_r rounded to nearest - W_r

G [rows, cols] the gradient of a sample's mean next-token loss, d_r at the low width. What differs from the paper:
nothing. Memory: one rounding error per linear of the resident block in bfloat16 for every low width, and [rows] scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.rtn import rtn


def rounding_error(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """float32 [rows, cols]: rounded - weight, to nearest, scales from the range: the paper's stand-in."""
    return rtn(weight, grid, dtype).dense() - weight


def sample_salience(gradient: Tensor, error: Tensor) -> Tensor:
    """[rows]: one sample's |s + s^2 / 2| from its gradient and the rounding error, both [rows, cols]."""
    s = (gradient * error).sum(dim=1)
    return (s + 0.5 * s.square()).abs_()
