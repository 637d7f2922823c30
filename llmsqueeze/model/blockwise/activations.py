"""Activations that must outlive a block: in memory up to a limit, in one file on disk beyond it.

Spilled tensors are written and read with plain file calls, not mapped, so that they do not count as memory. The place
of one that is released, in memory or in the file, is taken by the next of its size: the system then has no new pages
to find. The memory is not the C library's heap, where what is kept would lie between what is not, and leave holes.

A list that a killed run has to find again moves to a file of its own (`move_to`), from which it can be read later.
"""

from __future__ import annotations

import io
import json
import mmap
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import SPILL

DEFAULT_LIMIT = 24 << 20  # bytes


class Spill:
    """The memory, up to a limit in bytes, of all activation lists of a run, and the file for the rest."""

    def __init__(self, limit: int = DEFAULT_LIMIT, parent: Path | None = None) -> None:
        self.limit = limit
        self.nbytes = 0  # in use, in memory
        self.on_disk = 0  # bytes of the file
        self._folder = Path(tempfile.mkdtemp(prefix=SPILL, dir=parent))
        self._file = io.FileIO(self._folder / "activations.bin", "w+")
        self._lock = threading.Lock()
        self._places: dict[int, list[int]] = {}  # size -> free places in the file
        self._buffers: dict[int, list[Tensor]] = {}  # size -> free memory
        self._taken = 0  # bytes of memory, in use and free

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def memory(self, nbytes: int) -> Tensor | None:
        """So many bytes, uint8 [nbytes]; None if the limit is reached."""
        if self.nbytes + nbytes > self.limit or not nbytes:
            return None
        self.nbytes += nbytes
        if free := self._buffers.get(nbytes):
            return free.pop()
        while self._taken + nbytes > self.limit:  # other sizes lie free
            size = next(size for size, free in self._buffers.items() if free)
            self._buffers[size].pop()
            self._taken -= size
        self._taken += nbytes
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)

    def give_back(self, memory: Tensor) -> None:
        """The next of this size may have it."""
        self.nbytes -= memory.nbytes
        self._buffers.setdefault(memory.nbytes, []).append(memory)

    def write(self, data: memoryview) -> int:
        """Writes bytes to a free place, and returns it. Raises OSError if the disk is full."""
        places = self._places.get(data.nbytes)
        if places:
            place = places.pop()
        else:
            place, self.on_disk = self.on_disk, self.on_disk + data.nbytes
        with self._lock:
            self._file.seek(place)
            written = 0
            while written < data.nbytes:
                written += self._file.write(data[written:])
        return place

    def read(self, data: memoryview, place: int) -> None:
        """Fills `data` with the bytes at a place. Several threads may read at once, and one may write."""
        with self._lock:
            _fill(self._file, data, place)

    def free(self, place: int, nbytes: int) -> None:
        """The next bytes of this size may be written there."""
        self._places.setdefault(nbytes, []).append(place)


class Activations:
    """A list of tensors, one for each sample, in memory or on disk. `get` and `each` give them on the named device."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._items: list[_InMemory | _OnDisk | _InFile | None] = []

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
        return item.load(self._spill, device)

    def each(self, device: torch.device) -> Iterator[Tensor]:
        return (self.get(index, device) for index in range(len(self)))

    def release(self, index: int) -> None:
        """Gives the memory of one tensor back; it cannot be read again."""
        item, self._items[index] = self._items[index], None
        if item is not None:
            item.release(self._spill)

    def clear(self) -> None:
        for index in range(len(self)):
            self.release(index)
        self._items.clear()

    def move_to(self, path: Path) -> None:
        """Writes all tensors to a new file, from which they are read from now on. Nobody may remove it before the
        list is cleared."""
        cpu, places, shapes, place = torch.device("cpu"), [], [], 0
        with path.open("wb") as file:
            for index in range(len(self)):
                tensor = self.get(index, cpu).contiguous()
                file.write(_bytes_of(tensor))
                shapes.append([list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
                places.append(place)
                place += tensor.nbytes
            about = json.dumps(shapes).encode()
            file.write(about + len(about).to_bytes(8, "little"))
        self.clear()
        self._items += _stored(path, shapes, places)

    def take(self, other: Activations) -> None:
        """Has the tensors of another list instead of its own; the other one has none afterwards."""
        self.clear()
        self._items, other._items = other._items, []

    @classmethod
    def stored(cls, spill: Spill, path: Path, count: int) -> Activations:
        """The list of so many tensors that `move_to` wrote. Raises CheckpointError for another file."""
        try:
            with path.open("rb") as file:
                file.seek(-8, 2)
                end = file.tell()
                length = int.from_bytes(file.read(8), "little")
                file.seek(end - length)
                shapes = json.loads(file.read(length))
            sizes = [torch.Size(shape).numel() * getattr(torch, dtype).itemsize for shape, dtype in shapes]
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise CheckpointError(f"{path} holds no activations") from error
        least = min((size for shape, _ in shapes for size in shape), default=0)
        if len(sizes) != count or least < 0 or sum(sizes) != end - length:
            raise CheckpointError(f"{path} does not have the activations of this run")
        activations = cls(spill)
        activations._items += _stored(path, shapes, [sum(sizes[:at]) for at in range(len(sizes))])
        return activations

    def _keep(self, tensor: Tensor) -> _InMemory | _OnDisk:
        tensor = tensor.detach()
        memory = self._spill.memory(tensor.nbytes)
        return _OnDisk(tensor.to("cpu"), self._spill) if memory is None else _InMemory(tensor, memory)


class _InMemory:
    def __init__(self, tensor: Tensor, memory: Tensor) -> None:
        self._memory = memory
        self._tensor = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def load(self, _spill: Spill, device: torch.device) -> Tensor:
        return self._tensor.to(device, copy=True)  # the memory may be another's when the caller still has the tensor

    def release(self, spill: Spill) -> None:
        spill.give_back(self._memory)


class _OnDisk:
    def __init__(self, tensor: Tensor, spill: Spill) -> None:
        self._shape, self._dtype, self._nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self._place = spill.write(_bytes_of(tensor.contiguous()))

    def load(self, spill: Spill, device: torch.device) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype)
        spill.read(_bytes_of(tensor), self._place)
        return tensor.to(device)

    def release(self, spill: Spill) -> None:
        spill.free(self._place, self._nbytes)


class _InFile:
    """A tensor in a file that stays as it is."""

    def __init__(self, file: io.FileIO, lock: threading.Lock, place: int, shape: Sequence[int], dtype: str) -> None:
        self._file, self._lock, self._place, self._shape, self._dtype = file, lock, place, shape, getattr(torch, dtype)

    def load(self, _spill: Spill, device: torch.device) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype)
        with self._lock:
            _fill(self._file, _bytes_of(tensor), self._place)
        return tensor.to(device)

    def release(self, _spill: Spill) -> None:
        pass  # the file is closed with the last of its tensors


def _stored(path: Path, shapes: Sequence[Any], places: Sequence[int]) -> list[_InFile]:
    """The tensors in a file, by their shapes and dtypes and their places."""
    file, lock = io.FileIO(path), threading.Lock()
    return [_InFile(file, lock, place, *about) for place, about in zip(places, shapes, strict=True)]


def _fill(file: io.FileIO, data: memoryview, place: int) -> None:
    """Fills `data` with the bytes at a place of a file."""
    file.seek(place)
    done = 0
    while done < data.nbytes:
        count = file.readinto(data[done:])
        if not count:
            raise OSError(f"{file.name} is shorter than what was written to it")
        done += count


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
