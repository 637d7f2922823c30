"""Activations that must outlive a block: in memory up to a limit, on disk beyond it.

Spilled tensors are written and read with plain file calls, not mapped, so that they do not count as memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

DEFAULT_LIMIT = 128 << 20  # bytes


class Spill:
    """The memory limit, in bytes, of all activation lists of a run, and the folder for the rest."""

    def __init__(self, limit: int = DEFAULT_LIMIT, parent: Path | None = None) -> None:
        self.limit = limit
        self.nbytes = 0  # in memory
        self._folder = Path(tempfile.mkdtemp(prefix="llmsqueeze-", dir=parent))
        self._count = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def new_file(self) -> Path:
        self._count += 1
        return self._folder / f"{self._count}.bin"


class Activations:
    """A list of tensors, one for each sample, in memory or on disk. `get` and `each` give them on the named device."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._items: list[Tensor | _OnDisk] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(self, tensor: Tensor) -> None:
        self._items.append(self._keep(tensor))

    def replace(self, index: int, tensor: Tensor) -> None:
        self._release(self._items[index])
        self._items[index] = self._keep(tensor)

    def get(self, index: int, device: torch.device) -> Tensor:
        item = self._items[index]
        return (item.load() if isinstance(item, _OnDisk) else item).to(device)

    def each(self, device: torch.device) -> Iterator[Tensor]:
        return (self.get(index, device) for index in range(len(self)))

    def clear(self) -> None:
        for item in self._items:
            self._release(item)
        self._items.clear()

    def _keep(self, tensor: Tensor) -> Tensor | _OnDisk:
        tensor = tensor.detach().to("cpu")
        if self._spill.nbytes + tensor.nbytes > self._spill.limit:
            return _OnDisk(tensor, self._spill.new_file())
        self._spill.nbytes += tensor.nbytes
        # a view would keep its whole base in memory, uncounted
        return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor

    def _release(self, item: Tensor | _OnDisk) -> None:
        if isinstance(item, _OnDisk):
            item.file.unlink(missing_ok=True)
        else:
            self._spill.nbytes -= item.nbytes


class _OnDisk:
    def __init__(self, tensor: Tensor, file: Path) -> None:
        self.shape, self.dtype, self.file = tensor.shape, tensor.dtype, file
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(file)

    def load(self) -> Tensor:
        return torch.from_numpy(np.fromfile(self.file, dtype=np.uint8)).view(self.dtype).view(self.shape)
