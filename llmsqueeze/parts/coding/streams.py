"""The streams of a part with entropy-coded codes: their words, lengths and tables.

    checksum = CRC-32 (as in zip and PNG) of the little-endian bytes of words, lengths and tables, then of the other
               tensors of the part that belong to its codes (`side`), tensor after tensor

The last state of a stream shows most damage. It does not show every flipped bit, and no damage to steps: therefore the
checksum.
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
    """words int16 [words], unsigned; lengths [streams], unsigned int16, or int32 if a stream can be longer than that;
    tables uint8 [bytes] as in frequencies.py; checksum int32 [1], unsigned; `per`: rows in a stream."""

    words: Tensor
    lengths: Tensor
    tables: Tensor
    checksum: Tensor
    per: int

    @classmethod
    def encode(
        cls, symbols: rans.Symbols, tables: frequencies.Bytes, contexts: rans.Contexts, side: Sequence[Tensor] = ()
    ) -> Streams:
        """symbols [rows, cols]: int8 under symmetric tables, else uint8. `side`: the other tensors in the checksum."""
        rows, cols = symbols.shape
        per = rans.rows_per_stream(rows, cols)
        parsed = frequencies.parse(tables, contexts.count, symbols.dtype == np.int8)
        words, lengths = rans.encode(symbols, parsed, contexts, per)
        stored = (
            torch.from_numpy(words.view(np.int16)),
            torch.from_numpy(lengths).to(lengths_dtype(per, cols)),
            torch.from_numpy(tables),
        )
        return cls(*stored, checksum_of((*stored, *side)), per)

    def decode(self, contexts: rans.Contexts, signed: bool, side: Sequence[Tensor] = ()) -> rans.Symbols:
        """The symbols [rows, cols]. Raises CheckpointError for damaged streams."""
        if self.per < 1:
            raise CheckpointError(f"a coded stream cannot hold {self.per} rows")
        tables = frequencies.parse(self.tables.cpu().numpy(), contexts.count, signed)
        lengths = self.lengths.cpu().numpy()
        unsigned = lengths.view(np.uint16) if lengths.dtype == np.int16 else lengths
        words = self.words.cpu().numpy().view(np.uint16)
        symbols = rans.decode(words, unsigned.astype(np.int64), tables, contexts, self.per, signed)
        actual, stored = checksum_of((self.words, self.lengths, self.tables, *side)), self.checksum.cpu()
        if not torch.equal(actual, stored):
            raise CheckpointError(
                f"its bytes are damaged: their checksum is {int(actual) % 2**32:08x}, but {int(stored) % 2**32:08x} is "
                "stored"
            )
        return symbols

    @classmethod
    def smaller(cls, symbols: Tensor, nbytes: int) -> Streams | None:
        """The streams of uint8 symbols [rows, cols] under one table; None if they do not take less than `nbytes`."""
        array, contexts = symbols.cpu().numpy(), one_context(*symbols.shape)
        tables = frequencies.choose(rans.counts(array, contexts), symmetric=False)
        streams = cls.encode(array, tables, contexts)
        return streams if sum(tensor.nbytes for tensor in streams.tensors().values()) < nbytes else None

    def symbols(self, rows: int, cols: int, most: int) -> Tensor:
        """uint8 [rows, cols]: the symbols of `smaller`. Raises CheckpointError for damaged streams, or a symbol beyond
        `most`."""
        symbols = self.decode(one_context(rows, cols), signed=False)
        if int(symbols.max()) > most:
            raise CheckpointError(f"a coded stream has the code {int(symbols.max())}; the largest allowed is {most}")
        return torch.from_numpy(symbols)

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
    """int32 [1]: the CRC-32 of the bytes of all tensors."""
    checksum = 0
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.cpu().numpy())
        checksum = zlib.crc32(array.astype(array.dtype.newbyteorder("<"), copy=False).data, checksum)
    return torch.from_numpy(np.array([checksum], np.uint32).view(np.int32))


def lengths_dtype(per: int, cols: int) -> torch.dtype:
    """The dtype of stream lengths: a symbol takes at most 12 bits."""
    return torch.int16 if per * cols * rans.PROBABILITY_BITS // 16 + 2 < 1 << 16 else torch.int32


def one_context(rows: int, cols: int) -> rans.Contexts:
    """One table for every place."""
    return rans.Contexts(np.zeros(rows, np.int64), np.zeros(cols, np.int64))
