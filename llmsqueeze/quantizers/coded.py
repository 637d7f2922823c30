"""Coded weights: integers of unlimited range, whose steps come from one Lagrange multiplier for the whole model.

    step[r, j] = lambda * u[j] / sqrt(g[r])

u [cols] is the diagonal of the feedback factor U (curvature.py). g [rows] is the mean squared gradient of the summed
loss at the linear's output row, with labels drawn from the model. Columns are rounded in order with GPTQ's error
feedback. The error that remains of column j is then u[j] times an error that belongs to this column only, and that is
uniform within half a step over u[j]. Thus every weight costs lambda^2 / 24 of predicted loss (1/2 * sum_r g[r] * d H
d^T), and one more bit lowers the loss by the same amount anywhere: this is reverse water-filling over rows, columns and
layers at once. The bits of each layer and row follow from it, and outliers need no separate part. The integers are
entropy-coded (parts/coded.py), so no value is clipped.

After the feedback come two rounds of a least-squares gain for every row (a whole number of sixteenths of an octave) and
one pass of coordinate descent over the integers. They lower the predicted loss by 3 to 15 % at equal bits on the small
models that we measured.

WaterSIC (arXiv 2603.04956) takes the steps of the columns from GPTQ's factor and uses entropy coding, with the same
rate for every row and layer; the gradient in the steps is ours. There is no dead zone and no activation order. Safe
limits: a row's gradient is drawn towards the mean of its linear with the weight of `PRIOR` tokens, so no row has a zero
gradient; columns that were never active count as active columns of mean size (curvature.py).
Memory beside W: two copies of it, its integers, and the curvature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmsqueeze.parts.coding.logsteps import LAST, PER_OCTAVE, exponents, powers
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.descent_on_device import descend
from llmsqueeze.quantizers.gptq import panels

ROUNDS = 2
PRIOR = 64  # tokens
GAIN_OCTAVES = 2  # the most that gains change a row's first step, up or down
MAX_BITS = 29  # of an integer before gains and feedback change it; 32 are stored
FREE_STEP = 1 / 16  # of a row's root mean square, for a linear that no sample reached: about six bits


@dataclass(frozen=True)
class RoundedToSteps:
    """A weight rounded to steps: integers [rows, cols] (float32); row_exponent int64 [rows], col_exponent int64 [cols].

    The step of row r and column j is 2^((row_exponent[r] + col_exponent[j]) / 16). `lowest` int64 [rows]: a row's
    exponent stays from `lowest` to `lowest` + 255.
    """

    integers: Tensor
    row_exponent: Tensor
    col_exponent: Tensor
    lowest: Tensor

    def rows(self, rows: slice) -> RoundedToSteps:
        """These rows only."""
        cut = {name: getattr(self, name)[rows] for name in ("integers", "row_exponent", "lowest")}
        return replace(self, **cut)

    def dense(self) -> Tensor:
        """float32 [rows, cols], equal to the `dense` of the `Coded` part with the same numbers."""
        return (self.integers * powers(self.col_exponent)).mul_(powers(self.row_exponent)[:, None])


def shrunk_gradient(row_gradient: Tensor, tokens: int) -> Tensor:
    """g [rows] drawn towards its mean; the fewer tokens it was measured on, the more."""
    mean = row_gradient.mean()
    if not mean > 0:
        return torch.ones_like(row_gradient)
    return (row_gradient * tokens + PRIOR * mean) / (tokens + PRIOR)


def row_steps(weight: Tensor, multiplier: float, row_gradient: Tensor | None) -> Tensor:
    """[rows]: the step of each row where u is 1. Without a gradient it follows the size of the row."""
    if row_gradient is not None:
        return multiplier / row_gradient.sqrt()
    size = weight.square().mean(dim=1).sqrt()
    return FREE_STEP * size.clamp(min=float(size.max()) * 2.0**-PER_OCTAVE).clamp(min=torch.finfo(size.dtype).tiny)


def column_steps(curvature: Curvature) -> Tensor:
    """[cols]: u."""
    return curvature.upper.diagonal()


def sensitivity(multiplier: float, curvature: Curvature) -> float:
    """The cost of an error without feedback, in nats per token for each squared step of error.

    1/2 * g[r] * H[j, j] * d^2 = 1/2 * lambda^2 * (d / step[r, j])^2 * H[j, j] * u[j]^2. The last two factors are
    averaged over the columns for errors d of one size.
    """
    mean = curvature.diagonal.sum() / column_steps(curvature).pow(-2).sum()
    return 0.5 * multiplier**2 * float(mean)


def round_to_steps(
    target: Tensor, steps: Tensor, curvature: Curvature, pinned: Tensor | None, chunk: int, matrices: int = 1
) -> RoundedToSteps:
    """Rounds `target` [rows, cols] (float32) to the row steps `steps` [rows] under the curvature, `chunk` rows at once.

    `pinned` bool [rows, cols]: weights of another part, whose integer is 0. `matrices`: the number of matrices with
    equally many rows that `target` stacks. If a step is so fine that an integer of its row would need more than
    `MAX_BITS`, the step becomes coarser.
    """
    margin = GAIN_OCTAVES * PER_OCTAVE
    col_exponent = exponents(column_steps(curvature))
    # the smallest column step becomes 1, as in `Coded`: only then do both round products in the same way
    finest = target.abs().amax(dim=1) * 2.0 ** (1 - MAX_BITS) / powers(col_exponent.min())
    row_exponent = exponents(torch.maximum(steps, finest.to(steps)).view(matrices, -1), LAST - 2 * margin)
    row_exponent, col_exponent = row_exponent + col_exponent.min(), col_exponent - col_exponent.min()
    lowest = (row_exponent.amin(dim=1, keepdim=True) - margin).expand_as(row_exponent)
    start = RoundedToSteps(target, row_exponent.flatten(), col_exponent, lowest.flatten())
    chunks = []
    for first in range(0, len(target), chunk):
        rows = slice(first, first + chunk)
        chunks.append(_round_rows(target[rows], start.rows(rows), curvature, None if pinned is None else pinned[rows]))
    integers, exponent = (torch.cat([getattr(one, name) for one in chunks]) for name in ("integers", "row_exponent"))
    return replace(start, integers=integers, row_exponent=exponent)


def _round_rows(target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None) -> RoundedToSteps:
    rounded = feedback(target, start, curvature, pinned)
    # pinned entries have no error: for the other entries they are zeros that stay zero
    target = target if pinned is None else target.masked_fill(pinned, 0.0)
    for _ in range(ROUNDS):
        rounded = coordinate_descent(refit(rounded, target, curvature.H), target, curvature.H, pinned)
    return refit(rounded, target, curvature.H)


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
    best = 1 + missing / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    shift = (best.clamp(0.25, 4.0).log2() * PER_OCTAVE).round().long()
    gain = powers(shift) - 1
    better = (gain * (gain * energy - 2 * missing) < 0) & (energy > 0)
    exponent = torch.where(better, rounded.row_exponent + shift, rounded.row_exponent)
    return replace(rounded, row_exponent=exponent.clamp(rounded.lowest, rounded.lowest + LAST))


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
