"""A passage in which the block runs from its beginning for every group: for blocks that cannot stop (passage.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, fusion_groups
from llmsqueeze.measure.streams.additions import Additions, Followed
from llmsqueeze.measure.streams.pooled import PooledMoments
from llmsqueeze.measure.streams.residual import GroupMoments, ResidualStreams, Weights, drifting
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.routing import Routing, sent_to_all
from llmsqueeze.progress.stopwatch import timed


@dataclass(frozen=True)
class Restarted:
    """A passage in which the block runs from its beginning for every group."""

    walk: Walk
    index: int
    streams: ResidualStreams
    original: Weights
    current: Weights
    all_experts: bool = False

    def groups(self) -> Iterator[tuple[Sequence[str], Moments]]:
        first = self.streams.all[0].get(0, self.walk.device)
        groups = fusion_groups(self.walk, self.index, first)
        for pool, of_pool in groupby(groups, lambda group: group.pool):
            wanted = [group for group in of_pool if any(name in self.original for name in group.names)]
            if pool and wanted:
                yield from self.observe_pool(wanted)
            else:
                for group in wanted:
                    yield group.names, self.observe(group)

    def observe_pool(self, groups: Sequence[FusionGroup]) -> Iterator[tuple[Sequence[str], Moments]]:
        """The moments of experts' inputs over all samples; those of experts that few tokens were sent to are drawn
        towards those of all."""
        differ = drifting(self.streams, self.original, self.current)
        pooled = PooledMoments({group.names: GroupMoments(self.walk, group, self.original, differ) for group in groups})
        for sample in range(len(self.walk.samples)):
            routing, x = Routing(), dict[tuple[str, ...], Tensor]()
            if self.streams.original is not None and (differ or self.streams.compressed is None):
                with routing:
                    x = self._inputs(groups, self.streams.original, self.original, sample)
            y = x
            if self.streams.compressed is not None:
                with Routing(follows=routing) if differ else routing:
                    y = self._inputs(groups, self.streams.compressed, self.current, sample)
            pooled.add(x if differ else {}, y)
        yield from pooled.mean()

    def _inputs(
        self, groups: Sequence[FusionGroup], stream: Activations, weights: Weights, sample: int
    ) -> dict[tuple[str, ...], Tensor]:
        """What groups get from a sample, [tokens, cols] each; those that get nothing are left out."""
        seen: dict[tuple[str, ...], Tensor] = {}

        def note(names: tuple[str, ...], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():
                seen[names] = args[0].reshape(-1, args[0].shape[-1])

        modules = {group.names: self.walk.skeleton.module(group.names[0]) for group in groups}
        handles = [module.register_forward_pre_hook(partial(note, names)) for names, module in modules.items()]
        try:
            if self.all_experts:
                handles += sent_to_all(self.walk.modules[self.index])
            with self.walk.skeleton.using(weights), torch.no_grad():
                self.walk.run(self.index, sample, stream.get(sample, self.walk.device))
        finally:
            for handle in handles:
                handle.remove()
        return seen

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
            routing = Routing()
            with routing:
                original = of_original(sample) if of_original is not None and differ else None
            with Routing(follows=routing):
                compressed = of_compressed(sample)
            if not len(compressed.input):
                continue  # nothing of this sample reaches the group
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
