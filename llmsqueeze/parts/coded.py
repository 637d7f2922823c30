"""Entropy-coded integers with a step per row and column: the weight is `integer * row step * column step`.

    step of row r and column j = 2^((base + row_step[r] + col_step[j]) / 16)

The integers are stored as rANS streams (rans.py) under symmetric tables (frequencies.py). If all weights of the matrix
have about one size, integers are large where steps are small. The steps therefore select the table of each integer:

    table number = (max of row_step - row_step[r] + max of col_step - col_step[j]) >> 3

There is one table for each half octave of step. An integer beyond 127 is coded as 127 with its sign (an escape), and a
list has its index and value. Source: ours (quantizers/coded.py has the method).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from llmsqueeze.errors import VerificationError
from llmsqueeze.parts.coding import frequencies, rans
from llmsqueeze.parts.coding.streams import Streams
from llmsqueeze.parts.grid import Layout, Spec, dtype_name
from llmsqueeze.parts.integers import SIDE_TENSORS, Integers, side_layout
from llmsqueeze.progress.stopwatch import timed

CONTEXT_SHIFT = 3
LIMIT = 127
ESCAPE_BYTES = 12  # index and value of an integer beyond the limit


@dataclass(frozen=True)
class Coded:
    """Integers [rows, cols] as streams; base int16 [1]; row_step uint8 [rows] and col_step uint8 [cols], in sixteenths
    of an octave; escape_index int64 [escapes], ascending: row * cols + column of each integer beyond 127; escape_value
    int32 [escapes]: those integers. `dtype`: of the weight.
    """

    kind: ClassVar[str] = "coded"
    streams: Streams
    base: Tensor
    row_step: Tensor
    col_step: Tensor
    escape_index: Tensor
    escape_value: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    @timed("pack")
    def from_integers(cls, integers: Tensor, row_exponent: Tensor, col_exponent: Tensor, dtype: torch.dtype) -> Coded:
        """integers [rows, cols] of any integer or float dtype; row_exponent int64 [rows] and col_exponent int64 [cols],
        each with a span of at most 255, for the steps 2^((row_exponent + col_exponent) / 16). Raises VerificationError
        for an integer that does not fit in 32 bits.
        """
        base = int(row_exponent.min() + col_exponent.min())
        row_step = (row_exponent - row_exponent.min()).to(torch.uint8).cpu()
        col_step = (col_exponent - col_exponent.min()).to(torch.uint8).cpu()
        clipped, index = integers, torch.empty(0, dtype=torch.int64, device=integers.device)
        least, largest = float(integers.min()), float(integers.max())
        if not -(2.0**31) <= least <= largest < 2.0**31:
            raise VerificationError(f"integers from {least:.3g} to {largest:.3g} do not fit in 32 bits")
        if max(-least, largest) > LIMIT:
            clipped = integers.clamp(-LIMIT, LIMIT)
            index = (integers != clipped).flatten().nonzero()[:, 0]
        symbols = clipped.to(torch.int8).cpu().numpy()
        contexts = contexts_of(row_step, col_step)
        tables = frequencies.choose(rans.counts(np.abs(symbols).view(np.uint8), contexts), symmetric=True)
        side = {
            "base": torch.tensor([base], dtype=torch.int16),
            "row_step": row_step,
            "col_step": col_step,
            "escape_index": index.cpu(),
            "escape_value": integers.flatten()[index].to(torch.int32).cpu(),
        }
        streams = Streams.encode(symbols, tables, contexts, tuple(side.values()))
        return cls(streams, **side, shape=(len(row_step), len(col_step)), dtype=dtype)

    @timed("pack")
    def decoded(self, device: torch.device | None = None) -> Integers:
        """The integers and their steps, on `device` or on the device of the part. Raises CheckpointError for damaged
        streams."""
        side: dict[str, Tensor] = {name: getattr(self, name) for name in SIDE_TENSORS}
        symbols = self.streams.decode(contexts_of(self.row_step, self.col_step), True, tuple(side.values()))
        device = device or self.row_step.device
        moved = {name: tensor.to(device) for name, tensor in side.items()}
        return Integers(torch.from_numpy(symbols).to(device), **moved, dtype=self.dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.decoded().dense(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return self.streams.tensors() | {name: getattr(self, name) for name in SIDE_TENSORS}

    def spec(self) -> Spec:
        escapes = {"escapes": len(self.escape_index)}
        return {"part": Coded.kind, **self.streams.spec(), **escapes, "dtype": dtype_name(self.dtype)}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        return Streams.layout(*shape, spec) | side_layout(shape, spec["escapes"])

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Coded:
        side = {name: tensors[name] for name in SIDE_TENSORS}
        return cls(Streams.restore(spec, tensors), **side, shape=shape, dtype=getattr(torch, spec["dtype"]))


def contexts_of(row_step: Tensor, col_step: Tensor) -> rans.Contexts:
    """The table of each place, from the steps alone."""
    rows, cols = (step.cpu().numpy().astype(np.int64) for step in (row_step, col_step))
    return rans.Contexts(rows.max() - rows, cols.max() - cols, CONTEXT_SHIFT)


def code_length(integers: Tensor, row_exponent: Tensor, col_exponent: Tensor) -> tuple[float, int]:
    """Bits that integers [rows, cols] take under the tables that would be chosen for them, with the list of escapes;
    and bytes of the tables. What streams and steps take is not counted."""
    contexts = contexts_of(row_exponent - row_exponent.min(), col_exponent - col_exponent.min())
    symbols = integers.abs().clamp(max=LIMIT).to(torch.uint8).cpu().numpy()
    counts = rans.counts(symbols, contexts)
    tables = frequencies.choose(counts, symmetric=True)
    escapes = int((integers.abs() > LIMIT).sum())
    return frequencies.coded_bits(counts, tables, symmetric=True) + 8 * ESCAPE_BYTES * escapes, len(tables)
