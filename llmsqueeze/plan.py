"""What was decided: for every linear its quantizer, grid and number of outliers, with the bytes that costs exactly.

Decisions are counts; which weights the outliers are is in the profile. `specs` is the same description that the file
carries, so planned bytes and written bytes cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmsqueeze import parts
from llmsqueeze.parts import Grid, Spec


@dataclass(frozen=True)
class WeightPlan:
    """One linear: shape [rows, cols], the dtype its scales and outliers are stored in, and what it becomes."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    quantizer: str
    grid: Grid
    outliers: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def specs(self) -> list[Spec]:
        affine = parts.affine_spec(self.grid, self.dtype)
        return [affine, parts.sparse_spec(self.outliers, self.dtype)] if self.outliers else [affine]

    @property
    def nbytes(self) -> int:
        return parts.layout_nbytes(self.shape, self.specs)


@dataclass(frozen=True)
class Plan:
    """The linears to compress, by block. Everything else stays as it is."""

    weights: dict[str, WeightPlan]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized linears, in bits, per weight of theirs."""
        return self.nbytes * 8 / self.numel
