"""The part of a model after its last decoder block, some tokens or a slice of the vocabulary at a time.

Final norm, soft caps and scales are the model's own: its forward runs with stubs in the place of the blocks, of the
head, and of the embeddings, whose table is not read: they give zeros. A model that needs its embeddings behind its
blocks gives another result with ones, and gets them. The logits that exist at a time have at most `LOGITS_BYTES`. They
become probabilities, and these the gradient, in one place in memory; the weight is cast some rows at a time. A head
that gets more than one vector for each token computes whole logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.blockwise.recorder import Ended, replaced
from llmsqueeze.model.linears import output_head
from llmsqueeze.model.logits import raw_logits, room_for_logits, rows_at_a_time, slices_within
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress.stopwatch import timed

LOGITS_BYTES = 64 << 20
DRAWN_BYTES = 8 << 20  # of the distributions that are drawn from at a time

OnHead = Callable[[Tensor, Tensor], None]
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
        self._ends_with_linear = False  # as far as it is known
        self._needs_embeddings: bool | None = None
        self._behind = torch.empty(0), torch.empty(0)  # the last hidden states, and their tokens

    @contextmanager
    def resident(self) -> Iterator[None]:
        """In the context all parameters outside the blocks are real, except untied embeddings."""
        stored = self.skeleton.tied.get(self.weight_name, self.weight_name)
        others = set(self.skeleton.names_around_blocks()) - {stored, self._table}
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
        on labels that the model draws, one number for each; the loss stays that of the text. `on_head(probability, x)`
        gets the model's probabilities [some, vocabulary] and the head's input [some, width] of some tokens at a time,
        of all but the last; it must not keep them.
        """
        hidden = hidden.detach().requires_grad_(True)
        normed, labels = self.final_norm(hidden, tokens), tokens.to(self.device)[0, 1:]
        if normed.shape[:-1] != tokens.shape:
            return self._whole_gradient(hidden, normed, labels, draw, on_head)
        x = normed.detach()[0, :-1]
        gradient, loss = torch.zeros_like(normed), 0.0  # the last token predicts nothing
        tokens_at_once = self._tokens(len(labels))
        room = room_for_logits(tokens_at_once[0].stop, len(self.module.weight), x)
        for part in tokens_at_once:
            logits, leaf = self._after_linear(x[part], raw_logits(self.module, x[part], room))
            of_text = logits.detach().gather(1, labels[part, None])[:, 0]
            probability, log_z = softmax_(logits if leaf is None else logits.detach().clone())
            loss += float((log_z - of_text).sum())
            if on_head is not None:
                on_head(probability, x[part])
            drawn = labels[part] if draw is None else drawn_labels(probability, draw[part].to(self.device))
            upstream = probability.scatter_add_(1, drawn[:, None], torch.full_like(log_z, -1.0)[:, None])
            if leaf is not None:
                (upstream,) = torch.autograd.grad(logits, leaf, upstream)
            self._through_weight(upstream.div_(len(labels)), out=gradient[0, part])
        (at_hidden,) = torch.autograd.grad(normed, hidden, gradient)
        return loss / len(labels), at_hidden

    def _whole_gradient(
        self, hidden: Tensor, normed: Tensor, labels: Tensor, draw: Tensor | None, on_head: OnHead | None
    ) -> tuple[float, Tensor]:
        """`gradient` for a head that gets other than one vector for each token: from whole logits. `on_head` gets the
        first vector of each token."""
        head = self.module
        bias = None if head.bias is None else head.bias.to(self.dtype)
        with torch.enable_grad():
            raw = nn.functional.linear(normed, head.weight.to(self.dtype), bias)
            logits = self._model_tail(*self._behind, lambda _: raw)[0, :-1]
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = float(losses.detach().mean())
            probability = logits.detach().softmax(dim=1)
            if on_head is not None:
                on_head(probability, normed.detach().flatten(0, -2)[: len(labels)])
            if draw is not None:
                drawn = drawn_labels(probability, draw.to(self.device))
                losses = nn.functional.cross_entropy(logits, drawn, reduction="none")
            (at_hidden,) = torch.autograd.grad(losses.mean(), hidden)
        return loss, at_hidden

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Next-token logits [length - 1, part] at `hidden`, the last block's output, slice by slice.

        tokens: [1, length], which only a model asks for that needs its embeddings behind its blocks.
        """
        normed = self.final_norm(hidden, tokens)
        if normed.shape[0] != 1 or normed.dim() != 3:
            raise UnsupportedError(
                "the output head gets more than one vector for each token; its logits have no slices"
            )
        for part in self._slices(normed.shape[1] - 1):
            yield part, self._logits(normed[:, :-1], part)[0]

    @timed("forward")
    def final_norm(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The head's input, mostly [1, length, width], if the last block gives `hidden`."""
        if tokens is None:
            tokens = torch.zeros(1, hidden.shape[-2], dtype=torch.long)
        self._behind = hidden, tokens.to(self.device)
        if self._needs_embeddings is None:
            self._needs_embeddings = False
            with torch.no_grad():
                zeros, ones = (self._head_input(value) for value in (0.0, 1.0))
            self._needs_embeddings = not torch.equal(zeros, ones)
        return self._head_input()

    def _head_input(self, embedding: float = 0.0) -> Tensor:
        inputs: list[Tensor] = []

        def head(value: Tensor) -> Tensor:
            inputs.append(value)
            raise Ended

        with suppress(Ended):
            self._model_tail(*self._behind, head, embedding)
        return inputs[0]

    @property
    def module(self) -> nn.Linear:
        """The head's linear. Raises UnsupportedError if it is none."""
        head = output_head(self.skeleton.model)
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(f"the output head is {type(head).__name__}, not a linear layer")
        return head

    @property
    def weight_name(self) -> str:
        return f"{self._name_of(self.module)}.weight"

    def _after_linear(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [tokens, vocabulary] as the model's forward returns them, soft caps and scales included, and the leaf
        that they are derived from; None if they are `raw`, as in most models. The first call finds out."""
        if self._ends_with_linear:
            return raw, None
        with torch.enable_grad():
            leaf = raw.requires_grad_(True)
            given = leaf[None].clone()
            logits = self._model_tail(self._behind[0].detach(), self._behind[1], lambda _: given)
            self._ends_with_linear = logits is given and given._version == 0
        return (raw.detach(), None) if self._ends_with_linear else (logits[0], leaf)

    def _through_weight(self, upstream: Tensor, out: Tensor) -> None:
        """Adds the gradient at the head's input, from `upstream` [tokens, vocabulary] at its output, to `out`."""
        weight = self.module.weight
        for part in rows_at_a_time(self.module, self.dtype):
            out.addmm_(upstream[:, part], weight[part].to(self.dtype))

    def _logits(self, x: Tensor, part: slice) -> Tensor:
        """Logits [1, tokens, part] as the model's forward returns them: soft caps and scales included."""
        head = self.module
        bias = None if head.bias is None else head.bias[part].to(self.dtype)
        raw = nn.functional.linear(x, head.weight[part].to(self.dtype), bias)
        return self._model_tail(self._behind[0].detach(), self._behind[1], lambda _: raw)

    def _model_tail(
        self, hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], embedding: float = 0.0
    ) -> Tensor:
        """The model's logits if its last block gives `hidden` and its head computes `head`."""
        with (
            self._weight_in_dtype(),
            replaced(self.module, head),
            self._blocks_giving(hidden),
            self._embedding(embedding),
        ):
            logits: Tensor = self.skeleton.model(input_ids=tokens, use_cache=False).logits
        return logits

    @contextmanager
    def _weight_in_dtype(self) -> Iterator[None]:
        """In the context the head's weight is zeros that take no memory: a model may cast to its dtype."""
        parameters, zero = self.module._parameters, torch.zeros((), dtype=self.dtype, device=self.device)
        weight = cast(nn.Parameter, self.module.weight)
        parameters["weight"] = nn.Parameter(zero.expand(weight.shape), requires_grad=False)
        try:
            yield
        finally:
            parameters["weight"] = weight

    @contextmanager
    def _embedding(self, value: float) -> Iterator[None]:
        """In the context the embeddings give `value`, or themselves if the model needs them."""
        embeddings: Any = self.skeleton.model.get_input_embeddings()

        def given(ids: Tensor, *_: Any) -> Tensor:
            return torch.full((*ids.shape, embeddings.weight.shape[1]), value, dtype=self.dtype, device=self.device)

        with ExitStack() as stack:
            if not self._needs_embeddings:
                stack.enter_context(replaced(embeddings, given))
            else:
                if embeddings.weight.is_meta:  # not tied to the head
                    stack.enter_context(self.skeleton.resident([self._table], None, self.device))
                hook = embeddings.register_forward_hook(lambda _module, _args, rows: rows.to(self.dtype))
                stack.callback(hook.remove)
            yield

    @property
    def _table(self) -> str:
        """The name of the embeddings' weight as it is stored."""
        name = f"{self._name_of(self.skeleton.model.get_input_embeddings())}.weight"
        return self.skeleton.tied.get(name, name)

    def _slices(self, tokens: int) -> list[slice]:
        """Of the vocabulary, so that the logits of so many tokens stay within the limit."""
        return slices_within(len(self.module.weight), tokens * self.dtype.itemsize, LOGITS_BYTES)

    def _tokens(self, count: int) -> list[slice]:
        """Of so many tokens, so that their logits stay within the limit."""
        return slices_within(count, len(self.module.weight) * self.dtype.itemsize, LOGITS_BYTES)

    def _name_of(self, module: nn.Module) -> str:
        names: dict[int, str] = {id(other): name for name, other in self.skeleton.model.named_modules()}
        return names[id(module)]


def softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [tokens, vocabulary] in the memory of the logits, and the log of the denominator [tokens]."""
    largest = logits.amax(dim=1)
    probability = logits.sub_(largest[:, None]).exp_()
    total = probability.sum(dim=1)
    return probability.div_(total[:, None]), total.log_().add_(largest)


def drawn_labels(probability: Tensor, draw: Tensor) -> Tensor:
    """Labels [tokens] drawn by inverting each distribution [tokens, vocabulary] at `draw` [tokens] in [0, 1)."""
    labels = []
    for part in slices_within(len(draw), probability.shape[1] * probability.itemsize, DRAWN_BYTES):
        reached = probability[part].cumsum(dim=1)
        labels.append(torch.searchsorted(reached, draw[part, None].to(reached), right=True)[:, 0])
    # rounding may leave a number above the whole sum
    return torch.cat(labels).clamp_(max=probability.shape[1] - 1)
