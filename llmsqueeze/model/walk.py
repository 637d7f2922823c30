"""The block walk: a model's forward and backward pass with the weights of one decoder block in memory at a time.

Forward: the model's own forward runs with every block replaced by a stub that passes its input on, which records
what each block is called with (masks, rotary embeddings) and checks that nothing happens between blocks. Then the
blocks run one by one on the kept activations. Backward: the loss gradient at the last block's output comes from the
model's own final norm and head, over slices of the vocabulary, so that whole logits never exist; then every block,
last to first, is run again under autograd from its kept input and hands its weight gradients over as they appear.

Memory: one block's weights (and one gradient), or the embeddings, or the head; one sample's activations inside a
block; the activations between blocks, spilled past a limit. Samples are token rows [1, length], one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.activations import Activations, Spill
from llmsqueeze.model.skeleton import Skeleton

LOGITS_BYTES = 64 << 20  # the size of one slice of logits

OnGradient = Callable[[str, Tensor], None]
OnLinear = Callable[[str, Tensor, Tensor], None]
OnHead = Callable[[slice, Tensor, Tensor], None]


@dataclass
class Call:
    """What a block is called with besides its input: positional rest and keywords."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Walk:
    """One walk over the samples of a calibration set. `dtype` is the dtype it computes in."""

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Sequence[Tensor],
        spill: Spill,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.skeleton, self.samples, self.spill = skeleton, samples, spill
        self.dtype, self.device = dtype, device
        self.modules = [skeleton.module(name) for name in skeleton.blocks]
        self._calls: list[list[Call]] = []  # [sample][block]
        for module in skeleton.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:  # computed when the model was built, such as rotary frequencies
                    setattr(module, name, buffer.to(device))
        self._returns_tuple = False

    def resident_block(self, index: int) -> Any:
        """Context in which the weights of block `index` are real."""
        names = self.skeleton.names_in(self.skeleton.blocks[index])
        return self.skeleton.resident(names, self.dtype, self.device)

    def embed(self) -> Activations:
        """The first block's input for every sample; records what every block is called with."""
        self._calls.clear()
        inputs = Activations(self.spill)
        self._returns_tuple = self._probe_output()
        with self._resident_outside(), torch.no_grad():
            for sample in self.samples:
                recorder = _Recorder(self.modules, self._returns_tuple)
                with recorder.installed():
                    self._forward(input_ids=sample.to(self.device))
                inputs.append(recorder.first_input.to(self.dtype))
                self._calls.append(self._share(recorder.calls))
        return inputs

    def run(self, index: int, sample: int, hidden: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Block `index` on `hidden` [1, length, width]; its weights must be resident, or given as `tensors`."""
        call = self._calls[sample][index]
        if tensors is None:
            output = self.modules[index](hidden, *call.args, **call.kwargs)
        else:
            output = torch.func.functional_call(self.modules[index], tensors, (hidden, *call.args), call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def through(self, index: int, inputs: Activations, tensors: dict[str, Tensor] | None = None) -> Activations:
        """Block `index` on every sample's input, as `run` does it, without gradients; `inputs` are left as they are."""
        outputs = Activations(self.spill)
        with torch.no_grad():
            for sample, hidden in enumerate(inputs.each(self.device)):
                outputs.append(self.run(index, sample, hidden, tensors))
        return outputs

    def head_gradient(
        self, hidden: Tensor, tokens: Tensor, draw: Tensor | None = None, on_head: OnHead | None = None
    ) -> tuple[float, Tensor]:
        """Mean next-token loss (nats) of `tokens` [1, length] and its gradient at `hidden`, the last block's output.

        With `draw` [length - 1], uniform in [0, 1), the gradient is that of the loss on labels which the model itself
        draws, one number each; the loss is the text's all the same. Call inside `resident_head`. Two passes over
        slices of the vocabulary: one for the normaliser, one for the gradient. `on_head(part, probability, x)` gets the
        model's probabilities [positions, part] and the head's input [positions, width]; it may not keep them.
        """
        head = self._head()
        hidden = hidden.detach().requires_grad_(True)
        normed = self._final_norm(hidden)
        x = normed.detach()[:, :-1].requires_grad_(True)
        labels = tokens.to(self.device)[0, 1:]
        slices = self._vocabulary_slices(labels.numel())
        log_z = torch.full(labels.shape, -torch.inf, dtype=self.dtype, device=self.device)
        picked = torch.zeros_like(log_z)
        with torch.no_grad():
            for part in slices:
                logits = self._logits(head, x, part)[0]
                log_z = torch.logaddexp(log_z, logits.logsumexp(dim=-1))
                inside = (labels >= part.start) & (labels < part.stop)
                picked[inside] = logits[inside, labels[inside] - part.start]
        gradient = torch.zeros_like(x)
        drawing = None if draw is None else _Drawing(draw.to(log_z), slices[-1].stop - 1)
        for part in slices:
            logits = self._logits(head, x, part)
            upstream = (logits.detach()[0] - log_z[:, None]).exp_()
            if on_head is not None:
                on_head(part, upstream, x.detach()[0])
            if drawing is not None:
                labels = drawing.over(upstream, part)
            inside = ((labels >= part.start) & (labels < part.stop)).nonzero()[:, 0]
            upstream[inside, labels[inside] - part.start] -= 1.0
            gradient += torch.autograd.grad(logits, x, upstream[None] / labels.numel())[0]
        padded = torch.nn.functional.pad(gradient, (0, 0, 0, 1))  # the last token predicts nothing
        (at_hidden,) = torch.autograd.grad(normed, hidden, padded)
        return float((log_z - picked).mean()), at_hidden

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Next-token logits [length - 1, part] at `hidden`, the last block's output, by slices of the vocabulary.

        Call inside `resident_head`.
        """
        head, x = self._head(), self._final_norm(hidden)[:, :-1]
        for part in self._vocabulary_slices(x.shape[1]):
            yield part, self._logits(head, x, part)[0]

    def block_gradient(
        self,
        index: int,
        sample: int,
        hidden: Tensor,
        upstream: Tensor,
        on_gradient: OnGradient | None = None,
        on_linear: OnLinear | None = None,
    ) -> Tensor:
        """Runs block `index` again from `hidden` and returns the gradient there, given that at its output.

        `on_gradient(linear, gradient)` gets each linear's weight gradient as stored, [rows, cols] or transposed for
        Conv1D; `on_linear(linear, x, gradient)` its input [1, length, cols] and the gradient at its output. Neither may
        keep what it gets. The weights must be resident.
        """
        hidden = hidden.detach().requires_grad_(True)
        handles = []
        for name in self.skeleton.linears[index]:
            if on_gradient is not None:
                weight = self.skeleton.linear(name).weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(_hand_over(name, on_gradient)))
            if on_linear is not None:
                handles.append(self.skeleton.module(name).register_forward_hook(_watch(name, on_linear)))
        try:
            with torch.enable_grad():
                self.run(index, sample, hidden).backward(upstream)
        finally:
            for handle in handles:
                handle.remove()
            for name in self.skeleton.linears[index]:
                self.skeleton.linear(name).weight.requires_grad_(False)
        assert hidden.grad is not None
        return hidden.grad

    @contextmanager
    def resident_head(self) -> Iterator[None]:
        """Context in which `head_gradient` may be called: everything outside the blocks but untied embeddings."""
        names = set(self.skeleton.names_outside_blocks())
        head = f"{self._head_name()}.weight"
        embeddings = f"{self._name_of(self.skeleton.model.get_input_embeddings())}.weight"
        own = self.skeleton.tied.get(head, head)
        with ExitStack() as stack:
            # the head stays in its own dtype; its slices are cast as they are used
            stack.enter_context(self.skeleton.resident([own], None, self.device))
            stack.enter_context(self.skeleton.resident(names - {own, embeddings}, self.dtype, self.device))
            yield

    def _resident_outside(self) -> Any:
        head = f"{self._head_name()}.weight"
        names = [name for name in self.skeleton.names_outside_blocks() if name != head]
        return self.skeleton.resident(names, self.dtype, self.device)

    def _forward(self, **inputs: Any) -> Any:
        with _replaced(self._head(), lambda hidden: hidden[..., :1]):
            return self.skeleton.model(**inputs, use_cache=False)

    def _probe_output(self) -> bool:
        """Whether blocks return a tuple: the first one is run once to see."""
        recorder = _Recorder(self.modules, returns_tuple=False)
        with self._resident_outside(), torch.no_grad(), recorder.stopping_at_first():
            self._forward(input_ids=self.samples[0].to(self.device))
        call = recorder.calls[0]
        with self.resident_block(0), torch.no_grad():
            output = self.modules[0](recorder.first_input.to(self.dtype), *call.args, **call.kwargs)
        return isinstance(output, tuple)

    def _share(self, calls: list[Call]) -> list[Call]:
        """`calls`, with whatever equals the first sample's replaced by that, so that equal masks exist once."""
        if not self._calls:
            return calls
        pairs = zip(self._calls[0], calls, strict=True)
        return [Call(_shared(old.args, new.args), _shared(old.kwargs, new.kwargs)) for old, new in pairs]

    def _final_norm(self, hidden: Tensor) -> Tensor:
        """What the model's forward makes of the last block's output before the head, [1, length, width]."""
        seen: list[Tensor] = []

        def head(value: Tensor) -> Tensor:
            seen.append(value)
            return value[..., :1]

        self._model_tail(hidden, head)
        return seen[0]

    def _logits(self, head: nn.Linear, x: Tensor, part: slice) -> Tensor:
        """Logits [1, tokens, part] as the model's forward returns them: soft caps and scales included."""
        bias = None if head.bias is None else head.bias[part].to(self.dtype)
        raw = torch.nn.functional.linear(x, head.weight[part].to(self.dtype), bias)
        return self._model_tail(x.detach(), lambda _: raw)

    def _model_tail(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(_replaced(self._head(), head))
            for module in self.modules:
                stack.enter_context(
                    _replaced(module, lambda _h, *_a, **_k: (hidden,) if self._returns_tuple else hidden)
                )
            output = self.skeleton.model(inputs_embeds=hidden.detach(), use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _vocabulary_slices(self, tokens: int) -> list[slice]:
        vocabulary = self._head().weight.shape[0]
        step = max(1, LOGITS_BYTES // (tokens * self.dtype.itemsize))
        return [slice(start, min(start + step, vocabulary)) for start in range(0, vocabulary, step)]

    def _head(self) -> nn.Linear:
        head = self.skeleton.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(f"the output head is {type(head).__name__}, not a linear layer")
        return head

    def _head_name(self) -> str:
        return self._name_of(self._head())

    def _name_of(self, wanted: nn.Module) -> str:
        names: dict[int, str] = {id(module): name for name, module in self.skeleton.model.named_modules()}
        return names[id(wanted)]


class _Recorder:
    """Stands in for all blocks in one forward pass: records calls, passes inputs on."""

    def __init__(self, modules: list[nn.Module], returns_tuple: bool) -> None:
        self.modules, self.returns_tuple = modules, returns_tuple
        self.calls: list[Call] = []
        self.first_input: Tensor
        self._last: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.enter_context(_replaced(module, self._stub(index)))
            yield
        if len(self.calls) != len(self.modules):
            raise UnsupportedError(
                f"{len(self.calls)} of {len(self.modules)} decoder blocks were called in a forward pass"
            )

    @contextmanager
    def stopping_at_first(self) -> Iterator[None]:
        def stub(*args: Any, **kwargs: Any) -> Tensor:
            self._stub(0)(*args, **kwargs)
            raise _Stop

        with _replaced(self.modules[0], stub):
            try:
                yield
            except _Stop:
                return
        raise UnsupportedError("the decoder blocks are not called in a forward pass")

    def _stub(self, index: int) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states", None),)
            hidden = args[0]
            if not isinstance(hidden, Tensor) or index != len(self.calls):
                raise UnsupportedError("the decoder blocks are not called in turn with the hidden states first")
            if index and hidden is not self._last:
                raise UnsupportedError(
                    f"something happens to the hidden states between decoder blocks {index - 1} and {index}; "
                    "this architecture is not handled"
                )
            if index == 0:
                self.first_input = hidden
            self._last = hidden
            self.calls.append(Call(tuple(args[1:]), kwargs))
            return (hidden,) if self.returns_tuple else hidden

        return stub


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass once what was wanted has been seen."""


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` instead of its own."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class _Drawing:
    """Draws a label for every position by inverting its distribution, a slice of the vocabulary at a time."""

    def __init__(self, draw: Tensor, last: int) -> None:
        """`draw` [positions] in [0, 1); `last` is the label where rounding leaves a number above all of the sum."""
        self.draw, self.below = draw, torch.zeros_like(draw)
        self.labels = torch.full(draw.shape, last, dtype=torch.int64, device=draw.device)
        self.open = torch.ones_like(draw, dtype=torch.bool)

    def over(self, probability: Tensor, part: slice) -> Tensor:
        """The labels [positions] as far as known; those beyond the slices seen so far lie behind them."""
        reached = probability.cumsum(dim=1).add_(self.below[:, None])
        here = self.open & (reached[:, -1] > self.draw)
        index = (reached <= self.draw[:, None]).sum(dim=1).clamp(max=probability.shape[1] - 1)
        self.labels = torch.where(here, part.start + index, self.labels)
        self.open &= ~here
        self.below = reached[:, -1].clone()
        return self.labels


def _watch(name: str, on_linear: OnLinear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        output.register_hook(lambda gradient: on_linear(name, x, gradient))

    return hook


def _hand_over(name: str, on_gradient: OnGradient) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        on_gradient(name, weight.grad)
        weight.grad = None  # one gradient at a time

    return hook


def _shared(old: Any, new: Any) -> Any:
    """`old` where it equals `new`, searched through tuples, lists and dicts."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if same else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(old.get(key), value) for key, value in new.items()}
    if (
        isinstance(new, (tuple, list))
        and type(old) is type(new)
        and len(old) == len(new)
        and type(new) in (tuple, list)
    ):
        return type(new)(_shared(a, b) for a, b in zip(old, new, strict=True))
    return new
