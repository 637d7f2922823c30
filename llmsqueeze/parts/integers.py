"""Coded weights as they are kept in memory on request: integers of one byte, and their steps."""

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
    """`codes * step`, codes int8 [rows, cols]; base, row_step, col_step, escape_index and escape_value as `Coded` has
    them, whose decoded form it is."""

    kind: ClassVar[str] = "integers"
    codes: Tensor
    base: Tensor
    row_step: Tensor
    col_step: Tensor
    escape_index: Tensor
    escape_value: Tensor
    dtype: torch.dtype

    def values(self) -> Tensor:
        """float32 [rows, cols]: the whole numbers. Raises CheckpointError for an escape outside the matrix."""
        values = self.codes.float()
        values.view(-1)[self._escapes()] = self.escape_value.float()
        return values

    def _escapes(self) -> Tensor:
        """int64 [escapes]: their places."""
        found, numel = self.escape_index, self.codes.numel()
        if len(found) and (int(found.min()) < 0 or int(found.max()) >= numel):
            raise CheckpointError("an integer beyond the coded ones has a place outside the matrix")
        return found

    def exponents(self) -> tuple[Tensor, Tensor]:
        """int64 [rows] and [cols], of the steps 2^((row + column) / 16)."""
        return self.row_step.long() + self.base.long(), self.col_step.long()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols], rounded from float32 to `dtype`; some rows at a time, as many as caches hold."""
        rows, cols = (powers(exponent) for exponent in self.exponents())
        made = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        some = max(1, CACHED // max(len(cols), 1))
        for codes, step, out in zip(self.codes.split(some), rows.split(some), made.split(some), strict=True):
            out.copy_(codes.float().mul_(cols).mul_(step[:, None]))
        at = self._escapes()
        row, col = at.div(len(cols), rounding_mode="floor"), at % len(cols)
        made[row, col] = (self.escape_value.float() * cols[col] * rows[row]).to(dtype)
        return made

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes} | {name: getattr(self, name) for name in STEPS}

    def spec(self) -> Spec:
        return {"part": Integers.kind, "escapes": len(self.escape_index), "dtype": dtype_name(self.dtype)}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        return {"codes": (shape, torch.int8)} | steps_layout(shape, spec["escapes"])

    @classmethod
    def restore(cls, _shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Integers:
        own = {name: tensors[name] for name in STEPS}
        return cls(tensors["codes"], **own, dtype=getattr(torch, spec["dtype"]))


CACHED = 1 << 18
STEPS = ("base", "row_step", "col_step", "escape_index", "escape_value")


def steps_layout(shape: tuple[int, int], escapes: int) -> Layout:
    """The tensors that both forms have."""
    rows, cols = shape
    return {
        "base": ((1,), torch.int16),
        "row_step": ((rows,), torch.uint8),
        "col_step": ((cols,), torch.uint8),
        "escape_index": ((escapes,), torch.int64),
        "escape_value": ((escapes,), torch.int32),
    }
