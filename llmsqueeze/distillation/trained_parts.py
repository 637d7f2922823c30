"""A part of a weight with its trained numbers: scales, zeros, alphas, step sizes, low-rank factors, and codes.

Continuous numbers are `start + delta * unit` (adjusted.py), and delta is trained, so that one learning rate fits all.
Codes are trained after PV-Tuning (arXiv 2405.14852). The gradient of the dense weight passes straight through to a
pending change per code, in levels:

    pending <- pending - rate * gradient / rms(gradient)          rms over the part, pending float32 [rows, cols]
    codes with |pending| > 1/2 move one level towards it, and pending loses that level

What differs: at each optimizer step only the codes with the largest pending changes move, a fixed share at most,
because a move of all of them would undo itself. Memory: a part's dense weight while it is used; 9 bytes per code if
codes are trained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.distillation.adjusted import Adjusted, AdjustedSteps, scale_of
from llmsqueeze.parts import Affine, Coded, DualBinary, Integers, LowRank, bitpack
from llmsqueeze.parts.dual_binary import planes_of
from llmsqueeze.parts.grid import onto_rows
from llmsqueeze.quantizers import dual_binary


class TrainedCodes(nn.Module):
    """An `Affine` or `DualBinary` part whose scales (and zeros), codes, or both are trained.

    reordered: how often the two alphas of a group had to be put in order again.
    """

    codes: Tensor | None
    sign: Tensor

    def __init__(self, part: Affine | DualBinary, train_scales: bool, train_codes: bool) -> None:
        super().__init__()
        self.part = part
        self.reordered = 0
        self.scale = scale_of(part.alpha1 if isinstance(part, DualBinary) else part.scale)
        self.zero: Adjusted | None = None
        if isinstance(part, DualBinary):
            self.zero = scale_of(part.alpha2)
        elif part.zero is not None:
            zero = bitpack.unpack(part.zero, part.grid.bits, len(part.codes)).T.float()
            self.zero = Adjusted(zero, 1.0, torch.float32)
        self.register_buffer("sign", self.scale.start.sign(), persistent=False)
        for adjusted in (self.scale, self.zero):
            if adjusted is not None:
                adjusted.delta.requires_grad_(train_scales)
        codes = part.symbols().contiguous() if train_codes else None  # `move_codes` addresses them flat
        self.register_buffer("codes", codes)
        self.pending = None if codes is None else nn.Parameter(torch.zeros_like(codes, dtype=torch.float32))

    def dense(self) -> Tensor:
        """float32 [rows, cols], with a gradient for every trained number."""
        grid, cols = self.part.grid, self.part.shape[1]
        codes = self.part.symbols() if self.codes is None else self.codes
        scale = grid.expand(self.scale.forward(), cols)
        if self.zero is None:
            values = (codes.float() - grid.fixed_zero) * scale
        elif grid.dual:
            first, second = planes_of(codes)
            values = first.float() * scale + second.float() * grid.expand(self.zero.forward(), cols)
        else:
            values = (codes.float() - grid.expand(self._whole(self.zero), cols)) * scale
        if self.pending is not None:
            # the codes stay whole numbers; the pending change gets the gradient that they would have
            level = scale / 2 if grid.dual else scale
            values = values + (self.pending - self.pending.detach()) * level.detach()
        return onto_rows(values, self.part.rows, self.part.shape)

    @torch.no_grad()
    def keep_valid(self) -> None:
        """After an optimizer step: puts alphas in order, which is counted, and zeros on the grid."""
        if self.zero is None:
            return
        if isinstance(self.part, DualBinary):
            first, second, reordered = dual_binary.put_in_order(self.scale.forward(), self.zero.forward(), self.sign)
            self.scale.assign(first)
            self.zero.assign(second)
            self.reordered += int(reordered.sum())
        else:
            self.zero.assign(self.zero.forward().clamp(0, self.part.grid.max_code))

    @torch.no_grad()
    def move_codes(self, share: float, rate: float) -> int:
        """Adds to the pending changes, then moves codes whose change is beyond half a level, at most this `share`.

        rate: levels that a gradient as large as the root mean square adds. Returns the number of codes that moved.
        """
        if self.codes is None or self.pending is None or self.pending.grad is None:
            return 0
        rms = self.pending.grad.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.pending.sub_(self.pending.grad * (rate / rms))
        self.pending.grad = None
        direction = self.pending.sign()
        moved = self.codes.float() + direction
        possible = (moved >= 0) & (moved <= self.part.grid.max_code)
        self.pending.copy_(torch.where(possible, self.pending, self.pending.clamp(-0.5, 0.5)))
        strength = torch.where(possible & (self.pending.abs() > 0.5), self.pending.abs(), 0.0).flatten()
        strongest = strength.topk(round(share * strength.numel()))
        chosen = strongest.indices[strongest.values > 0]
        self.codes.view(-1)[chosen] = moved.flatten()[chosen].to(torch.uint8)
        self.pending.view(-1)[chosen] -= direction.flatten()[chosen]
        return len(chosen)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """tensor of the part -> its value in the file, for every trained tensor."""
        scale = self.scale.stored()
        if self.zero is None:
            zero = torch.zeros_like(scale)
        else:
            zero = self.zero.stored() if self.part.grid.dual else self._whole(self.zero)
        if self.codes is not None:
            part = parts.of_codes(self.codes, scale, zero, self.part.grid)
            tensors = (part if self.part.streams is None else part.packed()).tensors()
        elif isinstance(self.part, DualBinary):
            return {"alpha1": scale, "alpha2": zero}
        else:
            tensors = replace(self.part, scale=scale).plain().tensors()
            if self.part.zero is not None:
                tensors["zero"] = bitpack.pack(zero.T.to(torch.uint8), self.part.grid.bits)
            del tensors["codes"]
        tensors.pop("rows", None)
        return tensors

    def _whole(self, zero: Adjusted) -> Tensor:
        """The zero as the file will hold it, a whole number on the grid, with the gradient of the trained one."""
        value = zero.forward()
        return value + (value.detach().round().clamp(0, self.part.grid.max_code) - value.detach())


class TrainedCoded(nn.Module):
    """A decoded `Coded` part whose row and column step sizes are trained. `stored` encodes its streams again."""

    def __init__(self, part: Integers, train_scales: bool) -> None:
        super().__init__()
        self.part = part
        self.rows, self.cols = (AdjustedSteps(exponent) for exponent in part.exponents())
        for adjusted in (self.rows, self.cols):
            adjusted.delta.requires_grad_(train_scales)

    def dense(self) -> Tensor:
        """float32 [rows, cols], with a gradient for the step sizes."""
        return self.part.values() * self.cols.forward() * self.rows.forward()[:, None]

    def keep_valid(self) -> None:
        """Nothing to do: a step size is stored as an exponent, so it stays above 0."""

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As for `TrainedCodes`."""
        return Coded.from_integers(
            self.part.values(), self.rows.stored(), self.cols.stored(), self.part.dtype
        ).tensors()


class TrainedLowRank(nn.Module):
    """A `LowRank` part whose factors and scales are trained."""

    def __init__(self, part: LowRank) -> None:
        super().__init__()
        self.part = part
        self.left = Adjusted(part.left.float() / 127, 1.0, torch.float32)
        self.right = Adjusted(part.right.float() / 127, 1.0, torch.float32)
        self.scale = scale_of(part.scale)

    @torch.no_grad()
    def keep_valid(self) -> None:
        """After an optimizer step: clamps the factors to -1 .. 1, the range of their 8 bits."""
        for factor in (self.left, self.right):
            factor.assign(factor.forward().clamp(-1.0, 1.0))

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        left, right = self.left.forward(), self.right.forward()
        if self.left.as_stored:
            left, right = _in_eight_bits(left).float() / 127, _in_eight_bits(right).float() / 127
        return left @ (right * self.scale.forward()[:, None])

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As for `TrainedCodes`."""
        left, right = _in_eight_bits(self.left.forward()), _in_eight_bits(self.right.forward())
        return {"left": left, "right": right, "scale": self.scale.stored()}


def _in_eight_bits(values: Tensor) -> Tensor:
    """int8 of a factor in -1 .. 1."""
    return (values.detach() * 127).round().clamp(-127, 127).to(torch.int8)
