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

    T = W + 1/2 * W (X - Y)^T Y (Y^T Y + damp)^-1 = W + 1/2 * W D U^T U,  D = mean of (x - y) y^T

which goes half of the way to the least-squares solution of X W^T = Y T^T. The form of the correction is that of QEP
(arXiv 2504.09629); half strength measured best. The rest is ours, after LNQ, which alternates scales and codes (arXiv
2505.07004). Memory beside W: two copies of it, the curvature, and [rows, groups, groups] in chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import dual_binary
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.gptq import gptq, panels
from llmsqueeze.quantizers.grids import Rounded, level_of, nearest_code, storable

ROUNDS = 3
REFIT_BYTES = 1 << 27


def descent(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    curvature: Curvature,
    pinned: Tensor | None = None,
    search: bool = False,
) -> Rounded:
    """Rounds the target `weight` [rows, cols] (float32); arguments and result as `Rounder` has them."""
    H = curvature.H
    rounded = gptq(weight, grid, dtype, curvature, pinned, search)
    # pinned entries have no error: for the other entries they are zeros that stay zero
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    for _ in range(ROUNDS):
        rounded = coordinate_descent(refit(rounded, target, H), target, H, pinned)
    return refit(rounded, target, H)


def corrected_target(weight: Tensor, weight_drift: Tensor, curvature: Curvature, strength: float = 0.5) -> Tensor:
    """`weight` [rows, cols] corrected for the drift of its inputs; `weight_drift` = weight @ D."""
    return torch.addmm(weight, weight_drift @ curvature.upper.T, curvature.upper, alpha=strength)


def refit(rounded: Rounded, target: Tensor, H: Tensor) -> Rounded:
    """Least-squares scales for fixed codes; a row keeps its old scales if the new ones are not better."""
    unknowns = rounded.scales.shape[1]
    chunk = max(1, REFIT_BYTES // (4 * unknowns * unknowns))
    # solved for the change of the scales: float32 would lose small errors if it were solved for the scales
    weighted = (target - rounded.dense()) @ H
    scales = []
    for start in range(0, len(weighted), chunk):
        rows = slice(start, start + chunk)
        A, b = normal_equations(rounded.planes(rows), weighted[rows], H, rounded.grid)
        scales.append(_better_scale(rounded.scales[rows], A, b, rounded.grid))
    return rounded.rescaled(torch.cat(scales))


def _better_scale(old: Tensor, A: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """`old` [rows, planes * groups] plus the solution of A s = b, in the rows whose error falls."""
    before = old.float()
    solved = before + least_squares(A, b)
    after = storable(torch.where(solved.isfinite() & (solved != 0), solved, before), old.dtype)
    if grid.dual:
        ordered = dual_binary.in_order(*after.chunk(2, dim=1))
        after = torch.where(torch.cat([ordered, ordered], dim=1), after, before)
    change = after - before
    gain = ((A @ change[:, :, None])[:, :, 0] - 2 * b).mul_(change).sum(dim=1)
    return torch.where((gain < 0)[:, None], after, before).to(old.dtype)


def normal_equations(planes: Sequence[Tensor], weighted: Tensor, H: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """A [rows, n, n] and b [rows, n] of the refit, n = planes * groups; planes [rows, cols]; weighted: residual @ H."""
    rows, cols = weighted.shape
    width, groups = grid.width(cols), grid.groups(cols)

    def per_group(values: Tensor) -> Tensor:  # [rows, n] -> [rows, groups of n]
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % width))
        return padded.view(rows, -1, width).sum(dim=2)

    count = len(planes)
    A = torch.empty(rows, count, groups, count, groups, device=weighted.device)
    for (k, plane), (i, group) in itertools.product(enumerate(planes), enumerate(grid.slices(cols))):
        product = plane[:, group] @ H[group, group.start :]
        for m, other in enumerate(planes):
            # A is symmetric: it is computed from the diagonal on, and mirrored
            row = per_group(product * other[:, group.start :])
            A[:, k, i, m, i:] = row
            A[:, m, i:, k, i] = row
    return A.view(rows, count * groups, -1), torch.cat([per_group(weighted * plane) for plane in planes], dim=1)


def least_squares(A: Tensor, b: Tensor) -> Tensor:
    """The solution [rows, n] of A s = b with a slight ridge; zero for a group with all weights at level 0."""
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(dim=1, keepdim=True) + torch.finfo(A.dtype).tiny
    solution: Tensor = torch.linalg.solve_ex(A + torch.diag_embed(torch.where(diagonal > 0, ridge, 1.0)), b)[0]
    return solution


def coordinate_descent(rounded: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Rounded:
    """One pass over the codes, column by column: each becomes the one with the least error."""
    grid, cols = rounded.grid, target.shape[1]
    scale, zero = grid.expand(rounded.scale.float(), cols), grid.expand(rounded.zero, cols)
    codes = rounded.codes.float()

    def nearest(best: Tensor, j: int) -> tuple[Tensor, Tensor]:
        code = nearest_code(best, scale[:, j], zero[:, j], grid)
        if pinned is not None:
            code = torch.where(pinned[:, j], codes[:, j], code)
        return code, level_of(code, scale[:, j], zero[:, j], grid)

    descend(codes, rounded.dense(), target, H, nearest)
    return replace(rounded, codes=codes.to(torch.uint8))


def descend(
    codes: Tensor, dense: Tensor, target: Tensor, H: Tensor, nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> None:
    """One pass over `codes` [rows, cols], in place; `dense` is their weight.

    `nearest(best, j)`: the codes of column j whose levels are nearest to `best` [rows], and these levels.
    """
    residual = target - dense
    for panel in panels(codes.shape[1]):
        gradient = residual @ H[:, panel]
        within = H[panel, panel]
        for i, j in enumerate(range(panel.start, panel.stop)):
            code, level = nearest(dense[:, j] + gradient[:, i] / within[i, i], j)
            change = level - dense[:, j]
            gradient[:, i:] -= torch.outer(change, within[i, i:])
            residual[:, j] -= change
            codes[:, j] = code  # no column comes up twice, so `dense` is not updated
