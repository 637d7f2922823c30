"""The streams of a part whose codes are entropy-coded: its words, the lengths of its streams, its tables.

    checksum = CRC-32 (as zip and PNG have it) of the bytes, least significant first, of words, lengths and tables, then
               of what else the part says belongs to its codes (`beside`), tensor by tensor

A stream knows by its last state when it is damaged, but a flipped bit may leave that as it was, and steps are numbers
whatever they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.parts.coding import frequencies, rans
from llmsqueeze.parts.grid import Layout, Spec


@dataclass(frozen=True)
class Streams:
    """words int16 [words] and lengths [streams] (int16, both unsigned; int32 where a stream may be longer than that);
    tables uint8 [bytes] as frequencies.py stores them; checksum int32 [1] (unsigned); `per`: rows in a stream."""

    words: Tensor
    lengths: Tensor
    tables: Tensor
    checksum: Tensor
    per: int

    @classmethod
    def encode(
        cls, symbols: rans.Symbols, tables: frequencies.Bytes, contexts: rans.Contexts, beside: Sequence[Tensor] = ()
    ) -> Streams:
        """symbols [rows, cols], int8 under symmetric tables, else uint8."""
        rows, cols = symbols.shape
        per = rans.rows_per_stream(rows, cols)
        parsed = frequencies.parse(tables, contexts.count, symbols.dtype == np.int8)
        words, lengths = rans.encode(symbols, parsed, contexts, per)
        kind = np.int16 if lengths_dtype(per, cols) == torch.int16 else np.int32
        stored = (
            torch.from_numpy(words.view(np.int16)),
            torch.from_numpy(lengths.astype(np.uint16 if kind == np.int16 else np.int32).view(kind)),
            torch.from_numpy(tables),
        )
        return cls(*stored, checksum_of((*stored, *beside)), per)

    def decode(self, contexts: rans.Contexts, signed: bool, beside: Sequence[Tensor] = ()) -> rans.Symbols:
        """The symbols [rows, cols]. Raises CheckpointError for what is damaged."""
        if self.per < 1:
            raise CheckpointError(f"a coded stream cannot hold {self.per} rows")
        tables = frequencies.parse(self.tables.cpu().numpy(), contexts.count, signed)
        lengths = self.lengths.cpu().numpy()
        unsigned = lengths.view(np.uint16) if lengths.dtype == np.int16 else lengths
        words = self.words.cpu().numpy().view(np.uint16)
        symbols = rans.decode(words, unsigned.astype(np.int64), tables, contexts, self.per, signed)
        found, stored = checksum_of((self.words, self.lengths, self.tables, *beside)), self.checksum.cpu()
        if not torch.equal(found, stored):
            raise CheckpointError(
                f"its bytes are damaged: their checksum is {int(found) % 2**32:08x}, and {int(stored) % 2**32:08x} is "
                "stored"
            )
        return symbols

    @classmethod
    def smaller(cls, symbols: Tensor, nbytes: int) -> Streams | None:
        """uint8 symbols [rows, cols] under one table for all; None unless that takes less than `nbytes`."""
        held = symbols.cpu().numpy()
        contexts = one_context(*symbols.shape)
        made = cls.encode(held, frequencies.choose(rans.counts(held, contexts), symmetric=False), contexts)
        return made if sum(tensor.nbytes for tensor in made.tensors().values()) < nbytes else None

    def symbols(self, rows: int, cols: int, most: int) -> Tensor:
        """uint8 [rows, cols]: what `smaller` coded. Raises CheckpointError for what is damaged, or beyond `most`."""
        found = self.decode(one_context(rows, cols), signed=False)
        if int(found.max()) > most:
            raise CheckpointError(f"a coded stream holds the code {int(found.max())}, and {most} is the last")
        return torch.from_numpy(found)

    def tensors(self) -> dict[str, Tensor]:
        return {"words": self.words, "lengths": self.lengths, "tables": self.tables, "checksum": self.checksum}

    def spec(self) -> Spec:
        return {"words": len(self.words), "tables": len(self.tables), "rows_per_stream": self.per}

    @staticmethod
    def layout(rows: int, cols: int, spec: Spec) -> Layout:
        per = max(spec["rows_per_stream"], 1)
        return {
            "words": ((spec["words"],), torch.int16),
            "lengths": ((-(-rows // per),), lengths_dtype(per, cols)),
            "tables": ((spec["tables"],), torch.uint8),
            "checksum": ((1,), torch.int32),
        }

    @classmethod
    def restore(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Streams:
        return cls(**{name: tensors[name] for name in STORED}, per=spec["rows_per_stream"])


STORED = ("words", "lengths", "tables", "checksum")


def checksum_of(tensors: Sequence[Tensor]) -> Tensor:
    """int32 [1]: the CRC-32 of their bytes."""
    found = 0
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.cpu().numpy())
        found = zlib.crc32(array.astype(array.dtype.newbyteorder("<"), copy=False).data, found)
    return torch.from_numpy(np.array([found], np.uint32).view(np.int32))


def lengths_dtype(per: int, cols: int) -> torch.dtype:
    """No symbol takes more than 12 bits."""
    return torch.int16 if per * cols * rans.PROBABILITY_BITS // 16 + 2 < 1 << 16 else torch.int32


def one_context(rows: int, cols: int) -> rans.Contexts:
    """The same table everywhere."""
    return rans.Contexts(np.zeros(rows, np.int64), np.zeros(cols, np.int64))
