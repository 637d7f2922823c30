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
from llmsqueeze.measure.shrinkage import shrink
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


class PooledMoments:
    """Sums up what each fusion group of a pool gets, or of some of its groups. probes [PROBES, cols]: of all of them,
    whatever a router sends to whom."""

    def __init__(self, groups: Mapping[Names, GroupMoments], probes: Tensor) -> None:
        self._groups = dict(groups)
        for group in self._groups.values():
            group.probe_with(probes)

    @property
    def sums(self) -> Iterator[SecondMoments]:
        """The second moments of every group."""
        return (group.xtx for group in self._groups.values())

    def add(self, x: Mapping[Names, Tensor], y: Mapping[Names, Tensor]) -> None:
        """One sample's inputs [tokens, cols] of the original (none if the streams do not differ) and of the compressed
        model, for the same tokens; groups that get nothing are left out."""
        for names, own in y.items():
            self._groups[names].add(x.get(names), own)

    def seen(self, sample: int) -> None:
        """All of a sample was added."""
        for group in self._groups.values():
            group.seen(sample)

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
    """The mean second moments [cols, cols] of all inputs of several groups, of which one has to be there at a time, and
    the share that was chance and is taken away, which is that of the largest; None if no token was sent anywhere."""
    total, tokens, largest = None, 0, None
    for group in groups:
        if group.tokens:
            total = group.so_far().clone() if total is None else total.add_(group.so_far())
            tokens += group.tokens
            largest = group if largest is None or group.tokens > largest.tokens else largest
    if total is None or largest is None:
        return None
    mean = largest.mean_of(total, tokens)
    chance = largest.chance.share(mean.diagonal(), tokens)
    return shrink(mean, chance), chance
