"""Logarithmic steps: 2^(exponent / 16) of whole exponents."""

from __future__ import annotations

import torch
from torch import Tensor

PER_OCTAVE = 16
LAST = 255  # exponents above the least one are stored as bytes


def exponents(steps: Tensor, span: int = LAST) -> Tensor:
    """int64: the whole exponents whose powers are nearest to the steps [..., n].

    An exponent more than `span` above the least of its last dimension is cut to that, which makes the step finer.
    """
    exponent = (steps.double().log2() * PER_OCTAVE).round().long()
    return exponent.clamp(max=exponent.amin(dim=-1, keepdim=True) + span)


def powers(exponent: Tensor) -> Tensor:
    """float32: 2^(exponent / 16), equal on every platform: whole powers are made from their bits, not by a library."""
    mantissas = torch.tensor([2.0 ** (i / PER_OCTAVE) for i in range(PER_OCTAVE)], device=exponent.device)
    whole = exponent.div(PER_OCTAVE, rounding_mode="floor")
    scale = (whole.long().clamp(-1022, 1023) + 1023 << 52).view(torch.float64)
    return (mantissas[exponent - whole * PER_OCTAVE] * scale).float()
