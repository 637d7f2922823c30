"""Entropy-coded integers, with a step per row and column: the weight is `integer * row step * column step`.

    step of row r and column j = 2^((base + row_step[r] + col_step[j]) / 16)

The integers lie in rANS streams (rans.py) under symmetric tables (frequencies.py). Weights of about one size all over
the matrix have large integers where steps are small, so that the steps say which table a place has:

    number = (max of row_step - row_step[r] + max of col_step - col_step[j]) >> 3

half an octave of step each. Integers beyond 127 are coded as 127, and what they are stands in a list beside. Source:
ours (quantize/coded.py has the method).
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
from llmsqueeze.parts.integers import STEPS, Integers, steps_layout

CONTEXT_SHIFT = 3
LIMIT = 127
ESCAPE_BYTES = 12  # place and value of an integer beyond it


@dataclass(frozen=True)
class Coded:
    """Integers [rows, cols] in streams; base int16 [1]; row_step uint8 [rows]; col_step uint8 [cols], in sixteenths
    of an octave; escape_index int64 [escapes], ascending, the places (row * cols + column) of the integers beyond
    127, and escape_value int32 [escapes] what they are. `dtype`: of the weight it stands for.
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
    def from_integers(cls, integers: Tensor, row_exponent: Tensor, col_exponent: Tensor, dtype: torch.dtype) -> Coded:
        """integers [rows, cols], of any integer or float dtype; steps 2^((row_exponent + col_exponent) / 16) of whole
        exponents [rows] and [cols], each of which spans no more than 255. Raises VerificationError for an integer that
        takes more than 32 bits.
        """
        base = int(row_exponent.min() + col_exponent.min())
        row_step = (row_exponent - row_exponent.min()).to(torch.uint8).cpu()
        col_step = (col_exponent - col_exponent.min()).to(torch.uint8).cpu()
        clipped, index = integers, torch.empty(0, dtype=torch.int64, device=integers.device)
        least, largest = float(integers.min()), float(integers.max())
        if not -(2.0**31) <= least <= largest < 2.0**31:
            raise VerificationError(f"integers from {least:.3g} to {largest:.3g} are more than 32 bits hold")
        if max(-least, largest) > LIMIT:
            clipped = integers.clamp(-LIMIT, LIMIT)
            index = (integers != clipped).flatten().nonzero()[:, 0]
        symbols = clipped.to(torch.int8).cpu().numpy()
        contexts = contexts_of(row_step, col_step)
        tables = frequencies.choose(rans.counts(np.abs(symbols).view(np.uint8), contexts), symmetric=True)
        own = {
            "base": torch.tensor([base], dtype=torch.int16),
            "row_step": row_step,
            "col_step": col_step,
            "escape_index": index.cpu(),
            "escape_value": integers.flatten()[index].to(torch.int32).cpu(),
        }
        streams = Streams.encode(symbols, tables, contexts, tuple(own.values()))
        return cls(streams, **own, shape=(len(row_step), len(col_step)), dtype=dtype)

    def decoded(self, device: torch.device | None = None) -> Integers:
        """The integers and their steps, on `device` or where they are. Raises CheckpointError for what is damaged."""
        own: dict[str, Tensor] = {name: getattr(self, name) for name in STEPS}
        symbols = self.streams.decode(contexts_of(self.row_step, self.col_step), True, tuple(own.values()))
        place = device or self.row_step.device
        there = {name: tensor.to(place) for name, tensor in own.items()}
        return Integers(torch.from_numpy(symbols).to(place), **there, dtype=self.dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.decoded().dense(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return self.streams.tensors() | {name: getattr(self, name) for name in STEPS}

    def spec(self) -> Spec:
        escapes = {"escapes": len(self.escape_index)}
        return {"part": Coded.kind, **self.streams.spec(), **escapes, "dtype": dtype_name(self.dtype)}

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        return Streams.layout(*shape, spec) | steps_layout(shape, spec["escapes"])

    @classmethod
    def restore(cls, shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> Coded:
        own = {name: tensors[name] for name in STEPS}
        return cls(Streams.restore(spec, tensors), **own, shape=shape, dtype=getattr(torch, spec["dtype"]))


def contexts_of(row_step: Tensor, col_step: Tensor) -> rans.Contexts:
    """Which table each place has, from the steps alone."""
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
