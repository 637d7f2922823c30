"""What the outer linears see: those around the blocks, and those that several blocks share.

They are compressed before the blocks, under the inputs that they get in the original model at every place where they
are called. What the model computes outside its blocks is run with stubs in their places: all that comes from a block is
known by its mark there, a gradient that it requires (recorder.py). So a call before the blocks is told from one behind
them, and no call counts twice.

A linear before the blocks is priced by the gradient that reaches it through what the first block gets as its hidden
states. One whose output goes into the other arguments of blocks alone has no price, like a linear that no text reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.measure.moments import Moments, SecondMoments
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.parallel.shares import Sums
from llmsqueeze.progress.stopwatch import timed

OnCall = Callable[[str, Tensor, Tensor], None]  # linear, its input, its output


class OuterInputs:
    """Sums up the inputs of outer linears over the samples of a walk, and the squared gradients of their outputs."""

    def __init__(self, walk: Walk, names: Sequence[str]) -> None:
        self.walk, self.names, self.sums = walk, list(names), Sums()
        self._xtx = {
            name: SecondMoments(walk.skeleton.shape(name)[1], walk.dtype, walk.device, self.sums, f"xtx {name}")
            for name in names
        }

    @timed("moments")
    def add(self, name: str, x: Tensor) -> None:
        """Takes the input [..., cols] of a call."""
        self._xtx[name].add(x.detach().reshape(-1, x.shape[-1]).to(self.walk.dtype))

    def add_with_gradient(self, sample: int, name: str, x: Tensor, output: Tensor) -> None:
        """Takes a call whose output a gradient reaches, of that sample's mean loss."""
        if output.requires_grad:
            rows, labels = self.walk.skeleton.shape(name)[0], self.walk.samples[sample].shape[1] - 1
            self.add(name, x)
            output.register_hook(partial(self._squares, name, rows, labels))

    def _squares(self, name: str, rows: int, labels: int, gradient: Tensor) -> None:
        squares = (gradient.detach().reshape(-1, rows) * labels).square_().sum(dim=0)
        self.sums.add(f"squares {name}", squares)

    @contextmanager
    def watching(self, on_call: OnCall) -> Iterator[None]:
        """In the context `on_call` hears of every call of the linears, whatever module of a shared one it is."""
        with ExitStack() as stack:
            for name in self.names:
                for module in self.walk.skeleton.sharing(name):
                    hook = partial(_hear, name, on_call)
                    stack.callback(self.walk.skeleton.module(module).register_forward_hook(hook).remove)
            yield

    @contextmanager
    def priced(self, sample: int) -> Iterator[None]:
        """In the context calls count whose outputs the gradient of a sample's loss reaches."""
        with self.watching(partial(self.add_with_gradient, sample)):
            yield

    def seen(self, sample: int) -> None:
        """All of a sample was added, of a part of the model."""
        if sample in self.walk.shares.ends:
            self.sums.fold(self.walk.shares.ends[sample])

    def moments(self) -> dict[str, Moments]:
        """Of the linears that a sample reached; nothing can be added afterwards."""
        moments = {}
        for name in [name for name in self.names if self._xtx[name].tokens]:
            xtx = self._xtx.pop(name)
            tokens, (mean, chance) = xtx.tokens, xtx.shrunk(xtx.mean())
            moments[name] = Moments(mean, {}, chance, tokens)
        return moments

    def squares(self, name: str) -> Tensor | None:
        """[rows]: the summed squared gradients at a linear's outputs; None if none reached them."""
        squares = self.sums.total().get(f"squares {name}")
        return None if squares is None else squares.to(self.walk.device)


def _hear(name: str, on_call: OnCall, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    on_call(name, args[0], output)


def outer_moments(walk: Walk, inputs: Activations, names: Sequence[str]) -> dict[str, Moments]:
    """The moments of the inputs of these linears in the original model. `inputs`: of the first block, for every
    sample; they stay."""
    seen, behind = OuterInputs(walk, names), set[str]()

    def before_blocks(name: str, x: Tensor, _output: Tensor) -> None:
        behind.add(name) if x.requires_grad else seen.add(name, x)

    with walk.resident_outside(), seen.watching(before_blocks):
        for sample in range(len(walk.samples)):
            walk.around_blocks(sample)
            seen.seen(sample)
    if behind or set(names) & set(walk.skeleton.shared):
        _see_blocks_and_behind(walk, inputs, seen)
    return seen.moments()


def _see_blocks_and_behind(walk: Walk, inputs: Activations, seen: OuterInputs) -> None:
    def in_block(name: str, x: Tensor, _output: Tensor) -> None:
        seen.add(name, x)

    def behind_blocks(name: str, x: Tensor, _output: Tensor) -> None:
        if x.requires_grad:
            seen.add(name, x)

    stream = inputs
    for index in range(len(walk.modules)):
        ahead = Activations(walk.spill)
        with walk.resident_block(index, then=index + 1), seen.watching(in_block), torch.no_grad():
            for sample, hidden in enumerate(stream.each(walk.device)):
                ahead.append(walk.run(index, sample, hidden))
                seen.seen(sample)
        if stream is not inputs:
            stream.clear()
        stream = ahead
    with walk.head.resident(), seen.watching(behind_blocks):
        for sample, hidden in enumerate(stream.each(walk.device)):
            walk.head.final_norm(hidden.requires_grad_(True), walk.samples[sample])
            seen.seen(sample)
    stream.clear()
