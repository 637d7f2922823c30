"""The rounds of coded.py in torch, for devices without compiled loops: feedback, gain and coordinate descent.

On an NVIDIA GPU with Triton the columns of a panel are kernels (kernels/feedback.py, kernels/sweep.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.descent_on_device import descend
from llmsqueeze.quantizers.gptq import panels
from llmsqueeze.quantizers.steps import RoundedToSteps, regained


def feedback(target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None) -> RoundedToSteps:
    """Rounds column after column to the steps of `start`; the columns that follow take the error up."""
    rows, cols = target.shape
    upper, row, col = curvature.upper, powers(start.row_exponent), powers(start.col_exponent)
    w, integers = target.clone(), torch.empty_like(target)
    for panel in panels(cols):
        error = torch.empty(rows, panel.stop - panel.start, dtype=w.dtype, device=w.device)
        for j in range(panel.start, panel.stop):
            step = row * col[j]
            integer = torch.round(w[:, j] / step)
            rounded = integer * step
            if pinned is not None:
                integer = integer.masked_fill(pinned[:, j], 0.0)
                rounded = torch.where(pinned[:, j], target[:, j], rounded)
            integers[:, j] = integer
            e = (w[:, j] - rounded) / upper[j, j]
            w[:, j + 1 : panel.stop] -= torch.outer(e, upper[j, j + 1 : panel.stop])
            error[:, j - panel.start] = e
        w[:, panel.stop :] -= error @ upper[panel, panel.stop :]
    return replace(start, integers=integers)


def refit(rounded: RoundedToSteps, target: Tensor, H: Tensor) -> RoundedToSteps:
    """Multiplies every row's step by its least-squares gain, rounded to a whole exponent, if that lowers the error."""
    dense = rounded.dense()
    weighted = dense @ H
    energy, missing = (weighted * dense).sum(dim=1), (weighted * (target - dense)).sum(dim=1)
    return regained(rounded, energy, missing)


def coordinate_descent(rounded: RoundedToSteps, target: Tensor, H: Tensor, pinned: Tensor | None) -> RoundedToSteps:
    """One pass over the integers, column by column: each becomes the one with the least error."""
    row, col = powers(rounded.row_exponent), powers(rounded.col_exponent)
    integers = rounded.integers.clone()

    def nearest(best: Tensor, j: int) -> tuple[Tensor, Tensor]:
        step = row * col[j]
        integer = torch.round(best / step)
        if pinned is not None:
            integer = integer.masked_fill(pinned[:, j], 0.0)
        return integer, integer * step

    descend(integers, rounded.dense(), target, H, nearest)
    return replace(rounded, integers=integers)
