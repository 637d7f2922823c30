"""GPTQ: "Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323).

Columns are rounded in order. The error of each column is spread over the columns that follow, so that the output of the
layer changes least:

    U^T U = H^-1,  U upper triangular
    e[:, j] = (w[:, j] - rounded[:, j]) / U[j, j];   w[:, k] -= e[:, j] * U[j, k]   for k > j

W [rows, cols]; H [cols, cols] damped second moments of the inputs (curvature.py). The feedback is applied to a panel of
about 128 columns at a time, which changes no result (the tests compare it with the column-by-column form). Scale and
zero of a group are fitted at its first column, to the weights with the feedback so far.

What differs from the paper: damping starts at 0.01 and grows tenfold until the factorization succeeds. A column that
was never active (H[j, j] = 0) is rounded to nearest, and not set to zero. There is no activation order. Pinned entries
(outliers) keep their exact value; the feedback to a pinned entry goes on to the columns after it, as the exact minimum
needs. Memory beside W: one copy of it, its codes, and the curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded, fit_group, level_of, nearest_code, zero_code

PANEL = 128


def gptq(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    curvature: Curvature,
    pinned: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Rounds `weight` [rows, cols] (float32); arguments and result as `Rounder` has them."""
    assert pinned is None or not grid.half, "outliers are pinned to level 0"
    rows, cols = weight.shape
    upper, diagonal = curvature.upper, curvature.diagonal
    w = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale = torch.empty(rows, grid.groups(cols), device=weight.device)
    zero = torch.empty_like(scale)
    width = grid.width(cols)
    for panel in panels(cols, width):
        error = torch.zeros(rows, panel.stop - panel.start, dtype=w.dtype, device=w.device)
        for j in range(panel.start, panel.stop):
            g = j // width
            if j % width == 0:
                group = slice(j, min(j + width, cols))
                mask = None if pinned is None else pinned[:, group]
                h = diagonal[group] if search else None
                scale[:, g], zero[:, g] = fit_group(w[:, group], h, grid, dtype, mask)
            code = nearest_code(w[:, j], scale[:, g], zero[:, g], grid)
            rounded = level_of(code, scale[:, g], zero[:, g], grid)
            if pinned is not None:
                code = torch.where(pinned[:, j], zero_code(zero[:, g], grid), code)
                rounded = torch.where(pinned[:, j], weight[:, j], rounded)
            codes[:, j] = code.to(torch.uint8)
            e = (w[:, j] - rounded) / upper[j, j]
            w[:, j + 1 : panel.stop] -= torch.outer(e, upper[j, j + 1 : panel.stop])
            error[:, j - panel.start] = e
        w[:, panel.stop :] -= error @ upper[panel, panel.stop :]
    return Rounded(codes, scale.to(dtype), zero, grid)


def panels(cols: int, width: int = 1) -> list[slice]:
    """Panels of about 128 columns. A group of `width` columns starts at the first column of a panel, or ends in the
    panel where it starts: no feedback to its columns is pending when it is fitted."""
    span = PANEL // width * width if width <= PANEL else width  # whole groups
    starts = [s for first in range(0, cols, span) for s in range(first, min(first + span, cols), PANEL)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], cols], strict=True)]
