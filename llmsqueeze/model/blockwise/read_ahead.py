"""Tensors read by another thread while the ones before them are computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from torch import Tensor


class ReadAhead:
    """Reads named tensors before they are needed, one set at a time."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        """`read`: gives a tensor by its name; also from another thread."""
        self._read = read
        self._coming: dict[str, Future[Tensor]] = {}

    def start(self, names: Iterable[str]) -> None:
        """Begins to read these tensors; those of an earlier start that nobody took are dropped."""
        self.drop()
        self._coming = {name: _reader().submit(self._read, name) for name in names}

    def take(self, name: str) -> Tensor:
        """The tensor, waited for if it is still being read, or read now. Raises what reading raises."""
        coming = self._coming.pop(name, None)
        return self._read(name) if coming is None else coming.result()

    def drop(self) -> None:
        """Forgets what was read ahead."""
        for coming in self._coming.values():
            coming.cancel()
        self._coming = {}


@cache
def _reader() -> ThreadPoolExecutor:
    """The one thread of the process that reads ahead: a disk gains nothing from several."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
