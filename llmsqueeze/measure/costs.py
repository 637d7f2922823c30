"""What rounding costs: the predicted increase of the model's loss, in nats per token, for every row and every option.

    cost[r, o] = 1/2 * g[r] * d H d^T,   d = W[r] - rounded by option o

g [rows] is the mean squared gradient of the summed loss at the linear's output row, H [cols, cols] the mean of x x^T
over its inputs. With labels drawn from the model this is the second-order term of the loss where the Fisher matrix
stands for the curvature, in the form of a Kronecker product (KFAC, arXiv 1503.05671) cut to the rows' diagonal. Costs
of rows, linears and blocks add up.

By the average trace (HAWQ-V2, arXiv 1911.03852): the same with the mean over the weights of a linear in the place of g
and H, that is tr(Hessian) / numel * |d|^2, with d from rounding that knows no inputs. What differs from the paper: the
trace is that of the Kronecker product above, not drawn by Hutchinson's method; the factor 1/2.

Stand-in: the errors are those of GPTQ with searched scales, times the ratio by which the quantizer that will be used
(descent) lowered them on some rows of the same linear. Memory: a copy of the rows being rounded, [options, rows] costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.parts.coded import code_length
from llmsqueeze.parts.coding import frequencies, rans
from llmsqueeze.parts.coding.streams import one_context
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.quantizers import coded, rounder, rows_at_a_time
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.quantizers.lorc import truncated_svd
from llmsqueeze.quantizers.outliers import row_outliers
from llmsqueeze.recipe.methods import METHODS

TRIED_ROWS = 48
RANKS = 16  # components that are priced
CODED_ROWS = 64
OCTAVES = (-7.0, -6.0, -5.0, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
STREAM_BYTES = 4.5  # its length, and what its last state wastes


class Option(NamedTuple):
    """What a row may become: its grid, and the share of its weights that stay as they are."""

    grid: Grid
    outliers: float = 0.0

    def __str__(self) -> str:
        return f"{self.grid}{f' + {100 * self.outliers:g} % outliers' if self.outliers else ''}"

    def kept(self, cols: int) -> int:
        """Outliers of a row of `cols` weights."""
        return round(self.outliers * cols)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: the quantizer, the dtype of the scales in the file, whether the scales are searched."""

    quantizer: str
    dtype: torch.dtype
    search: bool

    @property
    def stand_in(self) -> Rounding:
        """The rounding whose errors are computed for all rows."""
        return replace(self, quantizer=METHODS[self.quantizer].priced_by)

    def of(self, weight: Tensor, option: Option, curvature: Curvature) -> tuple[Rounded, Tensor | None]:
        """`weight` [rows, cols] on the option's grid, and its outliers (bool [rows, cols]) if it has any."""
        count = option.kept(weight.shape[1])
        pinned = row_outliers(weight, curvature, count) if count else None
        return rounder(self.quantizer)(weight, option.grid, self.dtype, curvature, pinned, self.search), pinned


def price(
    weight: Tensor, row_gradient: Tensor, curvature: Curvature, options: Sequence[Option], rounding: Rounding
) -> Tensor:
    """float32 [options, rows] on the CPU: the cost of each row of `weight` [rows, cols] as each option rounds it."""
    some, costs = some_rows(weight, TRIED_ROWS), []
    for option in options:
        error = output_errors(weight, curvature, option, rounding.stand_in)
        if rounding != rounding.stand_in:
            exact = output_errors(weight[some], curvature, option, rounding)
            error = error * (exact.sum() / error[some].sum().clamp(min=1e-30)).clamp(max=1.0)
        costs.append((0.5 * row_gradient * error).cpu())
    return torch.stack(costs)


def average_trace(row_gradient: Tensor, curvature: Curvature) -> tuple[Tensor, Curvature]:
    """A gradient [rows] and a curvature in which every weight of the linear counts as the average of all does."""
    average = row_gradient.mean() * (curvature.diagonal - curvature.damping).mean()
    return average.expand_as(row_gradient), Curvature.flat(len(curvature.H), curvature.H)


def low_rank_gains(
    weight: Tensor, row_gradient: Tensor, curvature: Curvature, options: Sequence[Option], rounding: Rounding
) -> Tensor:
    """float32 [options, `RANKS`] on the CPU: what each component of an input-weighted compensation (lorc.py) takes off
    the cost of `weight` [rows, cols] as each option rounds it; zeros beyond its rank.

    With the error weighted by the inputs as U S V^T, component i takes off 1/2 * sum_r g[r] * (u[r, i] * s[i])^2. The
    errors are those of the quantizer itself, for those of its stand-in have more of a direction to take off.
    """
    gains = torch.zeros(len(options), RANKS)
    for i, option in enumerate(options):
        error = torch.cat(tuple(residuals(weight, curvature, option, rounding)))
        weighted = torch.linalg.solve_triangular(curvature.upper, error, upper=True, left=False)
        left, _ = truncated_svd(weighted, min(RANKS, *weight.shape))
        # `left` has the roots of the singular values in it
        size = left.square().sum(dim=0)
        gains[i, : left.shape[1]] = (0.5 * row_gradient @ (left * size.sqrt()).square()).cpu()
    return gains


def output_errors(weight: Tensor, curvature: Curvature, option: Option, rounding: Rounding) -> Tensor:
    """float32 [rows]: d H d^T of every row."""
    return torch.cat([curvature.output_error(left) for left in residuals(weight, curvature, option, rounding)])


def residuals(weight: Tensor, curvature: Curvature, option: Option, rounding: Rounding) -> Iterator[Tensor]:
    """weight - rounded, some rows at a time [some, cols]; outliers leave nothing."""
    for rows in weight.split(rows_at_a_time(weight)):
        rounded, pinned = rounding.of(rows, option, curvature)
        residual = rows - rounded.dense()
        if pinned is not None:
            residual.masked_fill_(pinned, 0.0)
        yield residual


def packed_rates(weight: Tensor, curvature: Curvature, options: Sequence[Option], rounding: Rounding) -> Tensor:
    """float64 [options] on the CPU: bits that a code of `weight` [rows, cols] takes when it is stored entropy-coded,
    the tables and streams among them; some rows stand for all."""
    rows, cols = weight.shape
    some = weight[some_rows(weight, CODED_ROWS)]
    shared = STREAM_BYTES * -(-rows // rans.rows_per_stream(rows, cols))
    rates = []
    for option in options:
        rounded, _ = rounding.stand_in.of(some, option, curvature)
        counted = rans.counts(rounded.codes.cpu().numpy(), one_context(*some.shape))
        tables = frequencies.choose(counted, symmetric=False)
        bits = frequencies.coded_bits(counted, tables, symmetric=False) / some.numel()
        rates.append(min(bits + 8 * (shared + len(tables)) / (rows * cols), float(option.grid.bits)))
    return torch.tensor(rates, dtype=torch.float64)


def some_rows(weight: Tensor, count: int) -> Tensor:
    """The numbers of `count` rows of `weight`, evenly spread; of all, if it has no more."""
    return torch.linspace(0, len(weight) - 1, min(count, len(weight)), device=weight.device).long()


def middles(rows: int, count: int) -> Tensor:
    """The middles of `count` equal spans of so many rows; all rows, if there are no more."""
    count = min(count, rows)
    return (2 * torch.arange(count) + 1) * rows // (2 * count)


@timed("round")
def coded_points(weight: Tensor, row_gradient: Tensor, curvature: Curvature) -> Tensor:
    """float64 [3, points] on the CPU: binary logarithms of multipliers (quantizers/coded.py), rising; bytes of `weight`
    [rows, cols] coded with each; the predicted loss.

    Some rows are coded with every multiplier, and stand for all. They are evenly spread over the rows in the order of
    their size in steps, on which bits and loss depend: so many rows taken in the order of the weight would be off by a
    tenth of a bit. Memory: those rows once per multiplier.
    """
    rows, cols = weight.shape
    size = torch.linalg.vector_norm(weight, dim=1) * row_gradient.sqrt()
    tried = size.argsort()[middles(rows, CODED_ROWS).to(weight.device)]
    some, gradient, share = weight[tried], row_gradient[tried], rows / len(tried)
    at = _zero_bits(weight, row_gradient, curvature) + torch.tensor(OCTAVES, dtype=torch.float64)
    steps = torch.cat([coded.row_steps(some, 2.0 ** float(one), gradient) for one in at])
    target = some.repeat(len(at), 1)
    rounded = coded.round_to_steps(target, steps, curvature, None, rows_at_a_time(weight), matrices=len(at))
    cost = 0.5 * gradient * curvature.output_error(target - rounded.dense()).view(len(at), -1)
    streams = -(-rows // rans.rows_per_stream(rows, cols))
    nbytes = []
    for values, exponent in zip(rounded.integers.chunk(len(at)), rounded.row_exponent.chunk(len(at)), strict=True):
        bits, tables = code_length(values, exponent, rounded.col_exponent)
        nbytes.append(bits * share / 8 + tables + streams * STREAM_BYTES + rows + cols)
    return torch.stack([at, torch.tensor(nbytes, dtype=torch.float64), cost.sum(dim=1).double().cpu() * share])


def _zero_bits(weight: Tensor, row_gradient: Tensor, curvature: Curvature) -> float:
    """Binary logarithm of the multiplier at which the bits of fine steps, extrapolated, come to none."""
    tiny = torch.finfo(weight.dtype).tiny
    size = weight.square().mean(dim=1).sqrt().clamp(min=tiny).log2() + 0.5 * row_gradient.log2()
    return float(size.mean() - curvature.upper.diagonal().log2().mean()) + 2.05  # a normal density's entropy
