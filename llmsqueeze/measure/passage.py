"""The passage of the residual streams through a block whose fusion groups are compressed one after the other.

Each group sees the inputs behind the groups that were compressed before it. `Paused` runs a block once: all samples
stop before a group's first linear, and go on from there when the group is compressed; what lies between is kept, or
spilled, like other activations. A block that cannot stop (trace.py says which) is run from its beginning for every
group (`Restarted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, Pulls, SecondMoments, fusion_groups, grouped
from llmsqueeze.memory import give_back
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.segment import Segment
from llmsqueeze.model.blockwise.trace import BlockTrace, given_tensors
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.linears import as_rows
from llmsqueeze.progress.stopwatch import timed

TRIM_EVERY = 16  # samples
NO_OUTPUTS: Mapping[str, Tensor] = MappingProxyType({})
Weights = Mapping[str, Tensor]  # linear -> its weight, as the module stores it


@dataclass(frozen=True)
class ResidualStreams:
    """The residual streams at a block's input: the original model's and the compressed model's.

    A stream that nobody needs is None; before the first block both may be the same object.
    """

    original: Activations | None = None
    compressed: Activations | None = None

    @property
    def all(self) -> list[Activations]:
        """Each stream once."""
        return list({id(s): s for s in (self.original, self.compressed) if s is not None}.values())

    def clear(self) -> None:
        """Gives the memory of both back."""
        for stream in self.all:
            stream.clear()


class Passage(Protocol):
    """The passage through one resident block, with its weights as they were (`original`) and as they are (`current`,
    which changes from group to group)."""

    def groups(self) -> Iterator[tuple[Sequence[str], Moments]]:
        """The fusion groups to be compressed in the order of their calls, with the moments of their inputs."""
        ...

    def ahead(self) -> ResidualStreams:
        """The streams behind the block; call it after the last group."""
        ...


def passage(walk: Walk, index: int, streams: ResidualStreams, original: Weights, current: Weights) -> Passage:
    """The best passage that the block allows. It uses up the streams."""
    trace = walk.trace(index, streams.all[0]) if streams.all else None
    if trace is None:
        return Restarted(walk, index, streams, original, current)
    groups = [group for group in grouped(trace.calls) if any(name in original for name in group.names)]
    if any(group.calls > 1 for group in groups):
        return Restarted(walk, index, streams, original, current)
    return Paused(walk, index, streams, original, current, trace, groups)


class _Moments:
    """The moments of a group's inputs, sample by sample."""

    def __init__(self, walk: Walk, group: FusionGroup, original: Weights, drifting: bool) -> None:
        self.xtx = SecondMoments(walk.skeleton.shape(group.names[0])[1], walk.dtype, walk.device)
        weights = {
            name: as_rows(walk.skeleton.module(name), original[name]) for name in group.names if name in original
        }
        self.pulls = Pulls(weights) if drifting else None

    @timed("moments")
    def add(self, x: Tensor | None, y: Tensor, outputs: Mapping[str, Tensor] = NO_OUTPUTS) -> None:
        """Inputs [tokens, cols] of the original and the compressed model for the same tokens; outputs: what linears of
        the original model give for x, as far as it is known."""
        self.xtx.add(y)
        if self.pulls is not None and x is not None:
            self.pulls.add(x, y, {name: output.reshape(len(x), -1) for name, output in outputs.items()})

    @timed("moments")
    def mean(self) -> Moments:
        """Nothing can be added afterwards."""
        xtx = self.xtx.mean()
        return Moments(xtx, {} if self.pulls is None else self.pulls.mean(self.xtx.tokens, xtx))


def _drifting(streams: ResidualStreams, original: Weights, current: Weights) -> bool:
    """Whether the two streams differ before the next group."""
    if streams.original is None or streams.compressed is None:
        return False
    return streams.original is not streams.compressed or any(current[name] is not original[name] for name in current)


def _with_little_memory(samples: int) -> Iterator[int]:
    """The numbers of the samples; every few of them the C library's heap is emptied, in which what is kept leaves
    holes between what is not."""
    for sample in range(samples):
        yield sample
        if sample % TRIM_EVERY == TRIM_EVERY - 1:
            give_back()


class Paused:
    """A passage in which the block runs once. Behind the last stop the original stream, whose weights stay, goes on at
    once: the block's output takes less room than what the last linear gets."""

    def __init__(
        self,
        walk: Walk,
        index: int,
        streams: ResidualStreams,
        original: Weights,
        current: Weights,
        trace: BlockTrace,
        groups: Sequence[FusionGroup],
    ) -> None:
        self.walk, self.streams, self.original, self.current = walk, streams, original, current
        self._groups = groups
        self._segments = trace.cut([group.names[0] for group in groups])
        shared = streams.original is streams.compressed
        needs_output = index + 1 < len(walk.modules)
        self._flows = [
            None if stream is None else _Flow(walk, index, trace, stream, weights, shared, finishes)
            for stream, weights, finishes in (
                (streams.original, original, needs_output),
                (streams.compressed, current, False),
            )
        ]

    def groups(self) -> Iterator[tuple[Sequence[str], Moments]]:
        for at, group in enumerate(self._groups):
            cols = self.walk.skeleton.shape(group.names[0])[1]
            drifting = _drifting(self.streams, self.original, self.current)
            moments = _Moments(self.walk, group, self.original, drifting)
            for sample in _with_little_memory(len(self.walk.samples)):
                steps = [None if flow is None else flow.go_on(self._segments[at:], sample) for flow in self._flows]
                x, y = (None if step is None else step.input.reshape(-1, cols) for step in steps)
                y = x if y is None else y
                assert y is not None, "a passage has a stream"
                moments.add(x, y, NO_OUTPUTS if steps[0] is None else steps[0].outputs)
            yield group.names, moments.mean()

    def ahead(self) -> ResidualStreams:
        for flow in self._flows:
            if flow is not None and not flow.outputs:
                for sample in _with_little_memory(len(self.walk.samples)):
                    flow.go_on(self._segments[-1:], sample)
        return ResidualStreams(*(None if flow is None else flow.outputs for flow in self._flows))


class _Step(NamedTuple):
    """What a sample's next linear gets, or the block's output; and the outputs of the linears behind the stop, if the
    sample went on."""

    input: Tensor
    outputs: dict[str, Tensor]


class _Flow:
    """One stream inside a block: the values of every sample that lie between two stops, and the block's outputs.

    keeps_input: another flow reads the block's input too; finishes: it does not stop after the last stop.
    """

    def __init__(
        self,
        walk: Walk,
        index: int,
        trace: BlockTrace,
        stream: Activations,
        weights: Weights,
        keeps_input: bool,
        finishes: bool,
    ) -> None:
        self.walk, self.index, self.weights, self.finishes = walk, index, weights, finishes
        self.values: dict[fx.Node, Activations] = {trace.hidden: stream}
        self.outputs = Activations(walk.spill)
        self._keeps = stream if keeps_input else None

    @timed("forward")
    def go_on(self, segments: Sequence[Segment], sample: int) -> _Step:
        """Runs a sample to the end of the first of the segments that are left."""
        walk = self.walk
        count = 2 if self.finishes and len(segments) == 2 else 1
        first, last = segments[0], segments[count - 1]
        values = {node: self.values[node].get(sample, walk.device) for node in first.needs}
        given = given_tensors(walk.call(self.index, sample))
        outputs: dict[str, Tensor] = {}

        def linear(name: str, x: Tensor) -> Tensor:
            with walk.skeleton.using({name: self.weights[name]} if name in self.weights else {}):
                output = walk.linear(name, x)
            if walk.products == walk.dtype:  # else it is not exact enough for what the second moments take off
                outputs[name] = output
            return output

        with torch.no_grad():
            result = first.run(values, given, linear)
            outputs.clear()
            end = last.run(values, given, linear) if last is not first else result
        if last is segments[-1]:
            self.outputs.append(end)
        for node in last.leaves - first.needs:
            self.values.setdefault(node, Activations(walk.spill)).append(values[node])
        for node in first.needs - last.leaves:
            if self.values[node] is not self._keeps:
                self.values[node].release(sample)
        return _Step(result, outputs)


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
        drifting = _drifting(self.streams, self.original, self.current)
        moments = _Moments(self.walk, group, self.original, drifting)
        x_of = self._capture(group, self.streams.original, self.original)
        y_of = self._capture(group, self.streams.compressed, self.current) or x_of
        if y_of is None:
            raise ValueError("the moments need one stream at least")
        for sample in range(len(self.walk.samples)):
            y = y_of(sample)
            if len(y):  # else nothing of this sample reaches the group
                moments.add(x_of(sample) if x_of is not None and drifting else None, y)
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
