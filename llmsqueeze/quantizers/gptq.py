"""GPTQ: "Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323).

Columns are rounded in order. The error of each column is spread over the columns that follow, so that the output of the
layer changes least:

    U^T U = H^-1,  U upper triangular
    e[:, j] = (w[:, j] - rounded[:, j]) / U[j, j];   w[:, k] -= e[:, j] * U[j, k]   for k > j

W [rows, cols]; H [cols, cols] damped second moments of the inputs (curvature.py). The feedback is applied to a panel of
about 128 columns at a time, which changes no result (the tests compare it with the column-by-column form). Scale and
zero of a group are fitted at its first column, to the weights with the feedback so far. On a CPU a panel is compiled
(loops/grids.py), on an NVIDIA GPU it is a kernel of Triton (kernels/feedback.py). The torch form is for other devices,
for machines without Triton, and for the tests.

What differs from the paper: damping starts at 0.01 and grows tenfold until the factorization succeeds. A column that
was never active (H[j, j] = 0) is rounded to nearest, and not set to zero. There is no activation order. Pinned entries
(outliers) keep their exact value; the feedback to a pinned entry goes on to the columns after it, as the exact minimum
needs. Memory beside W: one copy of it, its codes, and the curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.parallel.threads import over_rows
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import kernels
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded, fit_group, grid_loops, level_of, nearest_code, zero_code

PANEL = 128


@dataclass(frozen=True)
class State:
    """A weight [rows, cols] half rounded: w has the feedback so far, exact is the weight itself.

    codes uint8 [rows, cols]; scale, zero float32 [rows, groups]; h [cols]: the diagonal of the curvature if scales are
    searched; dtype: that of the scales in the file.
    """

    w: Tensor
    exact: Tensor
    pinned: Tensor | None
    upper: Tensor
    h: Tensor | None
    grid: Grid
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def fit(self, start: int) -> None:
        """Fits the group that starts at this column."""
        width = self.grid.width(self.w.shape[1])
        g, group = start // width, slice(start, start + width)
        mask, h = None if self.pinned is None else self.pinned[:, group], None if self.h is None else self.h[group]
        self.scale[:, g], self.zero[:, g] = fit_group(self.w[:, group], h, self.grid, self.dtype, mask)


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
    upper, width = curvature.upper, grid.width(cols)
    h = curvature.diagonal.contiguous() if search else None
    scale, zero = (torch.empty(rows, grid.groups(cols), device=weight.device) for _ in range(2))
    codes = torch.empty_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format)
    w = weight.clone(memory_format=torch.contiguous_format)
    state = State(w, weight, pinned, upper, h, grid, dtype, codes, scale, zero)
    errors = torch.empty(rows * PANEL, dtype=w.dtype, device=w.device)
    round_panel = form_for(w)
    for panel in panels(cols, width):
        if width > PANEL and panel.start % width == 0:
            state.fit(panel.start)  # it ends in a later panel
        error = errors[: rows * (panel.stop - panel.start)].view(rows, -1)
        round_panel(state, panel, error)
        w[:, panel.stop :].addmm_(error, upper[panel, panel.stop :], alpha=-1)
    return Rounded(codes, scale.to(dtype), zero, grid)


def form_for(w: Tensor) -> Callable[[State, slice, Tensor], None]:
    """What rounds a panel on the device of `w`."""
    if w.device.type == "cpu":
        return panel_compiled
    if kernels.usable(w):
        from llmsqueeze.quantizers.kernels.feedback import round_panel

        return round_panel
    return panel_on_device


def panel_compiled(state: State, panel: slice, error: Tensor) -> None:
    """Rounds the columns of the panel on a CPU; error [rows, span] becomes theirs."""
    loops, cols = grid_loops(), state.w.shape[1]
    width = state.grid.width(cols)
    pinned = torch.empty(0, 0, dtype=torch.bool) if state.pinned is None else state.pinned.contiguous()
    h = torch.ones(cols, dtype=state.w.dtype) if state.h is None else state.h
    tensors = (state.w, state.exact.contiguous(), pinned, state.upper[panel, panel].T.contiguous(), h)
    inputs = [*(tensor.numpy() for tensor in tensors), panel.start, width, width <= PANEL]
    inputs += loops.settings(state.grid, state.dtype, state.h is not None)
    outcome = [tensor.numpy() for tensor in (state.codes, state.scale, state.zero, error)]
    over_rows(len(error), lambda *rows: loops.round_panel(*inputs, *rows, *outcome))


def panel_on_device(state: State, panel: slice, error: Tensor) -> None:
    """`panel_compiled` in torch, on any device."""
    w, upper, grid, pinned = state.w, state.upper, state.grid, state.pinned
    width = grid.width(w.shape[1])
    for j in range(panel.start, panel.stop):
        if width <= PANEL and j % width == 0:
            state.fit(j)
        scale, zero = state.scale[:, j // width], state.zero[:, j // width]
        code = nearest_code(w[:, j], scale, zero, grid)
        rounded = level_of(code, scale, zero, grid)
        if pinned is not None:
            code = torch.where(pinned[:, j], zero_code(zero, grid), code)
            rounded = torch.where(pinned[:, j], state.exact[:, j], rounded)
        state.codes[:, j] = code.to(torch.uint8)
        e = (w[:, j] - rounded) / upper[j, j]
        w[:, j + 1 : panel.stop] -= torch.outer(e, upper[j, j + 1 : panel.stop])
        error[:, j - panel.start] = e


def panels(cols: int, width: int = 1) -> list[slice]:
    """Panels of about 128 columns. A group of `width` columns starts at the first column of a panel, or ends in the
    panel where it starts: no feedback to its columns is pending when it is fitted."""
    span = PANEL // width * width if width <= PANEL else width  # whole groups
    starts = [s for first in range(0, cols, span) for s in range(first, min(first + span, cols), PANEL)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], cols], strict=True)]
