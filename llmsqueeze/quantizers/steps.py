"""Integers and the logarithmic steps that they count: what coded.py rounds a weight to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmsqueeze.parts.coding.logsteps import LAST, PER_OCTAVE, powers


@dataclass(frozen=True)
class RoundedToSteps:
    """A weight rounded to steps: integers [rows, cols] (float32); row_exponent int64 [rows], col_exponent int64 [cols].

    The step of row r and column j is 2^((row_exponent[r] + col_exponent[j]) / 16). `lowest` int64 [rows]: a row's
    exponent stays from `lowest` to `lowest` + 255.
    """

    integers: Tensor
    row_exponent: Tensor
    col_exponent: Tensor
    lowest: Tensor

    def rows(self, rows: slice | Tensor) -> RoundedToSteps:
        """These rows only."""
        cut = {name: getattr(self, name)[rows] for name in ("integers", "row_exponent", "lowest")}
        return replace(self, **cut)

    def dense(self) -> Tensor:
        """float32 [rows, cols], equal to the `dense` of the `Coded` part with the same numbers."""
        return (self.integers * powers(self.col_exponent)).mul_(powers(self.row_exponent)[:, None])


def regained(rounded: RoundedToSteps, energy: Tensor, missing: Tensor) -> RoundedToSteps:
    """Multiplies every row's step by its least-squares gain, rounded to a whole exponent, if that lowers the error.

    With w the rows as they are, and t their target: energy [rows] = w H w^T, missing [rows] = w H (t - w)^T.
    """
    best = 1 + missing / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    shift = (best.clamp(0.25, 4.0).log2() * PER_OCTAVE).round().long()
    gain = powers(shift) - 1
    better = (gain * (gain * energy - 2 * missing) < 0) & (energy > 0)
    exponent = torch.where(better, rounded.row_exponent + shift, rounded.row_exponent)
    return replace(rounded, row_exponent=exponent.clamp(rounded.lowest, rounded.lowest + LAST))
