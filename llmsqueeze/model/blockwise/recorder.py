"""One forward pass in which stubs replace all decoder blocks and record the arguments of each call."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, enable_grad, equal, nn, zeros_like
from torch.utils import _pytree as pytree

from llmsqueeze.errors import UnsupportedError


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block after the hidden states: positional ones and keywords (masks, rotary embeddings).

    takes: the dtype of the block's input, if it is not hidden states but tokens. called: whether the model calls the
    block at all. It leaves out blocks that look at images alone. links: leaf -> block and number, if the leaf is that
    output of the block beside its hidden states.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    called: bool = True
    links: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    takes: torch.dtype | None = None

    def sharing(self, first: BlockCall) -> BlockCall:
        """This call, with the tensors of `first` where they are equal, so that equal masks exist once."""
        return replace(self, args=_shared(first.args, self.args), kwargs=_shared(first.kwargs, self.kwargs))

    @property
    def leaves(self) -> list[Any]:
        """All that is in the arguments."""
        return pytree.tree_leaves((self.args, self.kwargs))


@dataclass(frozen=True)
class Returns:
    """What the blocks of a kind return: hidden states alone (container None), or first in what the container makes of a
    list. of_tokens: of a block that takes tokens, hidden states that it has returned."""

    container: Callable[[list[Any]], Any] | None = None
    others: tuple[Any, ...] = ()
    of_tokens: Tensor | None = None

    @classmethod
    def of(cls, output: Any) -> Returns:
        """From what a block of the kind has returned. Raises UnsupportedError if no hidden states are in it."""
        hidden_of(output)
        if isinstance(output, Tensor):
            return cls()
        return cls(container_of(output), tuple(values_of(output)[1:]))

    def holding(self, hidden: Tensor) -> Any:
        """What a block would return with these hidden states."""
        return hidden if self.container is None else self.container([hidden, *self.others])

    def copied(self) -> Returns:
        """The same with tensors of its own, marked like the hidden states (`Recorder`)."""
        with enable_grad():
            return replace(self, others=pytree.tree_map_only(Tensor, _marked, self.others))

    def passed_on(self, given: Tensor) -> Tensor:
        """What stands for the hidden states that a block would return, if it was given these, or these tokens."""
        like = self.of_tokens
        return given if like is None else like.new_zeros(*given.shape, *like.shape[given.dim() :])


def _marked(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient if it can, and so does all that is computed from it."""
    copy = tensor.detach().clone()
    return copy.requires_grad_(True).clone() if copy.is_floating_point() else copy


def kind_of(module: nn.Module) -> Hashable:
    """What blocks that return the same have in common: their class and the names of what they consist of."""
    return type(module), tuple(name for name, _ in module.named_modules())


def container_of(output: Any) -> Callable[[list[Any]], Any]:
    """What makes the like of `output`, which is no tensor, of a list: a tuple, a named one, a list, or an output of
    transformers."""
    if isinstance(output, OrderedDict):
        return partial(_named, type(output), tuple(output))
    kind: Any = type(output)
    return getattr(kind, "_make", list if isinstance(output, list) else tuple)


def _named(kind: Any, keys: Sequence[str], values: Sequence[Any]) -> Any:
    return kind(**dict(zip(keys, values, strict=True)))


def values_of(output: Any) -> Sequence[Any]:
    """What is in a block's output, which is no tensor: an output of transformers is a mapping."""
    return tuple(output.values()) if isinstance(output, OrderedDict) else output


def others_of(output: Any) -> list[Any]:
    """All that a block returns beside the hidden states, by number."""
    return [] if isinstance(output, Tensor) else pytree.tree_leaves(tuple(values_of(output)[1:]))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns. Raises UnsupportedError."""
    hidden = values_of(output)[0] if isinstance(output, tuple | list | OrderedDict) and output else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedError(f"a decoder block returns {type(output).__name__}, which does not begin with a tensor")
    return hidden


class UnknownBlock(Exception):  # noqa: N818 - no error
    """Ends a forward pass: the next block is of a kind of which it is not known what it returns."""

    def __init__(self, index: int, hidden: Tensor, call: BlockCall) -> None:
        super().__init__(index)
        self.index, self.hidden, self.call = index, hidden, call


class Recorder:
    """Replaces all blocks in one forward pass: each stub records its call and passes its input on."""

    def __init__(self, modules: Sequence[nn.Module], returns: Mapping[Hashable, Returns]) -> None:
        """returns: what the blocks of each kind return; the pass ends with UnknownBlock at another kind."""
        self.modules, self.returns = modules, returns
        self.calls: list[BlockCall] = []
        self.first_input: Tensor
        self._last: tuple[Tensor, int] | None = None
        # tensors beside the hidden states that stubs have returned, by identity; of which block, and their numbers
        self._others: dict[int, tuple[Tensor, tuple[int, int]]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the context the stubs are in place. Raises UnsupportedError if no block was called."""
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.enter_context(replaced(module, self._stub(index, first_parameter(type(module).forward))))
            yield
        if not self.calls:
            raise UnsupportedError("the decoder blocks are not called in a forward pass")
        self._leave_out(len(self.modules))

    def _leave_out(self, until: int) -> None:
        """The blocks before `until` of which there is no call yet are not called."""
        self.calls += [BlockCall(called=False)] * (until - len(self.calls))

    def _stub(self, index: int, name: str) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, *rest = args or (kwargs.pop(name, None),)
            if not isinstance(hidden, Tensor) or index < len(self.calls):
                raise UnsupportedError("the decoder blocks are not called in turn with the hidden states first")
            call = BlockCall(tuple(rest), kwargs, takes=None if hidden.is_floating_point() else hidden.dtype)
            call = replace(call, links=self._links(index, hidden, call))
            if not self.calls:
                self.first_input = hidden.detach().clone()  # the model may write over it
                with enable_grad():
                    hidden = _marked(hidden)  # all that the model computes from what blocks give is known by its mark
            returns = self.returns.get(kind_of(self.modules[index]))
            if returns is None:
                raise UnknownBlock(index, hidden.detach(), call)
            if call.takes is not None:
                with enable_grad():
                    hidden = _marked(returns.passed_on(hidden))
            self._last, returns = (hidden, hidden._version), returns.copied()
            for number, one in enumerate(pytree.tree_leaves(returns.others)):
                if isinstance(one, Tensor):
                    self._others[id(one)] = one, (index, number)
            self._leave_out(index)
            self.calls.append(call)
            return returns.holding(hidden)

        return stub

    def _links(self, index: int, hidden: Tensor, call: BlockCall) -> dict[int, tuple[int, int]]:
        """The links of a call. Raises UnsupportedError if the block gets more than outputs of earlier blocks."""
        if self._last is not None and (hidden is not self._last[0] or hidden._version != self._last[1]):
            raise UnsupportedError(
                f"the model changes the hidden states between decoder blocks {index - 1} and {index}; "
                "this architecture is not supported"
            )
        links = {at: self._others[id(leaf)][1] for at, leaf in enumerate(call.leaves) if id(leaf) in self._others}
        if any(
            isinstance(leaf, Tensor) and leaf.requires_grad and at not in links for at, leaf in enumerate(call.leaves)
        ):
            raise UnsupportedError(
                f"decoder block {index} gets more than the hidden states and outputs of earlier blocks; this "
                "architecture is not supported"
            )
        return links


@cache
def first_parameter(forward: Callable[..., Any]) -> str:
    """The name of the first argument of a class's `forward`: of a block it is the hidden states."""
    names = inspect.signature(forward).parameters
    return next((name for name in names if name != "self"), "hidden_states")


def needs_more(module: nn.Module) -> bool:
    """Whether a module's `forward` demands more than its first argument."""
    _, *others = (p for name, p in inspect.signature(type(module).forward).parameters.items() if name != "self")
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in others)


class Ended(Exception):  # noqa: N818 - no error
    """Ends a forward pass: all that was wanted of it is there."""


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """In the context `module` computes `forward` instead of its own."""
    before = vars(module).get("forward")  # of the module itself, not of its class
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def in_training(module: nn.Module) -> Iterator[None]:
    """In the context the module is in training mode, but drops nothing out: one with a backward pass of its own may
    refuse it in any other. The random numbers that it draws are those of nobody else."""
    modes, functions = [(one, one.training) for one in module.modules()], vars(nn.functional)
    dropout = functions["dropout"]
    module.train()
    functions["dropout"] = _all_kept
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        functions["dropout"] = dropout
        for one, mode in modes:
            one.training = mode


def _all_kept(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


@contextmanager
def skipped(
    modules: Sequence[nn.Module], returns: Mapping[Hashable, Returns], hidden: Tensor | None = None
) -> Iterator[None]:
    """In the context the blocks compute nothing: each gives its own input or, if `hidden` is given, the last one gives
    that and all others zeros. The model may write over what they give."""
    zeros = None if hidden is None else zeros_like(hidden)

    def giving(module: nn.Module, is_last: bool) -> Callable[..., Any]:
        name, form = first_parameter(type(module).forward), returns.get(kind_of(module), Returns())

        def forward(*args: Any, **kwargs: Any) -> Any:
            if zeros is None or hidden is None:
                return form.holding(args[0] if args else kwargs[name])
            return form.holding(hidden.clone() if is_last else zeros)

        return forward

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, giving(module, module is modules[-1])))
        yield


def _shared(old: Any, new: Any) -> Any:
    """`old` if it equals `new`, searched through tuples, lists and dicts."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and old.shape == new.shape and old.dtype == new.dtype and equal(old, new)
        return old if same else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(old.get(key), value) for key, value in new.items()}
    if type(new) in (tuple, list) and type(old) is type(new) and len(old) == len(new):
        return type(new)(_shared(a, b) for a, b in zip(old, new, strict=True))
    return new
