"""Decoded form of coded weights, for use in memory: integers of one byte, and their steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.parts.coding.logsteps import powers
from llmsqueeze.parts.grid import Layout, Spec, dtype_name


@dataclass(frozen=True)
class Integers:
    """The decoded form of `Coded`: codes int8 [rows, cols]; base, row_step, col_step, escape_index and escape_value as
    in `Coded`. The weight is `codes * step`, except for the escapes."""

    kind: ClassVar[str] = "integers"
    codes: Tensor
    base: Tensor
    row_step: Tensor
    col_step: Tensor
    escape_index: Tensor
    escape_value: Tensor
    dtype: torch.dtype

    def values(self) -> Tensor:
        """float32 [rows, cols]: the integers. Raises CheckpointError for an escape outside the matrix."""
        values = self.codes.float()
        values.view(-1)[self._escapes()] = self.escape_value.float()
        return values

    def _escapes(self) -> Tensor:
        """escape_index, checked."""
        index, numel = self.escape_index, self.codes.numel()
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= numel):
            raise CheckpointError(
                f"escaped integers have indices from {int(index.min())} to {int(index.max())}; 0 to {numel - 1} are "
                "allowed"
            )
        return index

    def exponents(self) -> tuple[Tensor, Tensor]:
        """row int64 [rows] and column int64 [cols], of the steps 2^((row + column) / 16)."""
        return self.row_step.long() + self.base.long(), self.col_step.long()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols], computed in float32 and rounded to `dtype`, in chunks of rows that fit in the caches."""
        rows, cols = (powers(exponent) for exponent in self.exponents())
        dense = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        chunk = max(1, CACHED // max(len(cols), 1))
        for codes, step, out in zip(self.codes.split(chunk), rows.split(chunk), dense.split(chunk), strict=True):
            out.copy_(codes.float().mul_(cols).mul_(step[:, None]))
        index = self._escapes()
        row, col = index.div(len(cols), rounding_mode="floor"), index % len(cols)
        dense[row, col] = (self.escape_value.float() * cols[col] * rows[row]).to(dtype)
        return dense

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes} | {name: getattr(self, name) for name in SIDE_TENSORS}

    def spec(self) -> Spec:
        return {"part": Integers.kind, "escapes": len(self.escape_index), "dtype": dtype_name(self.dtype)}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        return {"codes": (shape, torch.int8)} | side_layout(shape, spec["escapes"])

    @classmethod
    def restore(cls, _shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Integers:
        side = {name: tensors[name] for name in SIDE_TENSORS}
        return cls(tensors["codes"], **side, dtype=getattr(torch, spec["dtype"]))


CACHED = 1 << 18  # weights
SIDE_TENSORS = ("base", "row_step", "col_step", "escape_index", "escape_value")


def side_layout(shape: tuple[int, int], escapes: int) -> Layout:
    """The tensors that `Coded` and `Integers` both have."""
    rows, cols = shape
    return {
        "base": ((1,), torch.int16),
        "row_step": ((rows,), torch.uint8),
        "col_step": ((cols,), torch.uint8),
        "escape_index": ((escapes,), torch.int64),
        "escape_value": ((escapes,), torch.int32),
    }
