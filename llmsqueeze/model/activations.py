"""Activations that must outlive a block: in memory up to a limit, in one file on disk beyond it.

Spilled tensors are written and read with plain file calls, not mapped, so that they do not count as memory. The place
of one that is released is taken by the next of its size: the system then has no new pages to find.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DEFAULT_LIMIT = 128 << 20  # bytes


class Spill:
    """The memory limit, in bytes, of all activation lists of a run, and the file for the rest."""

    def __init__(self, limit: int = DEFAULT_LIMIT, parent: Path | None = None) -> None:
        self.limit = limit
        self.nbytes = 0  # in memory
        self.on_disk = 0  # bytes of the file
        self._folder = Path(tempfile.mkdtemp(prefix="llmsqueeze-", dir=parent))
        self._file = (self._folder / "activations.bin").open("w+b", buffering=0)
        self._free: dict[int, list[int]] = {}  # size -> places in the file

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, data: memoryview) -> int:
        """Writes bytes to a free place, and returns it. Raises OSError if the disk is full."""
        places = self._free.get(data.nbytes)
        if places:
            place = places.pop()
        else:
            place, self.on_disk = self.on_disk, self.on_disk + data.nbytes
        self._file.seek(place)
        written = 0
        while written < data.nbytes:
            written += self._file.write(data[written:])
        return place

    def read(self, data: memoryview, place: int) -> None:
        """Fills `data` with the bytes at a place."""
        self._file.seek(place)
        done = 0
        while done < data.nbytes:
            count = self._file.readinto(data[done:])
            if not count:
                raise OSError("the file of spilled activations is shorter than what was written to it")
            done += count

    def free(self, place: int, nbytes: int) -> None:
        """The next bytes of this size may be written there."""
        self._free.setdefault(nbytes, []).append(place)


class Activations:
    """A list of tensors, one for each sample, in memory or on disk. `get` and `each` give them on the named device."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._items: list[Tensor | _OnDisk | None] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(self, tensor: Tensor) -> None:
        self._items.append(self._keep(tensor))

    def replace(self, index: int, tensor: Tensor) -> None:
        self.release(index)
        self._items[index] = self._keep(tensor)

    def get(self, index: int, device: torch.device) -> Tensor:
        item = self._items[index]
        assert item is not None, "a released activation is not used again"
        return (item.load(self._spill) if isinstance(item, _OnDisk) else item).to(device)

    def each(self, device: torch.device) -> Iterator[Tensor]:
        return (self.get(index, device) for index in range(len(self)))

    def release(self, index: int) -> None:
        """Gives the memory of one tensor back; it cannot be read again."""
        item, self._items[index] = self._items[index], None
        if isinstance(item, _OnDisk):
            self._spill.free(item.place, item.nbytes)
        elif item is not None:
            self._spill.nbytes -= item.nbytes

    def clear(self) -> None:
        for index in range(len(self)):
            self.release(index)
        self._items.clear()

    def _keep(self, tensor: Tensor) -> Tensor | _OnDisk:
        tensor = tensor.detach().to("cpu")
        if self._spill.nbytes + tensor.nbytes > self._spill.limit:
            return _OnDisk(tensor, self._spill)
        self._spill.nbytes += tensor.nbytes
        # a view would keep its whole base in memory, uncounted
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class _OnDisk:
    def __init__(self, tensor: Tensor, spill: Spill) -> None:
        self.shape, self.dtype, self.nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self.place = spill.write(_bytes_of(tensor.contiguous()))

    def load(self, spill: Spill) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        spill.read(_bytes_of(tensor), self.place)
        return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
