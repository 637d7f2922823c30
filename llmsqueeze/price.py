"""What rounding costs: the predicted increase of the model's loss, in nats per token, for every row and every option.

    cost[r, o] = 1/2 * g[r] * d H d^T,   d = W[r] - rounded by option o

g [rows] is the mean squared gradient of the summed loss at the linear's output row, H [cols, cols] the mean of x x^T
over its inputs. With labels drawn from the model this is the second-order term of the loss where the Fisher matrix
stands for the curvature, in the form of a Kronecker product (KFAC, arXiv 1503.05671) cut to the rows' diagonal. Costs
of rows, linears and blocks add up.

Stand-in: the errors are those of GPTQ with searched scales, times the ratio by which the quantizer that will be used
(descent) lowered them on some rows of the same linear. Memory: a copy of the rows being rounded, [options, rows] costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmsqueeze.compensate.lorc import truncated_svd
from llmsqueeze.curvature import Curvature
from llmsqueeze.parts import Grid
from llmsqueeze.quantize import QUANTIZERS
from llmsqueeze.quantize.rtn import rtn

TRIED_ROWS = 48
RANKS = 16  # components that are priced
CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}


class Option(NamedTuple):
    """What a row may become: its grid, and the share of its weights that stay as they are."""

    grid: Grid
    outliers: float = 0.0

    def __str__(self) -> str:
        return f"{self.grid}{f' + {100 * self.outliers:g} % outliers' if self.outliers else ''}"

    def kept(self, cols: int) -> int:
        """Outliers of a row of `cols` weights."""
        return round(self.outliers * cols)


def row_outliers(weight: Tensor, curvature: Curvature, count: int, taken: Tensor | None = None) -> Tensor:
    """bool [rows, cols]: in every row the `count` weights that would cost most to lose, by w^2 * H[j, j].

    Those `taken` already (bool [rows, cols]) are left out.
    """
    score = weight.square() * curvature.importance
    if taken is not None:
        score = score.masked_fill(taken, -torch.inf)
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, score.topk(count, dim=1).indices, True)


def price(
    weight: Tensor,
    row_gradient: Tensor,
    curvature: Curvature,
    options: Sequence[Option],
    quantizer: str,
    dtype: torch.dtype,
    search: bool,
) -> Tensor:
    """float32 [options, rows] on the CPU: the cost of each row of `weight` [rows, cols] as each option rounds it."""
    tried = torch.linspace(0, len(weight) - 1, min(TRIED_ROWS, len(weight)), device=weight.device).long()
    costs = []
    for option in options:
        error = output_errors(weight, curvature, option, "rtn" if quantizer == "rtn" else "gptq", dtype, search)
        if quantizer == "descent":
            found = output_errors(weight[tried], curvature, option, quantizer, dtype, search)
            error = error * (found.sum() / error[tried].sum().clamp(min=1e-30)).clamp(max=1.0)
        costs.append((0.5 * row_gradient * error).cpu())
    return torch.stack(costs)


def low_rank_gains(
    weight: Tensor,
    row_gradient: Tensor,
    curvature: Curvature,
    options: Sequence[Option],
    quantizer: str,
    dtype: torch.dtype,
    search: bool,
) -> Tensor:
    """float32 [options, `RANKS`] on the CPU: what each component of an input-weighted compensation (lorc.py) takes off
    the cost of `weight` [rows, cols] as each option rounds it; zeros beyond its rank.

    With the error weighted by the inputs as U S V^T, component i takes off 1/2 * sum_r g[r] * (u[r, i] * s[i])^2. The
    errors are those of the quantizer itself, for those of its stand-in have more of a direction to take off.
    """
    found = torch.zeros(len(options), RANKS)
    for i, option in enumerate(options):
        error = torch.cat(tuple(residuals(weight, curvature, option, quantizer, dtype, search)))
        weighted = torch.linalg.solve_triangular(curvature.upper, error, upper=True, left=False)
        left, _ = truncated_svd(weighted, min(RANKS, *weight.shape))
        # `left` has the roots of the singular values in it
        size = left.square().sum(dim=0)
        found[i, : left.shape[1]] = (0.5 * row_gradient @ (left * size.sqrt()).square()).cpu()
    return found


def output_errors(
    weight: Tensor, curvature: Curvature, option: Option, quantizer: str, dtype: torch.dtype, search: bool
) -> Tensor:
    """float32 [rows]: d H d^T of every row."""
    return torch.cat(
        [curvature.output_error(left) for left in residuals(weight, curvature, option, quantizer, dtype, search)]
    )


def residuals(
    weight: Tensor, curvature: Curvature, option: Option, quantizer: str, dtype: torch.dtype, search: bool
) -> Iterator[Tensor]:
    """weight - rounded, some rows at a time [some, cols]; outliers leave nothing."""
    step = max(1, CHUNK_BYTES[weight.device.type] // (4 * weight.shape[1]))
    for rows in weight.split(step):
        count = option.kept(weight.shape[1])
        pinned = row_outliers(rows, curvature, count) if count else None
        dense = QUANTIZERS[quantizer](rows, option.grid, dtype, curvature, pinned, search).dense()
        residual = rows - dense
        if pinned is not None:
            residual.masked_fill_(pinned, 0.0)
        yield residual


def rounding_error(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """float32 [rows, cols]: rounded - weight, to nearest, scales from the range: the paper's stand-in."""
    return rtn(weight, grid, dtype).dense() - weight
