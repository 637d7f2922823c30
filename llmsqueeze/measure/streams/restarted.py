"""A passage in which the block runs from its beginning for every group: for blocks that cannot stop (passage.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, fusion_groups, pool_probes
from llmsqueeze.measure.streams.additions import Additions, Followed
from llmsqueeze.measure.streams.entrance import (
    Entrance,
    Inputs,
    entrance,
    in_chunks,
    of_experts,
    seeing,
    weights_of,
)
from llmsqueeze.measure.streams.pooled import PooledMoments, of_pool
from llmsqueeze.measure.streams.residual import GroupMoments, ResidualStreams, Weights, drifting
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.routing import Routing, sent_to_all
from llmsqueeze.progress.stopwatch import timed

T = TypeVar("T")
InputsOf = Callable[[Sequence[FusionGroup], bool, int], Inputs]  # groups, whether of the original, sample


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
        first, before, inputs = self.streams.all[0].get(0, self.walk.device), list[str](), dict[str, Tensor]()
        groups = fusion_groups(self.walk, self.index, first, inputs)
        probes = pool_probes(self.walk, groups, inputs)
        inputs.clear()
        for pool, together in groupby(groups, lambda group: group.pool):
            wanted = [group for group in together if any(name in self.original for name in group.names)]
            if pool and wanted:
                yield from self.observe_pool(wanted, before, probes[pool])
            else:
                for group in wanted:
                    yield group.names, self.observe(group)
            before += pool

    def observe_pool(
        self, groups: Sequence[FusionGroup], before: Sequence[str], probes: Tensor
    ) -> Iterator[tuple[Sequence[str], Moments]]:
        """The moments of experts' inputs over all samples; those of experts that few tokens were sent to are drawn
        towards those of all. before: stacks of experts that are called before those of the pool; probes: as
        `PooledMoments` has them.

        If the experts are too many for memory, some at a time are summed up: first for what all get together, and again
        for each by itself."""
        differ = drifting(self.streams, self.original, self.current)
        chunks = in_chunks(self.walk, self.index, groups, before, differ)
        if len(chunks) == 1:
            pooled = self._summed(groups, differ, self._in_block, probes)
            yield from pooled.mean(of_pool(pooled.sums))
            return
        with self._entrances(groups[0].pool, differ) as entrances:
            sums = partial(self._summed_alone, differ, before, entrances, probes)
            pool = of_pool(one for chunk in chunks for one in sums(chunk, pulls=False).sums)
            for chunk in chunks:
                yield from sums(chunk).mean(pool)

    def _summed(
        self, groups: Sequence[FusionGroup], differ: bool, inputs: InputsOf, probes: Tensor, pulls: bool = True
    ) -> PooledMoments:
        """What groups of a pool get from all samples; inputs: what they get from one of them. pulls: False if second
        moments are enough."""
        drift = differ and pulls
        sums = {group.names: GroupMoments(self.walk, group, self.original, drift) for group in groups}
        pooled = PooledMoments(sums, probes)
        for sample in range(len(self.walk.samples)):
            x, y = self._routed(sample, differ, partial(inputs, groups))
            pooled.add(x if x is not None and differ else {}, y if y is not None else x or {})
            pooled.seen(sample)
            self.walk.on_sample(sample + 1, len(self.walk.samples))
        return pooled

    def _routed(self, sample: int, differ: bool, run: Callable[[bool, int], T]) -> tuple[T | None, T | None]:
        """What a run of a sample gives in the original's stream, as far as it is needed, and in the compressed one; in
        this all tokens go to the experts to which they went in that. run: gets whether it is the original's."""
        routing = Routing()
        x: T | None = None
        y: T | None = None
        if self.streams.original is not None and (differ or self.streams.compressed is None):
            with routing:
                x = run(True, sample)
        if self.streams.compressed is not None:
            with Routing(follows=routing) if differ else routing:
                y = run(False, sample)
        return x, y

    def _in_block(self, groups: Sequence[FusionGroup], of_original: bool, sample: int) -> Inputs:
        """What groups get from a sample when the block runs; those that get nothing are left out."""
        stream = self.streams.original if of_original else self.streams.compressed
        assert stream is not None, "a stream that is not there is not asked for"
        seen = Inputs()
        with ExitStack() as stack:
            stack.enter_context(seeing(self.walk, groups, seen))
            if self.all_experts:
                for handle in sent_to_all(self.walk.modules[self.index]):
                    stack.callback(handle.remove)
            stack.enter_context(self.walk.skeleton.using(self.original if of_original else self.current))
            with torch.no_grad():
                self.walk.run(self.index, sample, stream.get(sample, self.walk.device))
        return seen

    @contextmanager
    def _entrances(self, pool: Sequence[str], differ: bool) -> Iterator[Mapping[bool, Entrance]]:
        """What the module that holds a pool gets in the original's stream (True) and in the compressed one; none if
        there is no such module."""
        first = self.streams.all[0].get(0, self.walk.device)
        module, entrances = entrance(self.walk, self.index, pool, first), dict[bool, Entrance]()
        if module is not None:
            streams = ((True, self.streams.original, self.original), (False, self.streams.compressed, self.current))
            for of_original, stream, weights in streams:
                if stream is not None:
                    at = self.walk, self.index, module, stream, dict(weights), self.all_experts
                    entrances[of_original] = Entrance(*at)
            for sample in range(len(self.walk.samples)):
                self._routed(sample, differ, lambda one, number: entrances[one].note(number))
        try:
            yield entrances
        finally:
            for one in entrances.values():
                one.clear()

    def _summed_alone(
        self,
        differ: bool,
        before: Sequence[str],
        entrances: Mapping[bool, Entrance],
        probes: Tensor,
        groups: Sequence[FusionGroup],
        pulls: bool = True,
    ) -> PooledMoments:
        """`_summed`, with no experts in memory but those of the groups."""
        if not entrances:
            return self._summed(groups, differ, self._in_block, probes, pulls)
        names = of_experts(groups, before)
        read = {one: weights_of(names, self.original if one else self.current) for one in entrances}

        def inputs(some: Sequence[FusionGroup], one: bool, sample: int) -> Inputs:
            return entrances[one].inputs(some, sample, read[one])

        return self._summed(groups, differ, inputs, probes, pulls)

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
            if len(compressed.input):  # something of this sample reaches the group
                apart = None if original is None or not adds else original.apart(compressed)
                moments.add(None if original is None else original.input, compressed.input, apart=apart)
            moments.seen(sample)
            self.walk.on_sample(sample + 1, len(self.walk.samples))
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
