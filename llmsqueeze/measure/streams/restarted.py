"""A passage in which the block runs from its beginning for every group: for blocks that cannot stop (passage.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, fusion_groups
from llmsqueeze.measure.streams.residual import GroupMoments, ResidualStreams, Weights, drifting
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.progress.stopwatch import timed


@dataclass(frozen=True)
class Restarted:
    """A passage in which the block runs from its beginning for every group."""

    walk: Walk
    index: int
    streams: ResidualStreams
    original: Weights
    current: Weights

    def groups(self) -> Iterator[tuple[Sequence[str], Moments]]:
        first = self.streams.all[0].get(0, self.walk.device)
        for group in fusion_groups(self.walk, self.index, first):
            if any(name in self.original for name in group.names):
                yield group.names, self.observe(group)

    def observe(self, group: FusionGroup) -> Moments:
        """The moments of a group's input over all samples."""
        differ = drifting(self.streams, self.original, self.current)
        moments = GroupMoments(self.walk, group, self.original, differ)
        x_of = self._capture(group, self.streams.original, self.original)
        y_of = self._capture(group, self.streams.compressed, self.current) or x_of
        if y_of is None:
            raise ValueError("the moments need one stream at least")
        for sample in range(len(self.walk.samples)):
            y = y_of(sample)
            if len(y):  # else nothing of this sample reaches the group
                moments.add(x_of(sample) if x_of is not None and differ else None, y)
        return moments.mean()

    def ahead(self) -> ResidualStreams:
        streams = ((self.streams.original, self.original), (self.streams.compressed, self.current))
        return ResidualStreams(*(self._advance(stream, weights) for stream, weights in streams))

    def _capture(self, group: FusionGroup, stream: Activations | None, weights: Weights) -> _Capture | None:
        return None if stream is None else _Capture(self.walk, self.index, group, weights, stream)

    def _advance(self, stream: Activations | None, weights: Weights) -> Activations | None:
        if stream is None:
            return None
        with self.walk.skeleton.using(weights):
            return self.walk.through(self.index, stream)


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a block's forward pass once the group's inputs have been seen."""


@dataclass(frozen=True)
class _Capture:
    """Runs a block with given weights until a fusion group has seen its input."""

    walk: Walk
    index: int
    group: FusionGroup
    weights: Weights
    stream: Activations

    @timed("forward")
    def __call__(self, sample: int) -> Tensor:
        """[tokens, cols]"""
        seen: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]))
            if len(seen) == self.group.calls:
                raise _Enough

        handle = self.walk.skeleton.module(self.group.names[0]).register_forward_pre_hook(note)
        try:
            with suppress(_Enough), self.walk.skeleton.using(self.weights), torch.no_grad():
                self.walk.run(self.index, sample, self.stream.get(sample, self.walk.device))
        finally:
            handle.remove()
        return torch.cat(seen)
