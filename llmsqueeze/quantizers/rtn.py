"""RTN: round to nearest. It needs no data.

    code[r, j] = clamp(round(W[r, j] / scale[r, g(j)] + zero[r, g(j)]), 0, 2**bits - 1)

W [rows, cols]; g(j) the group of column j; scale and zero [rows, groups] from the range of the group, or searched
(grids.py). Without curvature every column has the same weight in the search. Memory: one copy of W and its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded, fit_group, nearest_code, zero_code


def rtn(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    curvature: Curvature | None = None,
    pinned: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Rounds `weight` [rows, cols] (float32); arguments and result as `Rounder` has them. The curvature changes
    only the search of the scales."""
    assert pinned is None or not grid.half, "outliers are pinned to level 0"
    cols = weight.shape[1]
    diagonal = torch.ones(cols, device=weight.device) if curvature is None else curvature.diagonal
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scales, zeros = [], []
    for group in grid.slices(cols):
        w = weight[:, group]
        mask = None if pinned is None else pinned[:, group]
        scale, zero = fit_group(w, diagonal[group] if search else None, grid, dtype, mask)
        code = nearest_code(w, scale[:, None], zero[:, None], grid)
        if mask is not None:
            code = torch.where(mask, zero_code(zero, grid)[:, None], code)
        codes[:, group] = code.to(torch.uint8)
        scales.append(scale)
        zeros.append(zero)
    return Rounded(codes, torch.stack(scales, 1).to(dtype), torch.stack(zeros, 1), grid)
