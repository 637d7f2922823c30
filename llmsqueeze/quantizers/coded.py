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
On a CPU the loops are compiled (loops/coded.py), and the gradient is carried along: of five and a half products with H,
feedback's half among them, two are left. Other devices take coded_on_device.py, and kernels for the columns where there
is Triton. Memory beside W: two copies of it, its integers, and the curvature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parallel.processes import OverRows, all_rows
from llmsqueeze.parallel.threads import over_rows
from llmsqueeze.parts.coding.logsteps import LAST, PER_OCTAVE, exponents, powers
from llmsqueeze.quantizers import kernels
from llmsqueeze.quantizers.coded_on_device import coordinate_descent, feedback, refit
from llmsqueeze.quantizers.curvature import Curvature, row_error
from llmsqueeze.quantizers.gptq import PANEL, panels
from llmsqueeze.quantizers.steps import RoundedToSteps, regained

ROUNDS = 2
PRIOR = 64  # tokens
GAIN_OCTAVES = 2  # the most that gains change a row's first step, up or down
MAX_BITS = 29  # of an integer before gains and feedback change it; 32 are stored
FREE_STEP = 1 / 16  # of a row's root mean square, for a linear that no sample reached: about six bits


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
    target: Tensor,
    steps: Tensor,
    curvature: Curvature,
    pinned: Tensor | None,
    chunk: int,
    matrices: int = 1,
    over: OverRows = all_rows,
) -> RoundedToSteps:
    """Rounds `target` [rows, cols] (float32) to the row steps `steps` [rows] under the curvature, `chunk` rows at once.

    `pinned` bool [rows, cols]: weights of another part, whose integer is 0. `matrices`: the number of matrices with
    equally many rows that `target` stacks. `over`: shares the rows among processes. If a step is so fine that an
    integer of its row would need more than `MAX_BITS`, the step becomes coarser.
    """
    margin = GAIN_OCTAVES * PER_OCTAVE
    col_exponent = exponents(column_steps(curvature))
    # the smallest column step becomes 1, as in `Coded`: only then do both round products in the same way
    finest = target.abs().amax(dim=1) * 2.0 ** (1 - MAX_BITS) / powers(col_exponent.min())
    row_exponent = exponents(torch.maximum(steps, finest.to(steps)).view(matrices, -1), LAST - 2 * margin)
    row_exponent, col_exponent = row_exponent + col_exponent.min(), col_exponent - col_exponent.min()
    lowest = (row_exponent.amin(dim=1, keepdim=True) - margin).expand_as(row_exponent)
    start = RoundedToSteps(target, row_exponent.flatten(), col_exponent, lowest.flatten())

    def rounded(own: slice) -> list[Tensor]:
        chunks = []
        for first in range(own.start, own.stop, chunk):
            rows = slice(first, min(first + chunk, own.stop))
            mask = None if pinned is None else pinned[rows]
            chunks.append(_round_rows(target[rows], start.rows(rows), curvature, mask))
        return [torch.cat([getattr(one, name) for one in chunks]) for name in ("integers", "row_exponent")]

    integers, exponent = over(len(target), rounded)
    return replace(start, integers=integers, row_exponent=exponent)


def _round_rows(target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None) -> RoundedToSteps:
    round_rows = round_compiled if target.device.type == "cpu" else round_on_device
    return round_rows(target, start, curvature, pinned)


def round_on_device(
    target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None
) -> RoundedToSteps:
    """Rounds rows on any device."""
    feed_back, sweep = feedback, coordinate_descent
    if kernels.usable(target):
        from llmsqueeze.quantizers.kernels.feedback import feedback as feed_back
        from llmsqueeze.quantizers.kernels.sweep import sweep_steps as sweep
    rounded = feed_back(target, start, curvature, pinned)
    # pinned entries have no error: for the other entries they are zeros that stay zero
    target = target if pinned is None else target.masked_fill(pinned, 0.0)
    for _ in range(ROUNDS):
        rounded = sweep(refit(rounded, target, curvature.H), target, curvature.H, pinned)
    return refit(rounded, target, curvature.H)


def round_compiled(
    target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None
) -> RoundedToSteps:
    """Rounds rows on a CPU."""
    rounded = feedback_compiled(target, start, curvature, pinned)
    state = Coding.of(rounded, target if pinned is None else target.masked_fill(pinned, 0.0), curvature.H, pinned)
    for _ in range(ROUNDS):
        state.regain()
        state.sweep()
    state.regain(last=True)
    return state.rounded


def feedback_compiled(
    target: Tensor, start: RoundedToSteps, curvature: Curvature, pinned: Tensor | None
) -> RoundedToSteps:
    """Rounds column after column to the steps of `start`; the columns that follow take the error up."""
    rows, cols = target.shape
    loops, upper = coded_loops(), curvature.upper
    mask = torch.empty(0, 0, dtype=torch.bool) if pinned is None else pinned.contiguous()
    w = target.clone(memory_format=torch.contiguous_format)
    integers = torch.empty_like(w)
    errors = torch.empty(rows * PANEL, dtype=w.dtype)
    given = [tensor.numpy() for tensor in (w, target.contiguous(), mask)]
    given += [powers(exponent).numpy() for exponent in (start.row_exponent, start.col_exponent)]
    for panel in panels(cols):
        error = errors[: rows * (panel.stop - panel.start)].view(rows, -1)
        inputs = *given, upper[panel, panel].T.contiguous().numpy(), panel.start
        outcome = integers.numpy(), error.numpy()
        over_rows(rows, lambda *span, inputs=inputs, out=outcome: loops.feedback(*inputs, *span, *out))
        w[:, panel.stop :].addmm_(error, upper[panel, panel.stop :], alpha=-1)
    return replace(start, integers=integers)


@dataclass
class Coding:
    """Some rows on their way, on a CPU.

    rounded: as they are now, with integers that change in place; target [rows, cols]; gradient [rows, cols]: the
    residual times H; energy [rows]: t H t^T; pinned bool [rows, cols].
    """

    rounded: RoundedToSteps
    target: Tensor
    H: Tensor
    pinned: Tensor
    gradient: Tensor
    energy: Tensor

    @classmethod
    def of(cls, rounded: RoundedToSteps, target: Tensor, H: Tensor, pinned: Tensor | None) -> Coding:
        """The state of the rows `rounded`, whose target is `target` [rows, cols]."""
        rounded = replace(rounded, integers=rounded.integers.clone())
        mask = torch.zeros(target.shape, dtype=torch.bool) if pinned is None else pinned.contiguous()
        gradient = rounded.dense().sub_(target).neg_() @ H
        return cls(rounded, target.contiguous(), H.contiguous(), mask, gradient, row_error(target, H))

    def regain(self, last: bool = False) -> None:
        """Takes the least-squares gains. After the `last` the gradient is no longer needed."""
        row, col = powers(self.rounded.row_exponent), powers(self.rounded.col_exponent)
        given = [tensor.numpy() for tensor in (self.target, self.rounded.integers, self.gradient, col)]
        sums = torch.empty(2, len(row), dtype=self.target.dtype)
        over_rows(len(row), lambda *span: coded_loops().products(*given, *span, sums.numpy()))
        aim, missing = sums[0], sums[1] * row
        before = self.rounded.row_exponent
        # with w = t - r: w H w = t H t - t H r - w H r
        self.rounded = regained(self.rounded, self.energy - aim - missing, missing)
        moved = (self.rounded.row_exponent != before).nonzero()[:, 0]
        if len(moved) and not last:
            self.gradient[moved] = (self.target[moved] - self.rounded.rows(moved).dense()) @ self.H

    def sweep(self) -> None:
        """One pass over the integers, column by column: each becomes the one with the least error."""
        steps = powers(self.rounded.row_exponent), powers(self.rounded.col_exponent)
        given = [tensor.numpy() for tensor in (self.H, self.pinned, *steps)]
        outcome = self.rounded.integers.numpy(), self.gradient.numpy()
        over_rows(len(self.target), lambda *span: coded_loops().sweep(*given, *span, *outcome))


def coded_loops() -> Any:
    """The compiled loops; numba is imported only if something is rounded."""
    from llmsqueeze.quantizers.loops import coded

    return coded
