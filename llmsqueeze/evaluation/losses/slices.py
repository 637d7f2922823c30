"""A model's logits over slices of tokens, so that the logits of a whole batch never exist.

The model computes the input of its head for a batch at once. The logits of some tokens are then the head's product with
a slice of that, and what the model's own forward does after the head (soft caps, scales): it runs with stubs in the
place of the decoder blocks. A trial on a few tokens compares this with the model's own logits. If they differ, or if
head or blocks are not found, the model computes whole logits, which are then sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.blockwise.attention import AttentionInPieces
from llmsqueeze.model.blockwise.recorder import Returns, kind_of, replaced, skipped
from llmsqueeze.model.linears import find_blocks, output_head
from llmsqueeze.model.logits import raw_logits, room_for_logits

TRIAL_TOKENS = 8
TOLERANCE = 1e-4  # of the largest logit: a slice of the head may be added up in another order


class Logits(Protocol):
    """The two steps from tokens to logits."""

    def states(self, tokens: Tensor) -> Tensor:
        """[rows, length, any width] for `tokens` [rows, length]: what `logits` needs of each token."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits [tokens, vocabulary] for `states` [tokens, any width]; the next call may overwrite them."""
        ...


class WholeLogits:
    """The states are the logits themselves."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, tokens: Tensor) -> Tensor:
        with AttentionInPieces():
            logits: Tensor = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits
        return logits

    def logits(self, states: Tensor) -> Tensor:
        return states


class SlicedLogits:
    """The states are the inputs of the head. Raises UnsupportedError for a model without head or blocks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        head = output_head(model)
        if not isinstance(head, nn.Module):
            raise UnsupportedError(f"{type(model).__name__} has no output head")
        self.head = head
        self.head_forward: Callable[[Tensor], Tensor] = head.forward
        self.blocks = [model.get_submodule(name) for name in find_blocks(model)]
        self.returns: dict[Hashable, Returns] = {}
        self._room: Tensor | None = None

    def states(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens.to(self.model.device), lambda x: x[..., :1])[0]

    def logits(self, states: Tensor) -> Tensor:
        raw = self._raw(states)[:, None]
        tokens = torch.zeros(len(states), 1, dtype=torch.long, device=self.model.device)
        with skipped(self.blocks, self.returns):
            return self._forward(tokens, lambda _: raw)[1][:, 0]

    def _raw(self, states: Tensor) -> Tensor:
        """What the head gives for states [tokens, width]: [tokens, vocabulary], in one place for all slices if the head
        is a plain linear on a CPU."""
        head: Any = self.head
        plain = type(head) is nn.Linear and head.weight.device.type == states.device.type == "cpu"
        if not plain or states.dtype != torch.float32:
            return self.head_forward(states)
        if self._room is None or len(self._room) < len(states):
            self._room = room_for_logits(len(states), len(head.weight), states)
        return raw_logits(head, states, self._room)

    def agrees(self, tokens: Tensor) -> bool:
        """Whether the slices are the logits that the model itself gives for `tokens` [rows, length]."""

        def observe(module: nn.Module, _args: Any, output: Any) -> None:
            self.returns[kind_of(module)] = Returns.of(output)

        observers = [block.register_forward_hook(observe) for block in self.blocks]
        try:
            states, whole = self._forward(tokens.to(self.model.device), self.head_forward)
        finally:
            for observer in observers:
                observer.remove()
        difference = (self.logits(states.flatten(0, 1)) - whole.flatten(0, 1)).abs().max()
        return bool(difference <= TOLERANCE * whole.abs().max())

    def _forward(self, tokens: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The head's input, and what the model returns as logits, if its head computes `head`."""
        inputs: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            inputs.append(x)
            return head(x)

        with replaced(self.head, forward), AttentionInPieces():
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        (states,) = inputs
        return states, logits


@torch.no_grad()
def sliced(model: Any, tokens: Tensor) -> Logits:
    """The way to the logits of `model`; some of `tokens` [rows, length] are for the trial."""
    try:
        slices = SlicedLogits(model)
        agrees = slices.agrees(tokens[:1, :TRIAL_TOKENS])
    except (UnsupportedError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return WholeLogits(model)  # an architecture that calls its head or its blocks in its own way
    return slices if agrees else WholeLogits(model)
