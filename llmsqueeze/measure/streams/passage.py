"""The passage of the residual streams through a block whose fusion groups are compressed one after the other.

Each group sees the inputs behind the groups that were compressed before it. `Paused` runs a block once: all samples
stop before a group's first linear, and go on from there when the group is compressed; what lies between is kept, or
spilled, like other activations. A block that cannot stop (trace.py says which) is run from its beginning for every
group (`Restarted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, fx

from llmsqueeze.measure.moments import FusionGroup, Moments, grouped
from llmsqueeze.measure.streams.residual import NO_OUTPUTS, GroupMoments, ResidualStreams, Weights, drifting
from llmsqueeze.measure.streams.restarted import Restarted
from llmsqueeze.memory import give_back
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.segment import Segment, Values
from llmsqueeze.model.blockwise.trace import BlockTrace, given_tensors
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.casting import is_plain
from llmsqueeze.parallel.threads import in_lanes
from llmsqueeze.progress.stopwatch import timed

TRIM_EVERY = 16  # samples
T = TypeVar("T")


class Passage(Protocol):
    """The passage through one resident block, with its weights as they were (`original`) and as they are (`current`,
    which changes from group to group)."""

    def groups(self) -> Iterator[tuple[Sequence[str], Moments]]:
        """The fusion groups to be compressed in the order of their calls, with the moments of their inputs."""
        ...

    def ahead(self) -> ResidualStreams:
        """The streams behind the block; call it after the last group."""
        ...


def passage(
    walk: Walk,
    index: int,
    streams: ResidualStreams,
    original: Weights,
    current: Weights,
    all_experts: bool = False,
) -> Passage:
    """The best passage that the block allows. It uses up the streams. all_experts: for their moments, every token goes
    to all of them."""
    experts = walk.skeleton.stacks_in(index)  # whose tokens must be the same in both streams
    trace = walk.trace(index, streams.all[0]) if streams.all and not experts else None
    if trace is None:
        return Restarted(walk, index, streams, original, current, all_experts)
    groups = [group for group in grouped(trace.calls) if any(name in original for name in group.names)]
    if any(group.calls > 1 for group in groups):
        return Restarted(walk, index, streams, original, current)
    return Paused(walk, index, streams, original, current, trace, groups)


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
        for segment in self._segments:
            segment.prepare()
        self._added_to = [_added_to(trace, *of) for of in zip(groups, self._segments, strict=False)]
        self._single = walk.device.type != "cpu" or not all(
            is_plain(walk.skeleton.module(name)) for name in trace.names
        )
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
            yield group.names, self._observe(self._segments[at:], group, self._added_to[at])

    def _observe(self, segments: Sequence[Segment], group: FusionGroup, added_to: _AddedTo) -> Moments:
        """The moments of what a group gets. All samples go to the end of the first of the segments that are left."""
        cols = self.walk.skeleton.shape(group.names[0])[1]
        differ = drifting(self.streams, self.original, self.current)
        moments = GroupMoments(self.walk, group, self.original, differ, adds=bool(added_to.values))

        def add(sample: int, steps: list[_Step | None]) -> None:
            x, y = (None if step is None else step.input.reshape(-1, cols) for step in steps)
            y = x if y is None else y
            assert y is not None, "a passage has a stream"
            moments.add(x, y, NO_OUTPUTS if steps[0] is None else steps[0].outputs, _apart(steps, added_to, len(y)))
            moments.seen(sample)
            self._keep(segments, sample, steps)

        self._in_lanes(partial(self._go_on, segments, added_to.values), add)
        return moments.mean()

    def ahead(self) -> ResidualStreams:
        segments = self._segments[-1:]
        if any(flow is not None and not flow.outputs for flow in self._flows):
            self._in_lanes(partial(self._go_on, segments, []), partial(self._keep, segments))
        return ResidualStreams(*(None if flow is None else flow.outputs for flow in self._flows))

    def _go_on(self, segments: Sequence[Segment], at_stop: Sequence[fx.Node], sample: int) -> list[_Step | None]:
        """The next step of a sample in both streams; None in one that there is not, or that is at its end."""
        return [
            None if flow is None or flow.ended(sample) else flow.go_on(segments, at_stop, sample)
            for flow in self._flows
        ]

    def _keep(self, segments: Sequence[Segment], sample: int, steps: list[_Step | None]) -> None:
        for flow, step in zip(self._flows, steps, strict=True):
            if flow is not None and step is not None:
                flow.keep(segments, sample, step)

    @timed("forward")
    def _in_lanes(self, compute: Callable[[int], T], use: Callable[[int, T], None]) -> None:
        """All samples, several at a time (parallel/threads.py). Every few of them the C library's heap is emptied, in
        which what is kept leaves holes between what is not."""

        def with_little_memory(sample: int, computed: T) -> None:
            use(sample, computed)
            self.walk.on_sample(sample + 1, len(self.walk.samples))
            if sample % TRIM_EVERY == TRIM_EVERY - 1:
                give_back()

        in_lanes(len(self.walk.samples), compute, with_little_memory, self._single)


class _AddedTo(NamedTuple):
    """The values to which the output of a linear, times the factor, is added."""

    values: Sequence[fx.Node]
    factor: float


def _added_to(trace: BlockTrace, group: FusionGroup, segment: Segment) -> _AddedTo:
    """Of the linear of a group, if it has one, and if the values are at hand at the end of the segment before it."""
    values, factor = trace.added_to(group.names[0]) if len(group.names) == 1 else ([], 1.0)
    return _AddedTo(values if segment.leaves.issuperset(values) else [], factor)


def _apart(steps: Sequence[_Step | None], added_to: _AddedTo, tokens: int) -> Tensor | None:
    """[tokens, rows]: how far the streams are apart to which a linear's output is added, in units of that output."""
    original, compressed = steps
    if original is None or compressed is None or not added_to.values:
        return None
    apart = [r - s for r, s in zip(original.at_stop, compressed.at_stop, strict=True)]
    return torch.stack(apart).sum(dim=0).div_(added_to.factor).reshape(tokens, -1)


class _Step(NamedTuple):
    """What a sample's next linear gets, or the block's output; the values at the stop that were asked for; the outputs
    of the linears behind the stop, if the sample went on; the values that later pieces need; and the block's output, if
    the sample is there."""

    input: Tensor
    at_stop: list[Tensor]
    outputs: dict[str, Tensor]
    values: Values
    end: Tensor | None


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

    def ended(self, sample: int) -> bool:
        """Whether a sample has gone through the block."""
        return len(self.outputs) > sample

    def go_on(self, segments: Sequence[Segment], at_stop: Sequence[fx.Node], sample: int) -> _Step:
        """Runs a sample to the end of the first of the segments that are left; at_stop: values there that are to be
        told. Several samples may run at a time."""
        walk, (first, last) = self.walk, self._ends(segments)
        values = {node: self.values[node].get(sample, walk.device) for node in first.needs}
        given = given_tensors(walk.call(self.index, sample))
        outputs: dict[str, Tensor] = {}

        def linear(name: str, x: Tensor) -> Tensor:
            output = walk.linear(name, x, self.weights.get(name))
            if walk.products == walk.dtype:  # else it is not exact enough for what the second moments take off
                outputs[name] = output
            return output

        with torch.no_grad():
            result = first.run(values, given, linear)
            outputs.clear()
            told = [values[node].clone() for node in at_stop]  # what comes next may be written over them
            end = last.run(values, given, linear) if last is not first else result
        return _Step(result, told, outputs, values, end if last is segments[-1] else None)

    def keep(self, segments: Sequence[Segment], sample: int, step: _Step) -> None:
        """Keeps what a sample needs to go on, and gives back what it has used. The samples come in their order."""
        first, last = self._ends(segments)
        if step.end is not None:
            self.outputs.append(step.end)
        for node in last.leaves - first.needs:
            self.values.setdefault(node, Activations(self.walk.spill)).append(step.values[node])
        for node in first.needs - last.leaves:
            if self.values[node] is not self._keeps:
                self.values[node].release(sample)

    def _ends(self, segments: Sequence[Segment]) -> tuple[Segment, Segment]:
        """The first and the last of the pieces that a sample runs through now."""
        return segments[0], segments[1 if self.finishes and len(segments) == 2 else 0]
