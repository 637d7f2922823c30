"""GPTQ: "Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323).

Columns are rounded in order; what each rounding leaves is spread over the columns still to come, so that the
layer's output, not its weight, stays near:

    U^T U = H^-1,  U upper triangular
    e[:, j] = (w[:, j] - rounded[:, j]) / U[j, j];   w[:, k] -= e[:, j] * U[j, k]   for k > j

W [rows, cols]; H [cols, cols] damped second moments of the inputs (curvature.py); the feedback is applied lazily,
a panel of about 128 columns at a time, which changes no result (the column-by-column form is the oracle in the
tests). Scale and zero of a group are fitted when its first column comes up, to the weights as they then are.

What differs from the paper: damping starts at 0.01 and grows tenfold until the factorisation succeeds; a column that
was never active (H[j, j] = 0) is rounded to nearest, not set to zero; no activation order. Pinned entries (outliers)
keep their exact value; the feedback that reached one flows on to the columns after it, as the exact minimiser wants.
Memory beside W: one copy of it, its codes, and the curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded, decode, encode, fit_group, zero_code

PANEL = 128


def gptq(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    curvature: Curvature,
    pinned: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Rounds `weight` [rows, cols] (float32) under the curvature; pinned entries get the code of level 0.

    `dtype` is the scales' in the file; with `search` they are searched under its diagonal.
    """
    assert pinned is None or not grid.half, "outliers are pinned to level 0"
    rows, cols = weight.shape
    upper, importance = curvature.upper, curvature.importance
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
                h = importance[group] if search else None
                scale[:, g], zero[:, g] = fit_group(w[:, group], h, grid, dtype, mask)
            code = encode(w[:, j], scale[:, g], zero[:, g], grid)
            rounded = decode(code, scale[:, g], zero[:, g], grid)
            if pinned is not None:
                code = torch.where(pinned[:, j], zero_code(zero[:, g], grid), code)
                rounded = torch.where(pinned[:, j], weight[:, j], rounded)
            codes[:, j] = code.to(torch.uint8)
            e = (w[:, j] - rounded) / upper[j, j]
            w[:, j + 1 : panel.stop] -= torch.outer(e, upper[j, j + 1 : panel.stop])
            error[:, j - panel.start] = e
        w[:, panel.stop :] -= error @ upper[panel, panel.stop :]
    return Rounded(codes, scale.to(dtype), zero, grid)


def panels(cols: int, width: int) -> list[slice]:
    """Runs of about 128 columns such that a group never starts inside one with feedback still pending beyond it."""
    step = PANEL // width * width if width <= PANEL else width
    starts = [s for group in range(0, cols, step) for s in range(group, min(group + step, cols), PANEL)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], cols], strict=True)]
