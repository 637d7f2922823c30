"""The rounds of descent.py in torch, for devices without compiled loops: refit and coordinate descent.

The refit goes over the rows in chunks, with [rows, groups, groups] in memory. The pass goes over the columns in panels:
a panel's gradient is one matrix product, and its changes reach the columns after it through the next one. On an NVIDIA
GPU with Triton the columns of a panel are a kernel (kernels/sweep.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import dual_binary
from llmsqueeze.quantizers.gptq import panels
from llmsqueeze.quantizers.grids import Rounded, level_of, nearest_code, storable

REFIT_BYTES = 1 << 27


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
