"""The block walk: a model's forward and backward pass with the weights of one decoder block in memory at a time.

Forward: the model's own forward runs with a stub in the place of every block. The stubs record the arguments of each
block (masks, rotary embeddings) and check that nothing happens between blocks (recorder.py). Then the blocks run one
by one on the kept activations. Backward: the gradient of the loss at the last block's output comes from the model's own
final norm and head (head.py). Then every block, last to first, runs again under autograd from its kept input, and gives
its weight gradients to a callback one at a time.

Memory: one block's weights (and one gradient), or the embeddings, or the head; one sample's activations inside a
block, or of as many as run at a time (parallel/threads.py); the activations between blocks, on disk beyond a limit.
Samples are token rows [1, length].
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError, first_line
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.attention import AttentionInPieces
from llmsqueeze.model.blockwise.handed import Layout, Outputs, board_in
from llmsqueeze.model.blockwise.head import Head
from llmsqueeze.model.blockwise.read_ahead import ReadAhead
from llmsqueeze.model.blockwise.recorder import (
    BlockCall,
    Ended,
    Recorder,
    Returns,
    UnknownBlock,
    first_parameter,
    hidden_of,
    in_training,
    kind_of,
    replaced,
    skipped,
)
from llmsqueeze.model.blockwise.trace import BlockTrace, given_tensors, structure_of, trace_block
from llmsqueeze.model.casting import is_plain, multiplied_in, plain_linear
from llmsqueeze.model.experts import linear as chunks
from llmsqueeze.model.experts.linear import ExpertLinear, Weight, plain, reading, real
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import Shares
from llmsqueeze.progress.stopwatch import timed

T = TypeVar("T")
OnGradient = Callable[[str, Tensor], None]
OnLinear = Callable[[str, Tensor, Tensor], None]
TRACE_TOLERANCE = 1e-4  # of a block's largest output: the trace may have chosen another kernel for attention


class Walk:
    """One walk over the samples of a calibration set. Call `embed` first.

    It computes in `dtype`; the linears of its blocks multiply in `products`, if that is another dtype.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Sequence[Tensor],
        spill: Spill,
        dtype: torch.dtype,
        device: torch.device,
        products: torch.dtype | None = None,
        shares: Shares | None = None,
    ) -> None:
        """shares: of all samples those that these are, if several processes share them."""
        self.skeleton, self.samples, self.spill = skeleton, samples, spill
        self.shares = shares or Shares.of(len(samples), 0, 1)
        self.dtype, self.device, self.products = dtype, device, products or dtype
        self.modules = [skeleton.module(name) for name in skeleton.blocks]
        self.head = Head(skeleton, self._blocks_giving, dtype, device)
        self.on_sample: Callable[[int, int], None] = lambda _done, _total: None  # hears of the samples of a step
        self._ahead = ReadAhead(skeleton.read)
        self._calls: list[list[BlockCall]] = []  # [sample][block]
        self.returns: dict[Hashable, Returns] = {}
        self._layouts: dict[tuple[int, int], Layout] = {}  # (block, sample) -> of the block's input, if it is packed
        self._trains: dict[Hashable, bool] = {}  # kinds of blocks; whether their backward pass is one of training
        self._compared: set[str] = set()  # the operations of traces that compute what their blocks compute
        for module in skeleton.model.modules():
            compute_as(module, dtype, device)
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:  # computed when the model was built, such as rotary frequencies
                    setattr(module, name, buffer.to(device))

    @property
    def count(self) -> int:
        """How many samples all processes have."""
        return self.shares.total

    @property
    def labels(self) -> int:
        """How many labels the losses of all samples are over."""
        return sum(self.of_all([tokens.shape[1] - 1 for tokens in self.samples]))

    def of_all(self, values: Sequence[T]) -> list[T]:
        """The values of all samples in their order, in all processes; each has those of its own samples."""
        return (
            list(values)
            if len(self.shares.numbers) == self.shares.total
            else processes.all_of(self.shares.numbers, values, self.shares.total)
        )

    @contextmanager
    def resident_block(self, index: int, then: int | None = None) -> Iterator[None]:
        """In the context the weights of block `index` are real, or read at every use if they are those of many experts.
        Meanwhile those of block `then` are read, if there is such a block: the next context should be its."""
        with (
            self.skeleton.resident(self._names_in(index), self.dtype, self.device, self._ahead.take),
            self._reading(index),
        ):
            if then is not None and 0 <= then < len(self.modules):
                self._ahead.start(self._names_in(then))
            yield

    def _names_in(self, index: int) -> list[str]:
        read_later = {f"{name}.weight" for name in self.read_at_use(index)}
        return [name for name in self.skeleton.names_used_by(self.skeleton.blocks[index]) if name not in read_later]

    def read_at_use(self, index: int) -> dict[str, ExpertLinear]:
        """The experts' linears of block `index`, if their weights take too much memory together; else none."""
        experts = self.skeleton.experts_in(index)
        return experts if self.experts_nbytes(index) > chunks.LEAST else {}

    def experts_nbytes(self, index: int) -> int:
        """Bytes of all experts' weights of block `index`, as the walk computes."""
        experts = self.skeleton.experts_in(index).values()
        return sum(one.in_features * one.out_features for one in experts) * self.dtype.itemsize

    @contextmanager
    def _reading(self, index: int) -> Iterator[None]:
        """In the context the linears of `read_at_use` read their weights."""

        def read(name: str) -> Tensor:
            return self.skeleton.read(f"{name}.weight").to(self.device, self.dtype)

        with ExitStack() as stack:
            for name, linear in self.read_at_use(index).items():
                product = partial(multiplied_in, self.products, linear) if self.products != self.dtype else plain
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                stack.enter_context(reading([(linear, partial(read, name))], like, product))
            yield

    @timed("forward")
    def embed(self) -> Activations:
        """The first block's input for every sample; records the arguments of every block."""
        self._calls.clear()
        self._layouts.clear()
        inputs = Activations(self.spill)
        self._learn_returns()
        with self.resident_outside(), torch.no_grad():
            for sample in self.samples:
                recorder = self._record(sample)
                inputs.append(recorder.first_input.to(self.dtype))
                first = self._calls[0] if self._calls else recorder.calls
                self._calls.append([new.sharing(old) for old, new in zip(first, recorder.calls, strict=True)])
        return inputs

    @timed("forward")
    def around_blocks(self, sample: int) -> None:
        """Runs what the model computes outside its blocks for a sample. Call it inside `resident_outside`, after
        `embed`."""
        self._record(self.samples[sample])

    def call(self, index: int, sample: int) -> BlockCall:
        """The arguments of block `index` for a sample."""
        return self._calls[sample][index]

    @timed("forward")
    def trace(self, index: int, inputs: Activations) -> BlockTrace | None:
        """The operations of the resident block `index`, the same for all samples; None if there is no such list.

        `inputs`: of the block, for every sample.
        """
        calls, hidden = [calls[index] for calls in self._calls], inputs.get(0, self.device)
        first = structure_of(calls[0])
        if not all(call.called for call in calls):
            return None
        if len({tokens.shape for tokens in self.samples}) > 1 or any(structure_of(call) != first for call in calls):
            return None
        linears = {name: self.skeleton.linear(name) for name in self.skeleton.linears[index]}
        trace = trace_block(self.modules[index], linears, calls[0], hidden, partial(self._compute, index, 0, None))
        if (layout := self._layouts.get((index + 1, 0))) is not None:  # what is traced packs alike for all samples
            self._layouts |= {(index + 1, sample): layout for sample in range(len(self.samples))}
        if trace is None or trace.graph.code in self._compared:
            return trace
        with torch.no_grad():
            computed = trace.run(hidden, given_tensors(calls[0]), self.linear)
            expected = self.run(index, 0, hidden)
        if not float((computed - expected).abs().max()) <= TRACE_TOLERANCE * float(expected.abs().max()):
            return None
        self._compared.add(trace.graph.code)
        return trace

    @timed("forward")
    def run(self, index: int, sample: int, hidden: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The output of block `index` for `hidden`, both [1, length, width], or packed with what earlier blocks hand to
        later ones (handed.py).

        The block's weights must be resident, or given as `tensors`.
        """
        call = self._calls[sample][index]
        with self._multiplying(index), AttentionInPieces():
            return self._compute(index, sample, tensors, hidden, call.args, call.kwargs)

    def run_part(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a module of the resident block `index` gives for these arguments."""
        with self._multiplying(index):
            return module(*args, **kwargs)

    def _compute(
        self,
        index: int,
        sample: int,
        tensors: dict[str, Tensor] | None,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """`run` with these arguments, which have the structure of the sample's own."""
        content, call = dict[str, dict[Any, Any]](), self._calls[sample][index]
        if (layout := self._layouts.get((index, sample))) is not None:
            hidden, content = layout.unpacked(hidden)
        on_board, outputs = content.get("board", {}), Outputs(self._calls[sample], content.get("outputs", {}))
        hidden = hidden if call.takes is None else hidden.to(call.takes)
        output: Any = hidden
        if call.called:
            args, kwargs = outputs.given(index, args, kwargs)
            board = board_in(call.leaves)
            if board is not None:
                board.update(on_board)
            try:
                if tensors is None:
                    output = self.modules[index](hidden, *args, **kwargs)
                else:
                    output = torch.func.functional_call(self.modules[index], tensors, (hidden, *args), kwargs)
                on_board = on_board if board is None else dict(board)
            finally:
                if board is not None:
                    board.clear()
        hidden = hidden_of(output)
        if index + 1 == len(self.modules):
            return hidden
        hidden, layout = Layout.of(hidden, {"board": on_board, "outputs": outputs.behind(index, output)})
        if layout is not None:
            self._layouts[index + 1, sample] = layout
        return hidden

    def layouts(self, index: int) -> dict[str, Any]:
        """How what block `index` gets is packed, by sample, as JSON; empty if it is hidden states alone."""
        of_block = {sample: layout for (at, sample), layout in self._layouts.items() if at == index}
        return {str(sample): layout.as_json() for sample, layout in sorted(of_block.items())}

    def restore_layouts(self, index: int, layouts: Mapping[str, Any]) -> None:
        """Takes over what `layouts` of another walk over the same samples gave."""
        self._layouts |= {(index, int(sample)): Layout.from_json(layout) for sample, layout in layouts.items()}

    def hidden_in(self, index: int, sample: int, given: Tensor) -> Tensor:
        """The hidden states in what block `index` gets, without what earlier blocks hand to later ones."""
        layout = self._layouts.get((index, sample))
        return given if layout is None else layout.unpacked(given)[0]

    def linear(self, name: str, x: Tensor, weight: Weight | None = None) -> Tensor:
        """What a linear of a resident block gives for x [..., cols]: [..., rows]. weight: in the place of its own, as
        the module stores it. Several threads may call this at once, if the linear is plain."""
        module: Any = self.skeleton.module(name)
        if not is_plain(module):
            with self.skeleton.using({} if weight is None else {name: weight}):
                result: Tensor = module(x)
            return result
        weight = module.weight if weight is None else real(weight)
        if self.products == self.dtype:
            return plain_linear(module, x, weight)
        return multiplied_in(self.products, module, x, weight)

    @contextmanager
    def _multiplying(self, index: int) -> Iterator[None]:
        """In the context the linears of block `index` multiply in `products`."""
        with ExitStack() as stack:
            if self.products != self.dtype:
                for module in map(self.skeleton.module, self.skeleton.linears[index]):
                    if is_plain(module) and "forward" not in vars(module):
                        stack.enter_context(replaced(module, partial(multiplied_in, self.products, module)))
            yield

    @timed("forward")
    def through(self, index: int, inputs: Activations, tensors: dict[str, Tensor] | None = None) -> Activations:
        """The outputs of block `index` for every sample, as `run` gives them, without gradients; `inputs` stay."""
        outputs = Activations(self.spill)
        with torch.no_grad():
            for sample, hidden in enumerate(inputs.each(self.device)):
                outputs.append(self.run(index, sample, hidden, tensors))
        return outputs

    @timed("backward")
    def block_gradient(
        self,
        index: int,
        sample: int,
        hidden: Tensor,
        upstream: Tensor,
        on_gradient: OnGradient | None = None,
        on_linear: OnLinear | None = None,
        of_weights: Container[str] | None = None,
    ) -> Tensor:
        """The gradient at the input `hidden` of block `index`, from the gradient `upstream` at its output.

        Both are [1, length, width]; the block runs again, and its weights must be resident.
        `on_gradient(linear, gradient)` gets the gradient of each linear's weight in the module's orientation:
        [rows, cols], transposed for Conv1D; of_weights: of these alone. `on_linear(linear, x, gradient)` gets the
        linear's input [1, length, cols] and the gradient at its output [tokens, rows]. Neither may keep its tensors.
        """
        mode = self.mode_of_backward(index, sample, hidden, upstream)
        hidden, read_later = hidden.detach().requires_grad_(True), self.read_at_use(index)
        handles = []
        for name in self.skeleton.linears[index]:
            wanted = on_gradient if of_weights is None or name in of_weights else None
            if wanted is not None and name in read_later:
                read_later[name].on_gradient = partial(wanted, name)
            elif wanted is not None:
                weight = self.skeleton.linear(name).weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(_gradient_hook(name, wanted)))
            if on_linear is not None:
                hook = _linear_hook(name, self.skeleton.shape(name)[0], on_linear)
                handles.append(self.skeleton.module(name).register_forward_hook(hook))
        try:
            with torch.enable_grad(), self._embeddings_with_gradient(index, sample), mode():
                self.run(index, sample, hidden).backward(upstream)
        finally:
            for handle in handles:
                handle.remove()
            for name in self.skeleton.linears[index]:
                if name in read_later:
                    read_later[name].on_gradient = None
                else:
                    self.skeleton.linear(name).weight.requires_grad_(False)
        return torch.zeros_like(hidden) if hidden.grad is None else hidden.grad  # tokens have none

    def mode_of_backward(
        self, index: int, sample: int, hidden: Tensor, upstream: Tensor
    ) -> Callable[[], AbstractContextManager[None]]:
        """The mode in which blocks of this kind have a backward pass, tried once for every kind: mostly that of the
        forward pass. Raises UnsupportedError if they have none."""
        module, kind, hidden = self.modules[index], kind_of(self.modules[index]), hidden.detach().requires_grad_(True)
        modes: list[Callable[[], AbstractContextManager[None]]] = [nullcontext, partial(in_training, module)]
        if kind not in self._trains:
            for trains, mode in enumerate(modes):
                try:
                    with torch.enable_grad(), self._embeddings_with_gradient(index, sample), mode():
                        self.run(index, sample, hidden).backward(upstream)
                except AssertionError as error:  # of a backward pass of its own
                    if trains:
                        raise UnsupportedError(f"the blocks have no backward pass: {first_line(error)}") from error
                else:
                    self._trains[kind] = bool(trains)
                    break
        return modes[self._trains[kind]]

    @contextmanager
    def _embeddings_with_gradient(self, index: int, sample: int) -> Iterator[None]:
        """In the context what the embeddings give requires a gradient, if block `index` takes tokens."""
        with ExitStack() as stack:
            if self._calls[sample][index].takes is not None:
                embeddings: Any = self.skeleton.model.get_input_embeddings()
                hook = embeddings.register_forward_hook(lambda _module, _args, rows: rows.requires_grad_(True).clone())
                stack.callback(hook.remove)
            yield

    @timed("backward")
    def embedding_gradient(self, sample: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What the embeddings give for a sample [1, length, width], and the gradient there, from the gradient at the
        first block's input. Whatever the model does between the two is its own. Call it inside `resident_outside`."""
        given: list[Tensor] = []
        inputs: list[Tensor] = []

        def leaf(_module: nn.Module, _args: Any, rows: Tensor) -> Tensor:
            given.append(rows.detach().requires_grad_(True))
            return given[-1].clone()  # the model may write over it

        first = next(module for module, call in zip(self.modules, self._calls[sample], strict=True) if call.called)

        def first_block(*args: Any, **kwargs: Any) -> Tensor:
            inputs.append(args[0] if args else kwargs[first_parameter(type(first).forward)])
            raise Ended

        hook = self.skeleton.model.get_input_embeddings().register_forward_hook(leaf)
        try:
            with torch.enable_grad(), suppress(Ended), replaced(first, first_block):
                self.skeleton.model(input_ids=self.samples[sample].to(self.device), use_cache=False)
        finally:
            hook.remove()
        (at_embeddings,) = torch.autograd.grad(inputs[0], given[0], gradient)
        return given[0].detach(), at_embeddings

    def _blocks_giving(self, hidden: Tensor) -> AbstractContextManager[None]:
        """In the context the last block gives `hidden`."""
        called = [module for module, call in zip(self.modules, self._calls[0], strict=True) if call.called]
        return skipped(called, self.returns, hidden)

    @contextmanager
    def resident_outside(self) -> Iterator[None]:
        """In the context all that embedding needs is real. Plain tables of embeddings stay in their stored dtype, and
        the rows that are looked up are cast: in float32 they would be the most memory of a run."""
        names = {name for name in self.skeleton.names_around_blocks() if name != self.head.weight_name}
        with ExitStack() as stack:
            tables = set()
            for name in names:
                module = self.skeleton.module(name.rpartition(".")[0])
                if type(module).forward is nn.Embedding.forward:  # others compute with their table
                    tables.add(name)
                    hook = module.register_forward_hook(lambda _module, _args, rows: rows.to(self.dtype))
                    stack.callback(hook.remove)
            stack.enter_context(self.skeleton.resident(tables, None, self.device))
            stack.enter_context(self.skeleton.resident(names - tables, self.dtype, self.device))
            yield

    def _record(self, tokens: Tensor) -> Recorder:
        """The calls of all blocks for a sample. Raises UnknownBlock; what is outside the blocks must be resident."""
        recorder = Recorder(self.modules, self.returns)

        def head(_: Tensor) -> Tensor:
            raise Ended

        with recorder.installed(), suppress(Ended), replaced(self.head.module, head), torch.enable_grad():
            self.skeleton.model(input_ids=tokens.to(self.device), use_cache=False)
        return recorder

    def _learn_returns(self) -> None:
        """Runs one block of each kind once, to see what it returns."""
        alike: dict[type, Returns] = {}
        while True:
            try:
                with self.resident_outside(), torch.no_grad():
                    self._record(self.samples[0])
            except UnknownBlock as unknown:
                module = self.modules[unknown.index]
                returns = self._returned(unknown, alike.get(type(module)))
                alike[type(module)] = self.returns[kind_of(module)] = returns
            else:
                return

    def _returned(self, unknown: UnknownBlock, alike: Returns | None) -> Returns:
        """What a block returns. alike: what another kind of its class returns, which is taken if it is hidden states
        alone, or if the block cannot run without what blocks before it would put on a board."""
        if alike is not None and not alike.others:
            return alike
        module, call = self.modules[unknown.index], unknown.call
        try:
            with self.resident_block(unknown.index), torch.no_grad():
                hidden = unknown.hidden.to(self.dtype if call.takes is None else call.takes)
                output = module(hidden, *call.args, **call.kwargs)
                of_tokens = None if call.takes is None else hidden_of(output)
                return replace(Returns.of(output), of_tokens=of_tokens)
        except KeyError:
            if alike is None:
                raise
            return alike
        finally:
            if (board := board_in(call.leaves)) is not None:
                board.clear()


def compute_as(module: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a model of transformers, or a part of one, say that it computes in `dtype` on `device`, whatever its
    parameters are: most have no data, and the first of them would tell."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        kind: Any = module.__class__
        module.__class__ = _computing(getattr(kind, "computes_as", kind), dtype, device)


@cache
def _computing(kind: Hashable, dtype: torch.dtype, device: torch.device) -> Any:
    base: Any = kind
    says = {"computes_as": base, "dtype": property(lambda _: dtype), "device": property(lambda _: device)}
    return type(base.__name__, (base,), says)


def _linear_hook(name: str, rows: int, on_linear: OnLinear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """The output may have its rows in several dimensions: those of each group of inputs in one of their own."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        if output.requires_grad:  # what is computed without gradients has none
            output.register_hook(lambda gradient: on_linear(name, x, gradient.reshape(-1, rows)))

    return hook


def _gradient_hook(name: str, on_gradient: OnGradient) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        on_gradient(name, weight.grad)
        weight.grad = None  # one gradient at a time

    return hook
