"""A stored tensor of real numbers that is trained, and its value in the file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmsqueeze.parts.coding.logsteps import exponents, powers
from llmsqueeze.quantizers.grids import storable


class Adjusted(nn.Module):
    """A tensor as `start + delta * unit`, of which delta is trained. unit: a number, or a tensor of the same shape.

    With `as_stored` it has its value in the file. scale: a value that was not 0 never becomes 0.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, start: Tensor, unit: Tensor | float, dtype: torch.dtype, scale: bool = False) -> None:
        super().__init__()
        self.dtype, self.scale, self.as_stored = dtype, scale, False
        self.register_buffer("start", start.float(), persistent=False)
        self.register_buffer("unit", torch.as_tensor(unit, dtype=torch.float32, device=start.device), persistent=False)
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        return self.stored().float() if self.as_stored else torch.addcmul(self.start, self.delta, self.unit)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The value in the file, in its dtype, finite."""
        limits = torch.finfo(self.dtype)
        value = torch.addcmul(self.start, self.delta, self.unit).clamp(-limits.max, limits.max)
        if self.scale:
            tiny = torch.full_like(value, torch.finfo(torch.float32).tiny).copysign(self.start)
            nonzero = storable(torch.where(value == 0, tiny, value), self.dtype)
            value = torch.where(self.start == 0, value, nonzero)
        return value.to(self.dtype)

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Sets the current value; where it is equal already, delta stays the same to the bit."""
        self.delta.copy_(torch.where(self.forward() == value, self.delta, (value - self.start) / self.unit))


def scale_of(stored: Tensor) -> Adjusted:
    """A scale, trained relative to itself."""
    return Adjusted(stored, stored.float().abs().clamp(min=torch.finfo(torch.float32).tiny), stored.dtype, True)


class AdjustedSteps(Adjusted):
    """Step sizes on the logarithmic grid, trained relative to themselves. The file holds their exponents."""

    def __init__(self, exponent: Tensor) -> None:
        """exponent: whole numbers."""
        super().__init__(powers(exponent), powers(exponent), torch.float32)

    def forward(self) -> Tensor:
        if self.as_stored:
            return powers(self.stored())
        value = super().forward()
        # the forward pass sees the rounded value; else rows and columns that drift by half a level each undo the gain
        return value + (powers(self.stored()) - value).detach()

    @torch.no_grad()
    def stored(self) -> Tensor:
        """int64: the nearest exponents. A step size never falls below a sixteenth of its first value."""
        value = torch.addcmul(self.start, self.delta, self.unit)
        return exponents(torch.maximum(value, self.start / 16))
