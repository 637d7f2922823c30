"""Rows of a weight shared among torch's threads. The compiled loops release Python's global lock."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

TILE = 64  # rows that a compiled loop treats side by side


def over_rows(rows: int, loop: Callable[[int, int], None]) -> None:
    """Calls loop(first, last) for spans that cover all rows: whole tiles, one span per thread of torch."""
    tiles = -(-rows // TILE)
    threads = max(1, min(torch.get_num_threads(), tiles))
    if threads == 1:
        loop(0, rows)
        return
    cuts = [min(tiles * i // threads * TILE, rows) for i in range(threads + 1)]
    list(_pool(threads).map(lambda span: loop(*span), itertools.pairwise(cuts)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
