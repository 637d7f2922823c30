"""Inputs of linears: which linears share an input tensor, and the second moments of that input.

Linears that receive the same tensor object form a fusion group (q/k/v, gate/up): they are found by the identity of
their input in a traced run, not by name, and share one second-moment matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmsqueeze.model.activations import Activations
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress.stopwatch import timed


@dataclass(frozen=True)
class FusionGroup:
    """Linears with one input, and how often each is called in one forward pass."""

    names: tuple[str, ...]
    calls: int


@dataclass
class Moments:
    """Per token: xtx = mean of y y^T [cols, cols]; drift = mean of (x - y) y^T, or None where x is y.

    y: the inputs that the linear will see; x: the original model's for the same tokens.
    """

    xtx: Tensor
    drift: Tensor | None


@dataclass(frozen=True)
class ResidualStreams:
    """The residual streams at a block's input: the original model's and the compressed model's.

    A stream that nobody needs is None; before the first block both may be the same object.
    """

    original: Activations | None = None
    compressed: Activations | None = None

    def advanced(
        self, walk: Walk, index: int, original: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> ResidualStreams:
        """The streams behind a resident block, whose weights are `original` and, compressed, `current`."""
        return ResidualStreams(
            advance(walk, index, self.original, original), advance(walk, index, self.compressed, current)
        )

    def clear(self) -> None:
        """Gives the memory of both back."""
        for stream in {id(s): s for s in (self.original, self.compressed) if s is not None}.values():
            stream.clear()


@timed("forward")
def fusion_groups(walk: Walk, index: int, hidden: Tensor) -> list[FusionGroup]:
    """The linears of a resident block in the order they are first called with `hidden` [1, length, width]."""
    seen: dict[str, list[Tensor]] = {}  # in the order of the first calls

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: seen.setdefault(name, []).append(args[0])

    names = walk.skeleton.linears[index]
    handles = [walk.skeleton.module(name).register_forward_pre_hook(noting(name)) for name in names]
    try:
        with torch.no_grad():
            walk.run(index, 0, hidden)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in seen.items():
        # the inputs are still referenced by `seen`, so equal ids mean one and the same tensor
        groups.setdefault(tuple(map(id, inputs)), []).append(name)
    return [FusionGroup(tuple(names), len(key)) for key, names in groups.items()]


@timed("moments")
def observe(
    walk: Walk,
    index: int,
    group: FusionGroup,
    streams: ResidualStreams,
    original: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
) -> Moments:
    """The moments of a fusion group's input over all samples.

    `original` and `current` hold the block's weights as stored by the modules: before compression, and as they now are.
    """
    x_of = None if streams.original is None else _Capture(walk, index, group, original, streams.original)
    y_of = x_of if streams.compressed is None else _Capture(walk, index, group, current, streams.compressed)
    if y_of is None:
        raise ValueError("the moments need one stream at least")
    drifting = streams.original is not streams.compressed or any(
        current[name] is not original[name] for name in current
    )
    cols = walk.skeleton.shape(group.names[0])[1]
    xtx = torch.zeros(cols, cols, dtype=walk.dtype, device=walk.device)
    drift = torch.zeros_like(xtx) if x_of is not None and streams.compressed is not None and drifting else None
    tokens = 0
    for sample in range(len(walk.samples)):
        y = y_of(sample)
        if not len(y):
            continue  # nothing of this sample reaches the group
        xtx.addmm_(y.T, y)
        tokens += len(y)
        if drift is not None and x_of is not None:
            drift.addmm_((x_of(sample) - y).T, y)
    return Moments(xtx.div_(tokens), None if drift is None else drift.div_(tokens))


def advance(walk: Walk, index: int, stream: Activations | None, weights: Mapping[str, Tensor]) -> Activations | None:
    """The stream behind a resident block that computes with `weights`; the old stream is left as it is."""
    if stream is None:
        return None
    with walk.skeleton.using(weights):
        return walk.through(index, stream)


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a block's forward pass once the group's inputs have been seen."""


@dataclass(frozen=True)
class _Capture:
    """Runs a block with given weights until a fusion group has seen its input."""

    walk: Walk
    index: int
    group: FusionGroup
    weights: Mapping[str, Tensor]
    stream: Activations

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
