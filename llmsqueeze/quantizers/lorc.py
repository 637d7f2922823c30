"""LoRC, low-rank compensation: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to
Low Rank Compensation" (arXiv 2303.08302): a part of rank m approximates the rounding error.

    plain            A B the truncated SVD of E                                 least ||E - A B||, as in the paper
    input-weighted   A B L the truncated SVD of E L,  L L^T = H                 least (E - A B) H (E - A B)^T

E [rows, cols] = target - rounded; A [rows, m] and B [m, cols] each have the roots of the singular values; H [cols,
cols] the damped second moments of the inputs (curvature.py), whose factor U (U^T U = H^-1) gives L = U^-1.

What differs from the paper: both factors are 8-bit with one scale per component, and not one per row, which takes fewer
bytes at the same measured error. A weight whose output error does not fall gets no factors. If both sides are longer
than `EXACT`, the SVD is randomized (Halko, Martinsson, Tropp, arXiv 0909.4061) with four power iterations. Memory: two
copies of E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsqueeze.parts import LowRank
from llmsqueeze.quantizers.curvature import Curvature

EXACT = 1024
OVERSAMPLING, POWER_ITERATIONS = 8, 4


def factors(error: Tensor, rank: int, curvature: Curvature | None, dtype: torch.dtype, seed: int = 0) -> LowRank:
    """The factors of `error` [rows, cols] (float32), weighted by the inputs if their curvature is given.

    `dtype`: of the scales in the file.
    """
    weighted = error
    if curvature is not None:
        weighted = torch.linalg.solve_triangular(curvature.upper, error, upper=True, left=False)
    left, right = truncated_svd(weighted, rank, seed)
    if curvature is not None:
        right = right @ curvature.upper
        # the roots of the singular values no longer balance the factors: 8 bits need columns and rows of one size
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
        left, right = left * balance, right / balance[:, None]
    return LowRank.from_factors(left, right, dtype)


def truncated_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """left [rows, rank] and right [rank, cols]: their product is the best approximation of that rank, nearly so above
    `EXACT`. Each has the roots of the singular values."""
    small = min(matrix.shape)
    if small <= EXACT or rank + OVERSAMPLING >= small:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        probe = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ probe)[0]
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis)[0]
            basis = torch.linalg.qr(matrix @ basis)[0]
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, vt[:rank] * root[:, None]
