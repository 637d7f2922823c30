"""Fitting a grid to a group of weights: scale and zero from the range, or searched under the input second moments.

    asymmetric: scale = ratio * (max - min) / (2**bits - 1), zero = round(-min / range * (2**bits - 1))
    symmetric:  scale = +- ratio * absmax * 2 / (2**bits - 1), zero = 2**(bits - 1)
    half:       scale = ratio * absmax * 2 / (2**bits - 1), zero = (2**bits - 1) / 2; for one bit ratio * 2 * mean |w|

    dual:       s = +- ratio * absmax / 2, alpha1 = 2 s, alpha2 = -s (dual_binary.py)

The range always includes 0, so that every grid but a half one has a level 0 (outliers are pinned to it); a dead row
stays dead, or next to it. Searching tries 29 ratios from 1.05 down to 0.35 and keeps, per row, the one with the least
`sum_j h[j] * (w[j] - rounded[j])**2`, h the mean squared input of column j; a symmetric grid is tried with both signs,
for its levels are one-sided. The scale is rounded to the dtype it is stored in before anything is rounded with it.
Symbols: w [rows, width] one group of columns; h [width]; scale, zero [rows]; of a dual grid scale stands for alpha1 and
zero for alpha2, everywhere.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.parts.dual_binary import planes_of
from llmsqueeze.quantizers import dual_binary

RATIOS = [1.05 - 0.7 * i / 28 for i in range(29)]


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: codes uint8 [rows, cols]; scale [rows, groups] in its stored dtype; zero float32 likewise.

    It is a sum of planes, each times one scale per group: one plane of levels, or the two of a dual grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def planes(self, rows: slice = slice(None)) -> list[Tensor]:
        """float32 [rows, cols] each, of all rows or some: code - zero, or the two planes of bits."""
        codes = self.codes[rows]
        if self.grid.dual:
            return [plane.float() for plane in planes_of(codes)]
        return [codes.float() - self.grid.expand(self.zero[rows], codes.shape[1])]

    @property
    def scales(self) -> Tensor:
        """[rows, planes * groups]: all scales of a row, plane by plane, in the stored dtype."""
        return torch.cat([self.scale, self.zero.to(self.scale)], dim=1) if self.grid.dual else self.scale

    def rescaled(self, scales: Tensor) -> Rounded:
        """The same codes with other scales [rows, planes * groups]."""
        if not self.grid.dual:
            return replace(self, scale=scales)
        first, second = scales.chunk(2, dim=1)
        return replace(self, scale=first, zero=second.float())

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        cols, per_plane = self.codes.shape[1], self.scales.float().chunk(2 if self.grid.dual else 1, dim=1)
        pairs = zip(self.planes(), per_plane, strict=True)
        first, *others = [plane.mul_(self.grid.expand(scale, cols)) for plane, scale in pairs]
        return sum(others, first)


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
        base = torch.maximum(-low, high) * (1 / 2 if grid.dual else 2 / grid.max_code)
        if grid.dual:
            base = base.clamp(max=torch.finfo(dtype).max / 4)  # alpha1 is twice that
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
        scale = storable(base, dtype)
        return dual_binary.start(scale) if grid.dual else (scale, zero)
    best_scale, best_error = storable(base, dtype), torch.full_like(base, torch.inf)
    for sign, ratio in itertools.product(signs, RATIOS):
        scale = storable(base * (sign * ratio), dtype)
        pair = dual_binary.start(scale) if grid.dual else (scale, zero)
        error = (round_to(w, pair[0][:, None], pair[1][:, None], grid) - w).square_().mv(h)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return dual_binary.start(best_scale) if grid.dual else (best_scale, zero)


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
    if grid.dual:
        return dual_binary.encode(w, scale, zero)
    return torch.round(w / scale + zero).clamp_(0, grid.max_code)


def round_to(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest level itself; shapes as they broadcast."""
    return decode(encode(w, scale, zero, grid), scale, zero, grid)


def decode(code: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The level that a code stands for; shapes as they broadcast."""
    if grid.dual:
        return dual_binary.decode(code, scale, zero)
    return (code - zero) * scale


def zero_code(zero: Tensor, grid: Grid) -> Tensor:
    """The code of level 0, of the shape of `zero`."""
    return torch.full_like(zero, grid.fixed_zero) if grid.dual else zero
