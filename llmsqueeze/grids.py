"""Fitting a grid to a group of weights: scale and zero from the range, or searched under the input second moments.

    asymmetric: scale = ratio * (max - min) / (2**bits - 1), zero = round(-min / range * (2**bits - 1))
    symmetric:  scale = +- ratio * absmax * 2 / (2**bits - 1), zero = 2**(bits - 1)
    half:       scale = ratio * absmax * 2 / (2**bits - 1), zero = (2**bits - 1) / 2; for one bit ratio * 2 * mean |w|

The range always includes 0, so that every grid but a half one has a level 0 (outliers are pinned to it); a dead row
stays dead, or next to it. Searching tries 29 ratios from 1.05 down to 0.35 and keeps, per row, the one with the least
`sum_j h[j] * (w[j] - rounded[j])**2`, h the mean squared input of column j; a symmetric grid is tried with both signs,
for its levels are one-sided. The scale is rounded to the dtype it is stored in before anything is rounded with it.
Symbols: w [rows, width] one group of columns; h [width]; scale, zero [rows].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.parts import Grid

RATIOS = [1.05 - 0.7 * i / 28 for i in range(29)]


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: codes uint8 [rows, cols]; scale [rows, groups] in its stored dtype; zero float32 likewise."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def levels(self, rows: slice = slice(None)) -> Tensor:
        """float32 [rows, cols]: code - zero, of all rows or some."""
        return self.codes[rows].float() - self.grid.expand(self.zero[rows], self.codes.shape[1])

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.levels() * self.grid.expand(self.scale.float(), self.codes.shape[1])


def fit_group(
    w: Tensor, h: Tensor | None, grid: Grid, dtype: torch.dtype, pinned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale (float32, but a value of `dtype`) and zero (float32) per row; searched if `h` is given, else by range.

    `pinned` [rows, width] marks outliers: they count neither for the range nor for the error.
    """
    if pinned is not None:
        w = w.masked_fill(pinned, 0.0)  # level 0 is on every grid, so a zero costs neither range nor error
    low, high = w.amin(dim=1).clamp(max=0), w.amax(dim=1).clamp(min=0)
    if grid.symmetric:
        base = torch.maximum(-low, high) * 2 / grid.max_code
        zero = torch.full_like(base, grid.fixed_zero)
        signs = [1.0, -1.0]
        if grid.half:
            if grid.bits == 1:
                weights = torch.ones_like(w[0]) if h is None else h
                base = w.abs().mv(weights) * 2 / weights.sum().clamp(min=torch.finfo(w.dtype).tiny)
            # without a level 0, what is zero should become next to nothing
            base, signs = base.clamp(min=torch.finfo(base.dtype).tiny), [1.0]
    else:
        base = (high - low) / grid.max_code
        zero = torch.where(base > 0, torch.round(-low / base), 0.0).nan_to_num(0.0).clamp(0, grid.max_code)
        signs = [1.0]
    if h is None:
        return storable(base, dtype), zero
    best_scale, best_error = storable(base, dtype), torch.full_like(base, torch.inf)
    for sign in signs:
        for ratio in RATIOS:
            scale = storable(base * (sign * ratio), dtype)
            error = (round_to(w, scale[:, None], zero[:, None], grid) - w).square_().mv(h)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
    return best_scale, zero


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to a finite, non-zero value of the dtype that it is stored in (float32 out).

    A group of zeros gets scale 1, one too small for the dtype its smallest number.
    """
    limits = torch.finfo(dtype)
    # float16 scales of small weights are subnormal, which costs precision but works; float32 ones must stay normal
    smallest = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    magnitude = scale.abs().clamp(smallest, limits.max)
    return torch.where(scale == 0, 1.0, magnitude.copysign(scale)).to(dtype).float()


def encode(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The code of the nearest level, as float32; shapes as they broadcast."""
    return torch.round(w / scale + zero).clamp_(0, grid.max_code)


def round_to(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest level itself; shapes as they broadcast."""
    return (encode(w, scale, zero, grid) - zero).mul_(scale)
