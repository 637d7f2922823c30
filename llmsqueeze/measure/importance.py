"""Importance of decoder blocks, from "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs
Beyond Integer Bit-Levels" (arXiv 2406.17415).

    LIM_i = -mean over tokens of cos(h_i, h_i+1)      h_i [width] the input of block i; more is more important
    ZD_i  = share of block i's weights with z > 1     z = (w - mean) / std over the block; less is more important

What differs from the paper: cosines are taken per token, so that tokens with massive activations do not decide alone,
and at the block itself, so that the final norm is not in the last one; a ZD is over all weights of a block's linears
together. Memory: nothing beyond the walk's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsqueeze.model.experts.linear import Weight, real


def similarity(before: Tensor, after: Tensor) -> float:
    """Mean over the tokens of the cosine between a block's input and output [1, length, width]; 0 if they have other
    shapes, as tokens have."""
    if before.shape != after.shape:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())


def zd(weights: Sequence[Weight]) -> float:
    """Share of all these weights that lie more than one standard deviation above their common mean; 0 for none."""
    if not weights:
        return 0.0
    count = sum(real(weight).numel() for weight in weights)
    mean = sum(float(real(weight).double().sum()) for weight in weights) / count
    variance = sum(float((real(weight).double() - mean).square_().sum()) for weight in weights) / count
    return sum(int((real(weight) > mean + variance**0.5).sum()) for weight in weights) / count
