"""A passage in which the block runs from its beginning for every group: for blocks that cannot stop (passage.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, fusion_groups
from llmsqueeze.measure.streams.additions import Additions, Followed
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
        of_original = self._capture(group, self.streams.original, self.original)
        of_compressed = self._capture(group, self.streams.compressed, self.current) or of_original
        if of_compressed is None:
            raise ValueError("the moments need one stream at least")
        adds = differ and of_compressed(0).added_to is not None
        moments = GroupMoments(self.walk, group, self.original, differ, adds)
        for sample in range(len(self.walk.samples)):
            compressed = of_compressed(sample)
            if not len(compressed.input):
                continue  # nothing of this sample reaches the group
            original = of_original(sample) if of_original is not None and differ else None
            apart = None if original is None or not adds else original.apart(compressed)
            moments.add(None if original is None else original.input, compressed.input, apart=apart)
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


@dataclass(frozen=True)
class _Seen:
    """What a group got from a sample [tokens, cols], and what the output of its one linear is added to [tokens, rows],
    in units of that output; None if it is not added to anything."""

    input: Tensor
    added_to: Tensor | None

    def apart(self, compressed: _Seen) -> Tensor | None:
        if self.added_to is None or compressed.added_to is None:
            return None
        return self.added_to - compressed.added_to


@dataclass(frozen=True)
class _Capture:
    """Runs a block with given weights until a fusion group has seen its input, and the output of a group of one linear
    has been added to what it is added to."""

    walk: Walk
    index: int
    group: FusionGroup
    weights: Weights
    stream: Activations

    @timed("forward")
    def __call__(self, sample: int) -> _Seen:
        seen: list[Tensor] = []
        additions = Additions()
        follows = len(self.group.names) == self.group.calls == 1

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].reshape(-1, args[0].shape[-1]))
            if len(seen) == self.group.calls and not follows:
                raise Followed

        module = self.walk.skeleton.module(self.group.names[0])
        handles = [module.register_forward_pre_hook(note)]
        if follows:
            handles.append(module.register_forward_hook(lambda _module, _args, output: additions.follow(output)))
        try:
            with suppress(Followed), self.walk.skeleton.using(self.weights), torch.no_grad(), additions:
                self.walk.run(self.index, sample, self.stream.get(sample, self.walk.device))
        finally:
            for handle in handles:
                handle.remove()
        total = additions.total
        return _Seen(torch.cat(seen), None if total is None else (total / additions.factor).flatten(0, -2))
