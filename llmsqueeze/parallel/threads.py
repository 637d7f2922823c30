"""Work shared among torch's threads on a CPU: the rows of a weight, and the samples of a calibration set.

Two threads in one operation wait for each other at its end, and a block has hundreds of operations for a sample. So
threads take different samples where they can (`in_lanes`), and meet once a sample. What they compute is used in the
order of the samples, so results do not depend on who was first.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

TILE = 64  # rows of which a compiled loop keeps the columns in cache
SIDE_BY_SIDE = 16  # rows that a processor treats at once
T = TypeVar("T")


def over_rows(rows: int, loop: Callable[[int, int], None]) -> None:
    """Calls loop(first, last) for spans that cover all rows, one span per thread of torch.

    The compiled loops release Python's global lock.
    """
    threads = max(1, min(torch.get_num_threads(), -(-rows // TILE)))
    if threads == 1:
        loop(0, rows)
        return
    cuts = [-(-rows * i // threads // SIDE_BY_SIDE) * SIDE_BY_SIDE for i in range(threads)] + [rows]
    list(_pool(threads).map(lambda span: loop(*span), itertools.pairwise(cuts)))


def in_lanes(count: int, compute: Callable[[int], T], use: Callable[[int, T], None], single: bool = False) -> None:
    """Calls use(number, compute(number)) for all numbers below `count`: `use` in their order and never twice at a time,
    `compute` of some numbers at a time if torch has threads for that. An error of either ends it, and is raised.

    single: one number after the other, with all threads in each. Memory: what `compute` needs, once per lane.
    """
    lanes, threads = shared_out(torch.get_num_threads())
    if single or lanes == 1:
        for number in range(count):
            use(number, compute(number))
        return
    work, before = _Lanes(count, compute, use, threads), torch.get_num_threads()
    others = [_pool(lanes - 1).submit(work.run) for _ in range(lanes - 1)]
    try:
        work.run()
    finally:
        for other in others:  # none may go on with what the caller takes away
            other.exception()
        torch.set_num_threads(before)  # also of threads that come later
    for other in others:
        other.result()


def shared_out(threads: int) -> tuple[int, int]:
    """So many lanes, and the threads of each: as few lanes as use all threads, two or three, for each needs memory."""
    lanes = 3 if threads % 2 and threads % 3 == 0 else min(2, threads)
    return lanes, threads // lanes


class _Lanes(Generic[T]):
    """What the lanes share: the next number to compute, and the next to be used."""

    def __init__(self, count: int, compute: Callable[[int], T], use: Callable[[int, T], None], threads: int) -> None:
        self._compute, self._use, self._threads = compute, use, threads
        self._numbers: Iterator[int] = iter(range(count))
        self._turn = 0
        self._failed = False
        self._changed = threading.Condition()

    def run(self) -> None:
        """One lane, until no number is left or a lane fails."""
        torch.set_num_threads(self._threads)  # of this thread
        try:
            while (number := self._next()) is not None:
                result = self._compute(number)
                if not self._wait_for(number):
                    return
                self._use(number, result)
                with self._changed:
                    self._turn += 1
                    self._changed.notify_all()
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise

    def _next(self) -> int | None:
        with self._changed:
            return None if self._failed else next(self._numbers, None)

    def _wait_for(self, number: int) -> bool:
        """Whether it is this number's turn, in the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._turn == number)
            return not self._failed


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
