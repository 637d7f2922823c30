"""The part of a model after its last decoder block, over slices of the vocabulary: whole logits never exist.

Final norm, soft caps and scales are the model's own: its forward runs with stubs in the place of the blocks and of the
head. A slice of logits has at most `LOGITS_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.recorder import replaced
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress.stopwatch import timed

LOGITS_BYTES = 64 << 20

OnHead = Callable[[slice, Tensor, Tensor], None]
BlocksGiving = Callable[[Tensor], AbstractContextManager[None]]


class Head:
    """Final norm and output head of a skeleton, computed in `dtype`. Call the methods inside `resident`.

    In the context `blocks_giving(hidden)` the last decoder block gives `hidden`.
    """

    def __init__(
        self, skeleton: Skeleton, blocks_giving: BlocksGiving, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.skeleton, self.dtype, self.device = skeleton, dtype, device
        self._blocks_giving = blocks_giving

    @contextmanager
    def resident(self) -> Iterator[None]:
        """In the context all parameters outside the blocks are real, except untied embeddings."""
        embeddings = f"{self._name_of(self.skeleton.model.get_input_embeddings())}.weight"
        stored = self.skeleton.tied.get(self.weight_name, self.weight_name)
        others = set(self.skeleton.names_outside_blocks()) - {stored, embeddings}
        with (
            self.skeleton.resident([stored], None, self.device),  # each slice is cast for its use
            self.skeleton.resident(others, self.dtype, self.device),
        ):
            yield

    @timed("backward")
    def gradient(
        self, hidden: Tensor, tokens: Tensor, draw: Tensor | None = None, on_head: OnHead | None = None
    ) -> tuple[float, Tensor]:
        """The mean next-token loss (nats) of `tokens` [1, length], and its gradient at `hidden` [1, length, width].

        `hidden` is the last block's output. With `draw` [length - 1], uniform in [0, 1), the gradient is of the loss
        on labels that the model draws, one number for each; the loss stays that of the text. Two passes over the
        vocabulary: one for the normaliser, one for the gradient. `on_head(part, probability, x)` gets the model's
        probabilities [length - 1, part] and the head's input [length - 1, width]; it must not keep them.
        """
        hidden = hidden.detach().requires_grad_(True)
        normed = self.final_norm(hidden)
        x = normed.detach()[:, :-1].requires_grad_(True)
        labels = tokens.to(self.device)[0, 1:]
        log_z, label_logits = self._normaliser(x, labels)
        slices = self._slices(labels.numel())
        draws = None if draw is None else LabelDraws(draw.to(log_z), slices[-1].stop - 1)
        gradient = torch.zeros_like(x)
        for part in slices:
            logits = self._logits(x, part)
            upstream = (logits.detach()[0] - log_z[:, None]).exp_()
            if on_head is not None:
                on_head(part, upstream, x.detach()[0])
            if draws is not None:
                labels = draws.over(upstream, part)
            inside = ((labels >= part.start) & (labels < part.stop)).nonzero()[:, 0]
            upstream[inside, labels[inside] - part.start] -= 1.0
            gradient += torch.autograd.grad(logits, x, upstream[None] / labels.numel())[0]
        padded = nn.functional.pad(gradient, (0, 0, 0, 1))  # the last token predicts nothing
        (at_hidden,) = torch.autograd.grad(normed, hidden, padded)
        return float((log_z - label_logits).mean()), at_hidden

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Next-token logits [length - 1, part] at `hidden`, the last block's output, slice by slice."""
        x = self.final_norm(hidden)[:, :-1]
        for part in self._slices(x.shape[1]):
            yield part, self._logits(x, part)[0]

    @timed("forward")
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The head's input [1, length, width] if the last block gives `hidden`."""
        inputs: list[Tensor] = []

        def head(value: Tensor) -> Tensor:
            inputs.append(value)
            return value[..., :1]

        self._model_tail(hidden, head)
        return inputs[0]

    @property
    def module(self) -> nn.Linear:
        """The head's linear. Raises UnsupportedError if it is none."""
        head = self.skeleton.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(f"the output head is {type(head).__name__}, not a linear layer")
        return head

    @property
    def weight_name(self) -> str:
        return f"{self._name_of(self.module)}.weight"

    @torch.no_grad()
    @timed("forward")
    def _normaliser(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The log of the softmax's denominator and the logit of each label, both [length - 1]."""
        log_z = torch.full(labels.shape, -torch.inf, dtype=self.dtype, device=self.device)
        label_logits = torch.zeros_like(log_z)
        for part in self._slices(labels.numel()):
            logits = self._logits(x, part)[0]
            log_z = torch.logaddexp(log_z, logits.logsumexp(dim=-1))
            inside = (labels >= part.start) & (labels < part.stop)
            label_logits[inside] = logits[inside, labels[inside] - part.start]
        return log_z, label_logits

    def _logits(self, x: Tensor, part: slice) -> Tensor:
        """Logits [1, tokens, part] as the model's forward returns them: soft caps and scales included."""
        head = self.module
        bias = None if head.bias is None else head.bias[part].to(self.dtype)
        raw = nn.functional.linear(x, head.weight[part].to(self.dtype), bias)
        return self._model_tail(x.detach(), lambda _: raw)

    def _model_tail(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        with replaced(self.module, head), self._blocks_giving(hidden):
            logits: Tensor = self.skeleton.model(inputs_embeds=hidden.detach(), use_cache=False).logits
        return logits

    def _slices(self, tokens: int) -> list[slice]:
        vocabulary = self.module.weight.shape[0]
        step = max(1, LOGITS_BYTES // (tokens * self.dtype.itemsize))
        return [slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]

    def _name_of(self, module: nn.Module) -> str:
        names: dict[int, str] = {id(other): name for name, other in self.skeleton.model.named_modules()}
        return names[id(module)]


class LabelDraws:
    """Draws a label for every position by inverting its distribution, a slice of the vocabulary at a time."""

    def __init__(self, draw: Tensor, last: int) -> None:
        """`draw` [positions] in [0, 1); `last` is the label if rounding leaves a number above the whole sum."""
        self.draw, self.below = draw, torch.zeros_like(draw)
        self.labels = torch.full(draw.shape, last, dtype=torch.int64, device=draw.device)
        self.open = torch.ones_like(draw, dtype=torch.bool)

    def over(self, probability: Tensor, part: slice) -> Tensor:
        """The labels [positions] after this slice; a label outside the slices so far is not drawn yet."""
        reached = probability.cumsum(dim=1).add_(self.below[:, None])
        here = self.open & (reached[:, -1] > self.draw)
        index = (reached <= self.draw[:, None]).sum(dim=1).clamp(max=probability.shape[1] - 1)
        self.labels = torch.where(here, part.start + index, self.labels)
        self.open &= ~here
        self.below = reached[:, -1].clone()
        return self.labels
