"""Sums over the samples of a run whose bits do not depend on the number of processes.

The samples are cut into at most `SHARES` shares of consecutive ones, and process r of N has the shares r, r + N, ... A
share is summed up on its own, and the sums of the shares are added in their order by the first process. One process
does the same. Several send and add a share in a thread, while they compute the next one: nobody waits for somebody who
is a little slower at one share. Memory: a sum twice, and on the first of several processes two times more.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmsqueeze.parallel import processes

SHARES = 16


@dataclass(frozen=True)
class Shares:
    """The shares of one process. numbers: of all samples, those that it has, in its order; ends: the last sample of
    each of its shares, by its place in that order -> the processes that have a share at that time; total: how many
    samples there are."""

    numbers: list[int]
    ends: dict[int, list[int]]
    total: int

    @classmethod
    def of(cls, total: int, rank: int | None = None, count: int | None = None) -> Shares:
        """The shares of this process of a run over so many samples."""
        rank, count = processes.rank() if rank is None else rank, count or processes.count()
        shares = min(SHARES, total)
        cuts = [total * i // shares for i in range(shares + 1)] if shares else [0]
        numbers: list[int] = []
        ends: dict[int, list[int]] = {}
        for share in range(rank, shares, count):
            numbers += range(cuts[share], cuts[share + 1])
            ends[len(numbers) - 1] = list(range(min(count, shares - (share - rank))))
        return cls(numbers, ends, total)


class Sums:
    """Named tensors that are summed up over samples, share by share."""

    def __init__(self) -> None:
        self._share: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._complete = False
        self._folding: Future[None] | None = None
        self.shares = 0  # that were folded by this process

    def of(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """The sum of this share, to be added to in place; zeros at first."""
        if name not in self._share:
            self._share[name] = torch.zeros(*shape, dtype=dtype, device=device)
        return self._share[name]

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor that may be kept."""
        if name in self._share:
            self._share[name].add_(value)
        else:
            self._share[name] = value

    def fold(self, senders: Sequence[int] = (0,)) -> None:
        """Ends a share. senders: the processes that end one now. Raises what the folding of the one before raised."""
        share, self._share = self._share, {}
        self.shares += 1
        if processes.count() == 1:
            self._fold(share, senders)
            return
        self._wait()  # at most one share is under way
        self._folding = folder().submit(self._fold, share, senders)

    def _fold(self, share: dict[str, Tensor], senders: Sequence[int]) -> None:
        if processes.rank() in senders[1:]:
            processes.send(share)
            return
        for name in list(share):
            self._take(name, share.pop(name))
        for sender in senders[1:]:
            for name, tensor in processes.receive(sender):
                self._take(name, tensor)

    def _wait(self) -> None:
        folding, self._folding = self._folding, None
        if folding is not None:
            folding.result()

    def _take(self, name: str, tensor: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(tensor.to(self._sums[name].device))
        else:
            self._sums[name] = tensor

    def total(self) -> dict[str, Tensor]:
        """The sums over the samples of all processes, in all of them; nothing can be added afterwards."""
        if not self._complete:
            if self._share:
                assert processes.count() == 1, "every share of several processes is folded"
                self.fold()
            self._wait()
            self._sums, self._complete = processes.of_first_tensors(self._sums), True
        return self._sums


@cache
def folder() -> ThreadPoolExecutor:
    """The thread that talks about shares: one, so that they come in the order of their ends."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="fold")
