"""Fit of a grid to a group of weights: scale and zero from the range, or searched under the input second moments.

    asymmetric: scale = ratio * (max - min) / (2**bits - 1), zero = round(-min / range * (2**bits - 1))
    symmetric:  scale = +- ratio * absmax * 2 / (2**bits - 1), zero = 2**(bits - 1)
    half:       scale = ratio * absmax * 2 / (2**bits - 1), zero = (2**bits - 1) / 2; for one bit ratio * 2 * mean |w|
    dual:       s = +- ratio * absmax / 2, alpha1 = 2 s, alpha2 = -s (dual_binary.py)

The range always includes 0, so that every grid except a half grid has a level 0 (outliers are pinned to it). A row of
zeros stays zero, or nearly zero. The search tries 29 ratios from 1.05 down to 0.35, and each row takes the one with the
least `sum_j h[j] * (w[j] - rounded[j])**2`, with h the mean squared input of column j. A symmetric grid is tried with
both signs, because its levels are one-sided. The scale is rounded to its stored dtype before weights are rounded with
it. Symbols: w [rows, width] one group of columns; h [width]; scale, zero [rows]. For a dual grid, scale is alpha1 and
zero is alpha2 in this package. On a CPU the fit is compiled (loops/grids.py), on an NVIDIA GPU it is a kernel of Triton
(kernels/scales.py); the torch form is for other devices and for machines without Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parallel.threads import over_rows
from llmsqueeze.parts import Grid
from llmsqueeze.parts.dual_binary import planes_of
from llmsqueeze.quantizers import dual_binary, kernels

RATIOS = [1.05 - 0.7 * i / 28 for i in range(29)]


@dataclass(frozen=True)
class Rounded:
    """A weight rounded to a grid: codes uint8 [rows, cols]; scale [rows, groups] in its stored dtype; zero float32,
    of the same shape.

    It is a sum of planes, each times one scale per group: one plane of levels, or the two planes of a dual grid.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def rows(self, rows: slice) -> Rounded:
        """These rows only."""
        return Rounded(self.codes[rows], self.scale[rows], self.zero[rows], self.grid)

    @classmethod
    def joined(cls, chunks: Sequence[Rounded]) -> Rounded:
        """Rows of one grid below each other."""
        codes, scale, zero = (torch.cat([getattr(one, name) for one in chunks]) for name in ("codes", "scale", "zero"))
        return cls(codes, scale, zero, chunks[0].grid)

    def planes(self, rows: slice = slice(None)) -> list[Tensor]:
        """float32 [rows, cols] each, of these rows: code - zero, or the two planes of bits."""
        codes = self.codes[rows]
        if self.grid.dual:
            return [plane.float() for plane in planes_of(codes)]
        return [codes.float() - self.grid.expand(self.zero[rows], codes.shape[1])]

    @property
    def scales(self) -> Tensor:
        """[rows, planes * groups]: all scales of a row, plane after plane, in the stored dtype."""
        return torch.cat([self.scale, self.zero.to(self.scale)], dim=1) if self.grid.dual else self.scale

    def rescaled(self, scales: Tensor) -> Rounded:
        """The same codes with new scales [rows, planes * groups]."""
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
    """Scale (float32, a value that `dtype` has) and zero (float32) per row; searched if `h` is given, else by range.

    `pinned` bool [rows, width]: outliers, which change neither the range nor the error.
    """
    if pinned is not None:
        w = w.masked_fill(pinned, 0.0)  # every grid has level 0, so a zero changes neither range nor error
    if w.device.type == "cpu":
        return fit_compiled(w, h, grid, dtype)
    if kernels.usable(w):
        from llmsqueeze.quantizers.kernels.scales import fit

        return fit(w, h, grid, dtype)
    return fit_on_device(w, h, grid, dtype)


def fit_compiled(w: Tensor, h: Tensor | None, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`fit_group` on a CPU."""
    loops, weights = grid_loops(), torch.ones(w.shape[1], dtype=w.dtype) if h is None else h.contiguous()
    scale, zero = torch.empty(len(w)), torch.empty(len(w))
    values, settings = w.contiguous().numpy(), loops.settings(grid, dtype, h is not None)
    outcome = scale.numpy(), zero.numpy()
    over_rows(len(w), lambda *rows: loops.fit_rows(values, weights.numpy(), *settings, *rows, *outcome))
    return scale, zero


def grid_loops() -> Any:
    """The compiled loops; numba is imported only if something is rounded."""
    from llmsqueeze.quantizers.loops import grids

    return grids


def fit_on_device(w: Tensor, h: Tensor | None, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`fit_group` on any device."""
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
            # a half grid has no level 0: a group of zeros gets the least scale
            base, signs = base.clamp(min=torch.finfo(base.dtype).tiny), [1.0]
    else:
        # by a tensor: on a GPU torch would multiply by the reciprocal of a number
        base = (high - low) / high.new_full((), grid.max_code)
        zero = torch.where(base > 0, torch.round(-low / base), 0.0).nan_to_num(0.0).clamp(0, grid.max_code)
        signs = [1.0]
    if h is None:
        scale = storable(base, dtype)
        return dual_binary.start(scale) if grid.dual else (scale, zero)
    best_scale, best_error = storable(base, dtype), torch.full_like(base, torch.inf)
    for sign, ratio in itertools.product(signs, RATIOS):
        scale = storable(base * (sign * ratio), dtype)
        pair = dual_binary.start(scale) if grid.dual else (scale, zero)
        error = (nearest_level(w, pair[0][:, None], pair[1][:, None], grid) - w).square_().mv(h)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return dual_binary.start(best_scale) if grid.dual else (best_scale, zero)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to a finite, non-zero value of its stored dtype, as float32.

    A scale of 0 becomes 1, and one too small for the dtype the smallest number that the dtype has.
    """
    limits = torch.finfo(dtype)
    # a subnormal float16 scale of small weights is less precise, but works; a float32 scale must stay normal
    smallest = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    magnitude = scale.abs().clamp(smallest, limits.max)
    return torch.where(scale == 0, 1.0, magnitude.copysign(scale)).to(dtype).float()


def nearest_code(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The code of the level nearest to `w`, as float32; all shapes broadcast."""
    if grid.dual:
        return dual_binary.nearest_code(w, scale, zero)
    return torch.round(w / scale + zero).clamp_(0, grid.max_code)


def nearest_level(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The level nearest to `w`; all shapes broadcast."""
    return level_of(nearest_code(w, scale, zero, grid), scale, zero, grid)


def level_of(code: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The level of a code; all shapes broadcast."""
    if grid.dual:
        return dual_binary.level_of(code, scale, zero)
    return (code - zero) * scale


def zero_code(zero: Tensor, grid: Grid) -> Tensor:
    """The code of level 0, of the shape of `zero`."""
    return torch.full_like(zero, grid.fixed_zero) if grid.dual else zero
