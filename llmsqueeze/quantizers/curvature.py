"""The curvature of a linear's output error: the second moments of its inputs, damped, and their factor.

    error of a row d:  d H d^T,  H = mean of y y^T over the tokens + damp * mean(diag) * I
    feedback factor:   U^T U = H^-1,  U upper triangular

If J reverses rows and columns and J H J = L L^T, the factor is U = J L^-1 J: one Cholesky factorization and one
triangular inverse. To invert H first would take two factorizations and lose digits. All linears that share an input
share one factor. Symbols: y [cols] one input; H, U [cols, cols], float32. Memory: three such matrices during the
factorization, two afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.checkpoint import all_finite
from llmsqueeze.progress.stopwatch import timed

DAMP = 0.01
PANEL = 128  # columns of H or U that are multiplied at once


@dataclass(frozen=True)
class Curvature:
    """H and U [cols, cols] as above; `damping` [cols]: the addition to the diagonal of the moments."""

    H: Tensor
    upper: Tensor
    damping: Tensor

    @property
    def diagonal(self) -> Tensor:
        """[cols]: the cost of a squared error of 1 in each column alone."""
        return self.H.diagonal()

    @classmethod
    def flat(cls, cols: int, like: Tensor) -> Curvature:
        """The identity [cols, cols], for linears with unknown inputs; dtype and device are those of `like`."""
        identity = torch.eye(cols, dtype=like.dtype, device=like.device)
        return cls(identity, identity, torch.zeros(cols, dtype=like.dtype, device=like.device))

    @classmethod
    def of_diagonal(cls, diagonal: Tensor) -> Curvature:
        """A diagonal curvature with this diagonal [cols], scaled to a mean of 1."""
        H = torch.diag(diagonal / diagonal.mean())
        return cls(H, torch.diag(H.diagonal().rsqrt()), torch.zeros_like(diagonal))

    def inverse_product(self, left: Tensor) -> Tensor:
        """`left` [rows, cols] times H^-1 = U^T U. The zeros of U are left out: half of the products."""
        cols, through, product = len(self.upper), torch.empty_like(left), torch.empty_like(left)
        panels = [slice(start, min(start + PANEL, cols)) for start in range(0, cols, PANEL)]
        for panel in panels:
            torch.mm(left[:, panel.start :], self.upper[panel, panel.start :].T, out=through[:, panel])
        for panel in panels:
            torch.mm(through[:, : panel.stop], self.upper[: panel.stop, panel], out=product[:, panel])
        return product

    def output_error(self, residual: Tensor) -> Tensor:
        """[rows]: the mean squared output error of each row of `residual` [rows, cols], without the damping."""
        return (row_error(residual, self.H) - residual.square() @ self.damping).clamp_(min=0)


@timed("factorise")
def factorize(xtx: Tensor, damp: float = DAMP) -> Curvature:
    """Damps the second moments `xtx` [cols, cols] in place and factors them; more damping is added until that succeeds.

    Columns that were never active count as active columns of mean size. Raises UnsupportedError if no damping helps:
    the moments are then not finite in float32.
    """
    diagonal = xtx.diagonal()
    active = diagonal > 0
    mean = diagonal[active].mean() if active.any() else torch.ones((), dtype=xtx.dtype, device=xtx.device)
    before = diagonal.clone()
    diagonal.add_(torch.where(active, damp * mean, mean))
    while damp < 1e6:
        lower, failed = torch.linalg.cholesky_ex(xtx.flip(0, 1))
        if not failed:
            inverse = torch.eye(len(xtx), dtype=xtx.dtype, device=xtx.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            upper = inverse.flip(0, 1)
            if all_finite(upper) and all_finite(xtx) and bool((upper.diagonal() > 0).all()):
                return Curvature(xtx, upper, diagonal - before)
        diagonal.add_(9 * damp * mean)  # ten times the damping before
        damp *= 10
    raise UnsupportedError(
        "the squares of a layer's inputs on the calibration text are not finite in float32: the model overflows on "
        "this text, or its weights are damaged"
    )


def row_error(residual: Tensor, H: Tensor) -> Tensor:
    """r H r^T for every row r of `residual` [rows, cols] -> [rows]. H [cols, cols] is symmetric: half of it will do."""
    cols, total = len(H), residual.new_zeros(len(residual))
    for start in range(0, cols, PANEL):
        stop = min(start + PANEL, cols)
        panel, after = residual[:, start:stop], residual[:, stop:]
        product = torch.addmm(after @ H[stop:, start:stop], panel, H[start:stop, start:stop], beta=2)
        total += product.mul_(panel).sum(dim=1)
    return total
