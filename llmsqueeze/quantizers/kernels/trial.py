"""A trial of the kernels on a device: a small weight, rounded by them and by the torch forms; all must be equal.

It also finds out whether Triton can compile here at all: that needs a C compiler and a driver. It takes some seconds
on a machine that has not compiled these kernels before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.descent_on_device import coordinate_descent
from llmsqueeze.quantizers.gptq import PANEL, State, panel_on_device
from llmsqueeze.quantizers.grids import Rounded, fit_on_device
from llmsqueeze.quantizers.kernels import feedback, scales, sweep

ROWS, COLS = 6, 140  # a tile and a short one, a panel and a short one
GRID, DTYPE = Grid(3, -1, symmetric=True), torch.bfloat16


def differences(device: torch.device | str) -> list[str]:
    """What the kernels compute in another way than the torch forms on this device; empty if they work."""
    # numbers that no library and no seed can change
    x = torch.arange(2 * COLS * COLS, dtype=torch.float64).square().sin().view(2 * COLS, COLS)
    H = x.T @ x / len(x) + 0.1 * torch.eye(COLS, dtype=x.dtype)
    upper = torch.linalg.cholesky(H.inverse(), upper=True)
    weight, H, upper = (tensor.float().to(device) for tensor in (x[:ROWS], H, upper))
    scale, zero = fit_on_device(weight, None, GRID, DTYPE)
    codes, error = _panel(panel_on_device, weight, upper, scale, zero)
    rounded = Rounded(codes, scale[:, None].to(DTYPE), zero[:, None], GRID)
    alike = {
        "scales": torch.equal(scales.fit(weight, None, GRID, DTYPE)[0], scale),
        "feedback": all(map(torch.equal, _panel(feedback.round_panel, weight, upper, scale, zero), (codes, error))),
        "sweep": torch.equal(
            sweep.sweep_grid(rounded, weight, H, None).codes, coordinate_descent(rounded, weight, H, None).codes
        ),
    }
    return [name for name, same in alike.items() if not same]


def _panel(
    form: Callable[[State, slice, Tensor], None], weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes [ROWS, COLS] and errors [ROWS, PANEL] of the first panel; the scales of its group are there already."""
    codes, error = torch.zeros_like(weight, dtype=torch.uint8), torch.zeros_like(weight[:, :PANEL])
    fitted = scale[:, None].clone(), zero[:, None].clone()
    form(State(weight.clone(), weight, None, upper, None, GRID, DTYPE, codes, *fitted), slice(0, PANEL), error)
    return codes, error
