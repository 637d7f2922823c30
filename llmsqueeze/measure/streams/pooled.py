"""The moments of what experts get, each from the tokens that were sent to it.

An expert that saw n tokens has

    H = (n * H_own + PRIOR * H_pool) / (n + PRIOR)

where H_pool is the mean over the tokens of all experts of the pool: what few tokens tell of an expert is drawn towards
what the experts of the layer get together, and an expert that saw none falls back to it. What an expert's output has
lost, which its own tokens tell alone, is taken times n / (n + PRIOR), the share that those tokens have in H.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmsqueeze.measure.moments import Moments, SecondMoments
from llmsqueeze.measure.streams.residual import GroupMoments

PRIOR = 128  # tokens
UNSEEN = 0.5  # tokens that every expert has beforehand
Names = tuple[str, ...]


def drawn(own: Tensor, tokens: int, pool: Tensor) -> Tensor:
    """An expert's moments [cols, cols] of so many tokens, drawn towards those of its pool, in their memory."""
    kept = tokens / (tokens + PRIOR)
    return own.mul_(kept).add_(pool, alpha=1 - kept)


def drawn_gradient(squares: Tensor | None, tokens: int, pool: Tensor) -> Tensor:
    """[rows]: the summed squared gradients of an expert's outputs over so many tokens (None if there were none), its
    rows drawn towards those of the pool, which are of one token. An expert counts as much as its own tokens say, and
    half a token more: one that no text of the calibration reached may be reached by another."""
    if squares is None or not tokens:
        return pool * UNSEEN
    size = squares.mean() / tokens / pool.mean().clamp(min=torch.finfo(pool.dtype).tiny)
    per_token = (squares + pool * (PRIOR * size)) / (tokens + PRIOR)
    return per_token * tokens + pool * UNSEEN


def together(groups: Iterable[SecondMoments]) -> SecondMoments | None:
    """The second moments of all inputs of several groups, of which one has to be there at a time; how much of them is
    chance is that of the largest. None if there are no groups."""
    pool, largest = None, -1
    for group in groups:
        pool = pool or SecondMoments(len(group.sum), group.sum.dtype, group.sum.device)
        pool.sum += group.sum
        pool.tokens += group.tokens
        if group.tokens > largest:
            pool.chance, largest = group.chance, group.tokens
    return pool


class PooledMoments:
    """Sums up what each fusion group of a pool gets, or of some of its groups."""

    def __init__(self, groups: Mapping[Names, GroupMoments]) -> None:
        self._groups = dict(groups)

    @property
    def sums(self) -> Iterator[SecondMoments]:
        """The second moments of every group."""
        return (group.xtx for group in self._groups.values())

    def add(self, x: Mapping[Names, Tensor], y: Mapping[Names, Tensor]) -> None:
        """One sample's inputs [tokens, cols] of the original (none if the streams do not differ) and of the compressed
        model, for the same tokens; groups that get nothing are left out."""
        for names, own in y.items():
            self._groups[names].add(x.get(names), own)

    def mean(self, pool: tuple[Tensor, float] | None) -> Iterator[tuple[Sequence[str], Moments]]:
        """The moments of every group, drawn towards those of its pool [cols, cols], of which a share is chance; none if
        there are none of the pool. Nothing can be added afterwards."""
        if pool is None:
            return
        of_pool, chance = pool
        for names in list(self._groups):
            group = self._groups.pop(names)
            tokens = group.xtx.tokens
            own = group.mean() if tokens else Moments(torch.zeros_like(of_pool), {}, chance)
            drawn(own.xtx, tokens, of_pool)
            for pull in own.pulls.values():
                pull.mul_(tokens / (tokens + PRIOR))
            yield names, own


def of_pool(groups: Iterable[SecondMoments]) -> tuple[Tensor, float] | None:
    """The mean second moments [cols, cols] of all inputs of a pool, and the share that was chance and is taken away;
    None if no token was sent anywhere."""
    pool = together(groups)
    return None if pool is None or not pool.tokens else pool.shrunk(pool.mean())
