"""Steps on a logarithmic grid: 2^(exponent / 16) of whole exponents."""

from __future__ import annotations

import torch
from torch import Tensor

PER_OCTAVE = 16
LAST = 255  # exponents are stored as bytes above the least


def exponents(steps: Tensor, span: int = LAST) -> Tensor:
    """int64: the whole exponents whose powers are nearest to the steps [..., steps]; those further than `span` above
    the least of the last dimension are cut to it, which makes steps finer, not coarser."""
    found = (steps.double().log2() * PER_OCTAVE).round().long()
    return found.clamp(max=found.amin(dim=-1, keepdim=True) + span)


def powers(exponent: Tensor) -> Tensor:
    """float32: 2^(exponent / 16), the same on every platform: of whole powers only bits, no function of a library."""
    mantissas = torch.tensor([2.0 ** (i / PER_OCTAVE) for i in range(PER_OCTAVE)], device=exponent.device)
    whole = exponent.div(PER_OCTAVE, rounding_mode="floor")
    scale = (whole.long().clamp(-1022, 1023) + 1023 << 52).view(torch.float64)
    return (mantissas[exponent - whole * PER_OCTAVE] * scale).float()
