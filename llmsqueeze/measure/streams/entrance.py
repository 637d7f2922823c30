"""What the experts of a block get if they are too many to be in memory together.

The module that holds them runs alone, again and again, from the arguments that it gets in the block, which are kept
like other activations. Each time only some experts compute, and the others give zeros: no expert's input depends on
what another one gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmsqueeze.measure.moments import FusionGroup
from llmsqueeze.measure.streams.residual import Weights
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.recorder import Ended
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.linear import chunk_nbytes, idle, real
from llmsqueeze.model.experts.routing import sent_to_all

Inputs = dict[tuple[str, ...], Tensor]  # fusion group -> what it gets from a sample [tokens, cols]


def in_chunks(
    walk: Walk, index: int, groups: Sequence[FusionGroup], before: Sequence[str], drifting: bool
) -> list[list[FusionGroup]]:
    """The groups of a pool, as many at a time as may be in memory: their moments and weights, and the weights of the
    same experts in the stacks `before` it. All together, if the block's weights are in memory anyway."""
    if not walk.read_at_use(index):
        return [list(groups)]
    room, chunks, taken = chunk_nbytes(walk.experts_nbytes(index)), list[list[FusionGroup]](), 0
    for group in groups:
        shapes = [walk.skeleton.shape(name) for name in group.names]
        cols = shapes[0][1]
        own = cols * cols + (cols * cols + sum(rows * cols for rows, cols in shapes) if drifting else 0)
        others = sum(rows * cols for rows, cols in map(walk.skeleton.shape, of_experts([group], before)))
        nbytes = (own + others * (2 if drifting else 1)) * walk.dtype.itemsize
        if not chunks or taken + nbytes > room:
            chunks.append([])
            taken = 0
        chunks[-1].append(group)
        taken += nbytes
    return chunks


def of_experts(groups: Sequence[FusionGroup], stacks: Sequence[str]) -> list[str]:
    """The linears in these stacks of the experts of groups."""
    numbers = [group.names[0].rpartition(".")[2] for group in groups]
    return [f"{stack}.{number}" for stack in stacks for number in numbers]


def entrance(walk: Walk, index: int, pool: Sequence[str], hidden: Tensor) -> nn.Module | None:
    """The module that holds the stacks of a pool, if there is one, and if the block calls it once for `hidden` [1,
    length, width], its input."""
    owners = {stack.rpartition(".")[0] for stack in pool}
    if len(owners) > 1:
        return None
    module, calls = walk.skeleton.module(owners.pop()), list[int]()
    handle = module.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    try:
        with torch.no_grad(), idle(walk.skeleton.experts_in(index).values()):
            walk.run(index, 0, hidden)
    finally:
        handle.remove()
    return module if len(calls) == 1 else None


class Entrance:
    """The arguments of the module that holds a pool, for every sample of one stream, whose block computes with
    `weights`. all_experts: every token goes to all."""

    def __init__(
        self, walk: Walk, index: int, module: nn.Module, stream: Activations, weights: Weights, all_experts: bool
    ) -> None:
        self._walk, self._index, self._module, self._all = walk, index, module, all_experts
        self._stream, self._weights = stream, weights
        self._tensors = Activations(walk.spill)
        self._calls: dict[int, tuple[list[Any], Any]] = {}  # leaves, of which tensors are `_Kept`, and their structure

    def note(self, sample: int) -> None:
        """Runs the block on a sample up to the module."""

        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            self._calls[sample] = [self._keep(leaf) for leaf in leaves], structure
            raise Ended

        walk = self._walk
        handles = sent_to_all(walk.modules[self._index]) if self._all else []
        handles.append(self._module.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            with suppress(Ended), walk.skeleton.using(self._weights), torch.no_grad():
                walk.run(self._index, sample, self._stream.get(sample, walk.device))
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        self._tensors.append(leaf)
        return _Kept(len(self._tensors) - 1)

    def inputs(self, groups: Sequence[FusionGroup], sample: int, weights: Mapping[str, Tensor]) -> Inputs:
        """What groups of the pool get from a sample; those that get nothing are left out. weights: of the linears of
        their experts that compute; all others give zeros."""
        walk, (leaves, structure) = self._walk, self._calls[sample]
        given = [self._tensors.get(one.at, walk.device) if isinstance(one, _Kept) else one for one in leaves]
        args, kwargs = pytree.tree_unflatten(given, structure)
        others = (linear for name, linear in walk.skeleton.experts_in(self._index).items() if name not in weights)
        seen = Inputs()
        with seeing(walk, groups, seen), idle(others), walk.skeleton.using(weights), torch.no_grad():
            walk.run_part(self._index, self._module, args, kwargs)
        return seen

    def clear(self) -> None:
        self._tensors.clear()


class _Kept:
    """The place of a tensor among those that are kept."""

    def __init__(self, at: int) -> None:
        self.at = at


def seeing(walk: Walk, groups: Sequence[FusionGroup], seen: Inputs) -> ExitStack:
    """In the context `seen` gets what the groups get; what is empty is left out."""

    def note(names: tuple[str, ...], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].numel():
            seen[names] = args[0].reshape(-1, args[0].shape[-1])

    stack = ExitStack()
    for group in groups:
        module = walk.skeleton.module(group.names[0])
        stack.callback(module.register_forward_pre_hook(partial(note, group.names)).remove)
    return stack


def weights_of(names: Sequence[str], weights: Weights) -> dict[str, Tensor]:
    """The weights of linears, read."""
    return {name: real(weights[name]) for name in names if name in weights}
