"""Outliers: single weights at full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsqueeze.parts.grid import Layout, Spec, dtype_name


@dataclass(frozen=True)
class Sparse:
    """Single weights at full precision, row after row: index [count], the column of each; row_count [rows], how many
    each row has; value [count].

    `index` and `row_count` are unsigned 16-bit numbers in int16 tensors (int32 for 65 536 or more columns): an outlier
    with a 16-bit value takes 32 bits.
    """

    kind: ClassVar[str] = "sparse"
    index: Tensor
    row_count: Tensor
    value: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: Tensor, weight: Tensor) -> Sparse:
        """The entries of `weight` [rows, cols] that the bool `mask` [rows, cols] selects, in the weight's dtype."""
        rows, cols = weight.shape
        dtype = _index_dtype(cols)
        index, row_count = mask.nonzero()[:, 1], mask.sum(dim=1)
        return cls(index.to(dtype), row_count.to(dtype), weight[mask], (rows, cols))

    def dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=torch.float32, device=self.value.device)
        self.put(dense)
        return dense

    @property
    def columns(self) -> Tensor:
        """int64 [count]: the column of each entry, row after row."""
        return _unwrap(self.index)

    @property
    def counts(self) -> Tensor:
        """int64 [rows]: the number of entries in each row."""
        return _unwrap(self.row_count)

    def put(self, dense: Tensor) -> None:
        """Sets the entries in `dense` [rows, cols]."""
        row = torch.arange(self.shape[0], device=dense.device).repeat_interleave(self.counts)
        dense[row, self.columns] = self.value.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "row_count": self.row_count, "value": self.value}

    def spec(self) -> Spec:
        return sparse_spec(len(self.value), self.value.dtype)

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), count = shape, spec["count"]
        dtype = _index_dtype(cols)
        value = getattr(torch, spec["dtype"])
        return {"index": ((count,), dtype), "row_count": ((rows,), dtype), "value": ((count,), value)}

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Sparse:
        return cls(tensors["index"], tensors["row_count"], tensors["value"], shape)


def sparse_spec(count: int, dtype: torch.dtype) -> Spec:
    """The spec of a `Sparse` part; `dtype`: of its values."""
    return {"part": Sparse.kind, "count": count, "dtype": dtype_name(dtype)}


def _index_dtype(cols: int) -> torch.dtype:
    return torch.int16 if cols < 1 << 16 else torch.int32


def _unwrap(stored: Tensor) -> Tensor:
    values = stored.to(torch.int64)
    return values & 0xFFFF if stored.dtype == torch.int16 else values
