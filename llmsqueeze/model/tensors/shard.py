"""One safetensors file, of tensors that are there and of some that are read when they are written.

Its metadata has a checksum of every tensor, by which a byte that changed later is found.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsqueeze.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # of dtypes in the header
CHECKSUMS = "crc32"  # in the metadata: of each tensor, in the order of their names
PYTORCH = MappingProxyType({"format": "pt"})  # what transformers wants in the metadata
UNKNOWN = "0" * 8  # of a checksum, until its tensor is written


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


def write(path: Path, tensors: Mapping[str, Stored], about: Mapping[str, str] = PYTORCH) -> None:
    """Writes the file, with checksums beside `about` in its metadata; one that is read is in memory at a time."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each is aligned
    sums = dict.fromkeys(sorted(tensors), UNKNOWN)
    with path.open("wb") as file:
        file.write(_header(tensors, ordered, {**about, CHECKSUMS: " ".join(sums.values())}))
        for name in ordered:
            tensor = present(tensors[name])
            sums[name] = checksum(name, tensor)
            file.write(_bytes(tensor))
        file.seek(0)
        file.write(_header(tensors, ordered, {**about, CHECKSUMS: " ".join(sums.values())}))


def _header(tensors: Mapping[str, Stored], ordered: list[str], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name in ordered:
        tensor = tensors[name]
        end = place + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    about = json.dumps(header).encode()
    about += b" " * (-len(about) % 8)
    return len(about).to_bytes(8, "little") + about


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def checksum(name: str, tensor: Tensor) -> str:
    """CRC-32 of what the header says of a tensor on the CPU and of its bytes, in 8 hexadecimal digits."""
    about = f"{name} {NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
    return f"{zlib.crc32(_bytes(tensor), zlib.crc32(about)):08x}"


def checksums(file: Path, handle: Any) -> dict[str, str]:
    """Tensor of an open file -> its checksum; empty if the file was written without. Raises CheckpointError."""
    stored = (handle.metadata() or {}).get(CHECKSUMS)
    if stored is None:
        return {}
    names, sums = sorted(handle.keys()), stored.split(" ") if stored else []
    if len(names) != len(sums):
        raise CheckpointError(f"{file} has {len(sums)} checksums for {len(names)} tensors: it is damaged")
    return dict(zip(names, sums, strict=True))


def compare(file: Path, name: str, tensor: Tensor, sums: Mapping[str, str]) -> None:
    """Raises CheckpointError if a tensor that was read is not the one that was written; `sums` may lack it."""
    if name in sums and checksum(name, tensor) != sums[name]:
        raise CheckpointError(
            f"{name} in {file} is not what was written (its checksum differs): the file, disk or memory are faulty"
        )


def read(file: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises CheckpointError if one is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            sums = checksums(file, handle)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); download or copy it again") from error
    for name, tensor in tensors.items():
        compare(file, name, tensor, sums)
    return tensors
