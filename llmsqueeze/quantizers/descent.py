"""Descent: GPTQ as the start, then coordinate descent over codes and scales under the full input second moments.

    minimise  (t - w) H (t - w)^T  for every row, w[j] = scale[g(j)] * (code[j] - zero[g(j)])
    refit:    scale += A^-1 b,  A[g, h] = l_g H l_h^T,  b[g] = l_g H (t - w)^T,  l_g = code - zero in group g, else 0
    pass:     for each column j: code[j] = the level nearest to w[j] + ((t - w) H)[j] / H[j, j]

t [cols] one row of the target; H [cols, cols] the damped second moments of the inputs (curvature.py). There are three
rounds of one refit and one pass of coordinate descent, then a last refit. A row takes a refit only if its error falls.
A pass cannot raise the error, because each new code is the exact minimiser of the error in that code. Pinned entries
(outliers) keep their exact value.

The target is the weight corrected for the drift of its inputs (`corrected_target`). If X are the original inputs of the
linear, and Y its inputs in the model whose earlier weights are compressed, it is

    T = W + 1/2 * E^T Y (Y^T Y + damp)^-1 = W + 1/2 * C U^T U,  E = X W^T - Y W^T,  C = mean of e y^T

which goes half of the way to the least-squares solution of E = Y (T - W)^T, less by the share of C that is chance
(measure/shrinkage.py). Where the output is added to the residual stream, E is what the sum has lost: it also has R - S,
the difference of the streams to which the two outputs are added. So the linears at the end of a branch make good what
all earlier blocks have lost, as far as their inputs tell it. The form of the correction is that of QEP (arXiv
2504.09629), which has no stream in it; its strength was measured (evals/results/choices.md). The rest is ours, after
LNQ, which alternates scales and codes (arXiv 2505.07004).

On a CPU the loops are compiled (loops/refit.py, loops/descent.py), and what a pass changes is carried along: of nine
and a half products with H, GPTQ's half among them, five are left. Other devices take descent_on_device.py, and where
there is Triton a kernel for the columns. Memory beside W: three copies of it (levels, gradient, room for a product),
the curvature, and [rows, groups, groups] in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.parallel.threads import over_rows
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import kernels
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.descent_on_device import coordinate_descent, refit
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.grids import Rounded, grid_loops

ROUNDS = 3
STRENGTH = 0.5  # of the correction of targets
REFIT_BYTES = 1 << 25


def descent(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    curvature: Curvature,
    pinned: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Rounds the target `weight` [rows, cols] (float32); arguments and result as `Rounder` has them."""
    rounded = gptq(weight, grid, dtype, curvature, pinned, search)
    # pinned entries have no error: for the other entries they are zeros that stay zero
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    descend = rounds_compiled if weight.device.type == "cpu" else rounds_on_device
    return descend(rounded, target, curvature.H, pinned)


def rounds_on_device(rounded: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Rounded:
    """The rounds after GPTQ on any device."""
    sweep = coordinate_descent
    if kernels.usable(target):
        from llmsqueeze.quantizers.kernels.sweep import sweep_grid as sweep
    for _ in range(ROUNDS):
        rounded = sweep(refit(rounded, target, H), target, H, pinned)
    return refit(rounded, target, H)


def rounds_compiled(rounded: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Rounded:
    """The rounds after GPTQ on a CPU, some rows at a time."""
    count = max(1, REFIT_BYTES // (4 * rounded.scales.shape[1] ** 2))
    chunks = []
    for start in range(0, len(target), count):
        rows = slice(start, start + count)
        state = Descent.of(rounded.rows(rows), target[rows], H, None if pinned is None else pinned[rows])
        for _ in range(ROUNDS):
            state.refit()
            state.carry()
            state.sweep()
        state.refit()
        chunks.append(state.rounded())
    return Rounded.joined(chunks)


def corrected_target(weight: Tensor, pull: Tensor, curvature: Curvature, strength: float = STRENGTH) -> Tensor:
    """`weight` [rows, cols] corrected for what its output has lost; `pull` [rows, cols]: C above."""
    return torch.add(weight, curvature.inverse_product(pull), alpha=strength)


@dataclass(frozen=True)
class Descent:
    """Some rows on their way, on a CPU; the symbols are those of loops/descent.py.

    start: what GPTQ chose; codes, scale [rows, n] (float32) and zero [rows, groups]: as they are now; change [rows, n]:
    of the scales in the last refit; spare [rows * cols]: room for products.
    """

    start: Rounded
    H: Tensor
    pinned: Tensor
    planes: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    gradient: Tensor
    A: Tensor
    change: Tensor
    spare: Tensor

    @classmethod
    def of(cls, start: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Descent:
        """The state of the rows `start`, whose target is `target` [rows, cols]."""
        H, planes = H.contiguous(), torch.stack(start.planes())
        spare = torch.sub(target, start.dense(), out=torch.empty(target.shape, dtype=target.dtype))
        gradient = spare @ H
        scale = start.scales.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        mask = torch.zeros(target.shape, dtype=torch.bool) if pinned is None else pinned.contiguous()
        A, codes = torch.empty(*scale.shape, scale.shape[1]), start.codes.clone(memory_format=torch.contiguous_format)
        zero, change = start.zero.float().contiguous(), torch.empty_like(scale)
        state = cls(start, H, mask, planes, codes, scale, zero, gradient, A, change, spare.view(-1))
        state._fill()
        return state

    @property
    def _width(self) -> int:
        return self.start.grid.width(len(self.H))

    def _fill(self) -> None:
        """The normal equations of the codes as they are."""
        rows, cols = self.gradient.shape
        for k, plane in enumerate(self.planes):
            for group in self.start.grid.slices(cols):
                products = self.spare[: rows * (cols - group.start)].view(rows, -1)
                torch.mm(plane[:, group], self.H[group, group.start :], out=products)
                inputs = products.numpy(), self.planes.numpy(), group.start, self._width, k
                A = self.A.numpy()
                over_rows(rows, lambda *span, given=inputs, A=A: refit_loops().fill(*given, *span, A))

    def refit(self) -> None:
        """Least-squares scales for fixed codes; the gradient stays behind until `carry`."""
        given = self.gradient.numpy(), self.planes.numpy(), self.A.numpy(), self._width, self.start.grid.dual
        stored = grid_loops().settings(self.start.grid, self.start.scale.dtype, False)[2]
        outcome = self.scale.numpy(), self.change.numpy()
        over_rows(len(self.scale), lambda *span: refit_loops().refit(*given, stored, *span, *outcome))

    def carry(self) -> None:
        """Carries the change of the scales into the gradient."""
        moved = self.spare.view(self.gradient.shape)
        given = self.planes.numpy(), self.change.numpy(), self._width
        over_rows(len(moved), lambda *span: refit_loops().scaled(*given, *span, moved.numpy()))
        self.gradient.addmm_(moved, self.H, alpha=-1)

    def sweep(self) -> None:
        """One pass over the codes, column by column: each becomes the one with the least error."""
        levels = grid_loops().settings(self.start.grid, self.start.scale.dtype, False)[1]
        given = self.H.numpy(), self.pinned.numpy(), self._width, levels, self.scale.numpy(), self.zero.numpy()
        outcome = (tensor.numpy() for tensor in (self.planes, self.codes, self.gradient, self.A))
        loop, arrays = descent_loops().sweep, tuple(outcome)
        over_rows(len(self.codes), lambda *span: loop(*given, *span, *arrays))

    def rounded(self) -> Rounded:
        """The rows as they are."""
        return replace(self.start, codes=self.codes).rescaled(self.scale.to(self.start.scale.dtype))


def descent_loops() -> Any:
    """The compiled pass; numba is imported only if something is rounded."""
    from llmsqueeze.quantizers.loops import descent

    return descent


def refit_loops() -> Any:
    """The compiled refit."""
    from llmsqueeze.quantizers.loops import refit

    return refit
