"""Descent: GPTQ as the start, then coordinate descent over codes and scales under the full input second moments.

    minimise  (t - w) H (t - w)^T  for every row, w[j] = scale[g(j)] * (code[j] - zero[g(j)])
    refit:    scale = A^-1 b,  A[g, h] = l_g H l_h^T,  b[g] = l_g H t^T,  l_g = (code - zero) inside group g, else 0
    sweep:    for each column j: code[j] = the level nearest to w[j] + ((t - w) H)[j] / H[j, j]

t [cols] one row of the target; H [cols, cols] damped by 0.01; three rounds of one refit and one sweep, then a last
refit. A row keeps a refit only where its error does not rise; a sweep cannot raise it, for each step is the exact
minimiser of one code. Pinned entries (outliers) are held at their exact value throughout.

The target is the weight corrected for the drift of its inputs (`corrected_target`): with X the original inputs of
the linear and Y those that it will see behind the compressed weights before it,

    T = W + 1/2 * W (X - Y)^T Y (Y^T Y + damp)^-1

which is half of the step to the least-squares answer to X W^T = Y T^T. The form of the correction is that of QEP
(arXiv 2504.09629), half-strength as it measured best. Source of the rest: ours, after LNQ's alternation of scales
and codes (arXiv 2505.07004). Memory beside W: the moments, one damped copy, and [rows, groups, groups] in slices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmsqueeze.grids import Rounded, storable
from llmsqueeze.parts import Grid
from llmsqueeze.quantize.gptq import damped, gptq

ROUNDS = 3
PANEL = 128
REFIT_BYTES = 1 << 28


def descent(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    moments: Tensor | None,
    pinned: Tensor | None = None,
    search: bool = True,
) -> Rounded:
    """Rounds the target `weight` [rows, cols] (float32); arguments and result as for `gptq`."""
    assert moments is not None
    rounded = gptq(weight, grid, dtype, moments, pinned, search)
    H = damped(moments, 0.01)
    # pinned entries deliver their target exactly: for the rest they are zeros that stay zero
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    for _ in range(ROUNDS):
        rounded = sweep(refit(rounded, target, H), target, H, pinned)
    return refit(rounded, target, H)


def corrected_target(weight: Tensor, moments: Tensor, drift: Tensor, strength: float = 0.5) -> Tensor:
    """`weight` [rows, cols] corrected for `drift` = (X - Y)^T Y [cols, cols], scaled like `moments` = Y^T Y."""
    damp = 0.01
    while damp < 1e6:
        lower, failed = torch.linalg.cholesky_ex(damped(moments, damp))
        if not failed:
            return weight + strength * torch.cholesky_solve((weight @ drift).T, lower).T
        damp *= 10
    raise FloatingPointError("the input second moments are not finite")


def row_error(residual: Tensor, H: Tensor) -> Tensor:
    """r H r^T for every row r of `residual` [rows, cols] -> [rows]."""
    return (residual @ H).mul_(residual).sum(dim=1)


def refit(rounded: Rounded, target: Tensor, H: Tensor) -> Rounded:
    """Least-squares scales for the codes as they are; a row keeps its old ones where these would not be better."""
    rows, cols = target.shape
    grid, levels = rounded.grid, rounded.levels()
    groups = grid.groups(cols)
    chunk = max(1, REFIT_BYTES // (4 * groups * groups))
    solved = torch.cat(
        [_least_squares(levels[i : i + chunk], target[i : i + chunk], H, grid) for i in range(0, rows, chunk)]
    )
    old = rounded.scale.float()
    usable = solved.isfinite() & (solved != 0)
    new = storable(torch.where(usable, solved, old), rounded.scale.dtype)
    before = row_error(target - levels * grid.expand(old, cols), H)
    after = row_error(target - levels * grid.expand(new, cols), H)
    scale = torch.where((after < before)[:, None], new, old)
    return replace(rounded, scale=scale.to(rounded.scale.dtype))


def _least_squares(levels: Tensor, target: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """The scales [rows, groups] that minimise the rows' errors; zero where a group has no level but 0."""
    rows, cols = levels.shape
    width, groups = grid.width(cols), grid.groups(cols)

    def per_group(values: Tensor) -> Tensor:  # [rows, cols] -> [rows, groups]
        padded = torch.nn.functional.pad(values, (0, groups * width - cols))
        return padded.view(rows, groups, width).sum(dim=2)

    b = per_group((target @ H).mul_(levels))
    A = torch.stack([per_group((levels[:, g] @ H[g]).mul_(levels)) for g in grid.slices(cols)], dim=1)
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(dim=1, keepdim=True) + torch.finfo(A.dtype).tiny
    A = A + torch.diag_embed(torch.where(diagonal > 0, ridge, 1.0))
    solution: Tensor = torch.linalg.solve_ex(A, b[:, :, None])[0]
    return solution[:, :, 0]


def sweep(rounded: Rounded, target: Tensor, H: Tensor, pinned: Tensor | None) -> Rounded:
    """One pass of coordinate descent over the codes, column by column; a panel's gradient is made when it comes up."""
    grid, cols = rounded.grid, target.shape[1]
    scale = grid.expand(rounded.scale.float(), cols)
    zero = grid.expand(rounded.zero.float(), cols)
    codes = rounded.codes.float()
    residual = target - (codes - zero) * scale
    for start in range(0, cols, PANEL):
        panel = slice(start, min(start + PANEL, cols))
        gradient = residual @ H[:, panel]
        within = H[panel, panel]
        for j in range(panel.start, panel.stop):
            i = j - start
            wish = gradient[:, i] / (within[i, i] * scale[:, j])
            code = torch.round(codes[:, j] + wish).clamp_(0, grid.max_code)
            if pinned is not None:
                code = torch.where(pinned[:, j], codes[:, j], code)
            change = (code - codes[:, j]) * scale[:, j]
            gradient[:, i:] -= torch.outer(change, within[i, i:])
            residual[:, j] -= change
            codes[:, j] = code
    return replace(rounded, codes=codes.to(torch.uint8))
