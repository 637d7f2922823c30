"""The product with a model's head, in memory that is used again.

The logits of some hundred tokens are the largest tensor of an evaluation, and fresh memory for them costs a tenth to a
fifth of their product. Where the rows of the result lie a multiple of a page apart, they compete for one place in the
processor's nearest cache, which costs another tenth: such rows are moved a little further apart.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

from llmsqueeze.progress.stopwatch import timed

ROWS_BYTES = 8 << 20  # of the weight's rows that are cast at a time
CACHE_LINE = 64  # bytes


def room_for_logits(tokens: int, vocabulary: int, like: Tensor) -> Tensor:
    """Memory [tokens, vocabulary] with the dtype and the device of `like`; its rows need not lie side by side."""
    apart = vocabulary if vocabulary * like.itemsize % mmap.PAGESIZE else vocabulary + CACHE_LINE // like.itemsize
    return like.new_empty(tokens, apart)[:, :vocabulary]


@timed("forward")
def raw_logits(head: nn.Linear, x: Tensor, room: Tensor) -> Tensor:
    """What the head's linear gives for x [tokens, width], in the dtype of x: [tokens, vocabulary], the first rows of
    `room`. Memory: some rows of the weight in that dtype."""
    raw = room[: len(x)]
    with torch.no_grad():
        for part in rows_at_a_time(head, x.dtype):
            torch.mm(x, head.weight[part].to(x.dtype).T, out=raw[:, part])
        if head.bias is not None:
            raw += head.bias.to(x.dtype)
    return raw


def rows_at_a_time(head: nn.Linear, dtype: torch.dtype) -> list[slice]:
    """Of the weight, so that its rows in this dtype stay within the limit."""
    rows, width = head.weight.shape
    return slices_within(rows, width * dtype.itemsize, ROWS_BYTES)


def slices_within(count: int, nbytes: int, limit: int) -> list[slice]:
    """Of so many things with `nbytes` each: as few slices of one size as the limit allows."""
    step = max(1, limit // nbytes)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
