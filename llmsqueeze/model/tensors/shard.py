"""One safetensors file, of tensors that are there and of some that are read when they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze.model.checkpoint import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # of dtypes in the header


@dataclass(frozen=True)
class Later:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, rows: Any) -> Later:
        """Some rows, by a slice."""
        first, last, _ = rows.indices(self.shape[0])
        return Later((last - first, *self.shape[1:]), self.dtype, lambda: self.read()[rows])


Stored = Tensor | Later


def present(tensor: Stored) -> Tensor:
    """The tensor on the CPU, in its memory one number after the other."""
    return (tensor.read() if isinstance(tensor, Later) else tensor).detach().to("cpu").contiguous()


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes the file; of the tensors that are read, one is in memory at a time."""
    there = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if len(there) == len(tensors):
        save_file(there, path, metadata={"format": "pt"})
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    about = json.dumps(header).encode()
    about += b" " * (-len(about) % 8)
    with path.open("wb") as file:
        file.write(len(about).to_bytes(8, "little") + about)
        for tensor in tensors.values():
            array: Any = present(tensor).reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(array))
