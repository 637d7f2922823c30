"""The residual streams of a run, and the moments of what the linears of a group get from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from llmsqueeze.measure.moments import FusionGroup, Moments, OutputPulls, Pulls, SecondMoments
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.linear import Weight, real
from llmsqueeze.model.linears import as_rows
from llmsqueeze.parallel.shares import Sums
from llmsqueeze.progress.stopwatch import timed

NO_OUTPUTS: Mapping[str, Tensor] = MappingProxyType({})
Weights = Mapping[str, Weight]  # linear -> its weight, as the module stores it


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


class GroupMoments:
    """The moments of a group's inputs, sample by sample. adds: its one linear's output is added to the stream."""

    def __init__(self, walk: Walk, group: FusionGroup, original: Weights, drifting: bool, adds: bool = False) -> None:
        self.shares, self.sums = walk.shares, Sums()
        self.xtx = SecondMoments(walk.skeleton.shape(group.names[0])[1], walk.dtype, walk.device, self.sums)
        weights = {
            name: as_rows(walk.skeleton.module(name), real(original[name]))
            for name in group.names
            if drifting and name in original
        }
        self.pulls = Pulls(weights, self.sums) if drifting and not adds else None
        self.of_outputs = {
            name: OutputPulls(weight, self.sums) for name, weight in weights.items() if drifting and adds
        }

    @timed("moments")
    def add(
        self, x: Tensor | None, y: Tensor, outputs: Mapping[str, Tensor] = NO_OUTPUTS, apart: Tensor | None = None
    ) -> None:
        """Inputs [tokens, cols] of the original and the compressed model for the same tokens; outputs: what linears of
        the original model give for x, as far as it is known; apart [tokens, rows]: how far the streams are apart to
        which the output is added."""
        self.xtx.add(y)
        if self.pulls is not None and x is not None:
            self.pulls.add(x, y, {name: output.reshape(len(x), -1) for name, output in outputs.items()})
        for pulls in self.of_outputs.values():
            assert x is not None, "two streams drift"
            pulls.add(x, y, apart)

    def probe_with(self, probes: Tensor) -> None:
        """Takes the probes [PROBES, cols] that other groups have too, to tell how much is chance."""
        self.xtx.chance.probe_with(probes)
        if self.pulls is not None:
            self.pulls.probe_with(probes)

    def seen(self, sample: int) -> None:
        """All of a sample was added."""
        if sample in self.shares.ends:
            self.sums.fold(self.shares.ends[sample])

    @timed("moments")
    def mean(self) -> Moments:
        """Nothing can be added afterwards."""
        xtx, tokens = self.xtx.mean(), self.xtx.tokens
        pulls = {} if self.pulls is None else self.pulls.mean(tokens, xtx)
        pulls |= {name: of_output.mean(tokens) for name, of_output in self.of_outputs.items()}
        shrunk, chance = self.xtx.shrunk(xtx)
        return Moments(shrunk, pulls, chance, tokens)


def drifting(streams: ResidualStreams, original: Weights, current: Weights) -> bool:
    """Whether the two streams differ before the next group, with the weights as they were and as they are."""
    if streams.original is None or streams.compressed is None:
        return False
    return streams.original is not streams.compressed or any(current[name] is not original[name] for name in current)
