"""One forward pass in which stubs replace all decoder blocks and record the arguments of each call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, enable_grad, equal, nn, zeros_like
from torch.utils import _pytree as pytree

from llmsqueeze.errors import UnsupportedError


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block after the hidden states: positional ones and keywords (masks, rotary embeddings).

    called: whether the model calls the block at all. It leaves out blocks that look at images alone.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    called: bool = True

    def sharing(self, first: BlockCall) -> BlockCall:
        """This call, with the tensors of `first` where they are equal, so that equal masks exist once."""
        return BlockCall(_shared(first.args, self.args), _shared(first.kwargs, self.kwargs), self.called)

    @property
    def leaves(self) -> list[Any]:
        """All that is in the arguments."""
        return pytree.tree_leaves((self.args, self.kwargs))


@dataclass(frozen=True)
class Returns:
    """What the blocks of a class return: hidden states alone (container None), or first in a tuple or a list."""

    container: type[tuple[Any, ...]] | type[list[Any]] | None = None
    others: tuple[Any, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Returns:
        """From what a block of the class has returned. Raises UnsupportedError if no hidden states are in it."""
        hidden_of(output)
        if isinstance(output, Tensor):
            return cls()
        return cls(list if isinstance(output, list) else tuple, tuple(output[1:]))

    def holding(self, hidden: Tensor) -> Any:
        """What a block would return with these hidden states."""
        return hidden if self.container is None else self.container([hidden, *self.others])


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns. Raises UnsupportedError."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise UnsupportedError(f"a decoder block returns {type(output).__name__}, which does not begin with a tensor")
    return hidden


class UnknownBlock(Exception):  # noqa: N818 - no error
    """Ends a forward pass: the next block is of a class of which it is not known what it returns."""

    def __init__(self, index: int, hidden: Tensor, call: BlockCall) -> None:
        super().__init__(index)
        self.index, self.hidden, self.call = index, hidden, call


class Recorder:
    """Replaces all blocks in one forward pass: each stub records its call and passes its input on."""

    def __init__(self, modules: Sequence[nn.Module], returns: Mapping[type, Returns]) -> None:
        """returns: what the blocks of each class return; the pass ends with UnknownBlock at another class."""
        self.modules, self.returns = modules, returns
        self.calls: list[BlockCall] = []
        self.first_input: Tensor
        self._last: tuple[Tensor, int] | None = None
        self._others: dict[int, Tensor] = {}  # tensors beside the hidden states that stubs have returned

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
            call = BlockCall(tuple(rest), kwargs)
            self._check(index, hidden, call)
            if not self.calls:
                self.first_input = hidden.detach().clone()  # the model may write over it
                with enable_grad():  # marks all that the model computes from what blocks give
                    hidden = hidden.detach().requires_grad_(True).clone()
            returns = self.returns.get(type(self.modules[index]))
            if returns is None:
                raise UnknownBlock(index, hidden.detach(), call)
            self._last = hidden, hidden._version
            self._others |= {id(one): one for one in pytree.tree_leaves(returns.others) if isinstance(one, Tensor)}
            self._leave_out(index)
            self.calls.append(call)
            return returns.holding(hidden)

        return stub

    def _check(self, index: int, hidden: Tensor, call: BlockCall) -> None:
        if self._last is not None and (hidden is not self._last[0] or hidden._version != self._last[1]):
            raise UnsupportedError(
                f"the model changes the hidden states between decoder blocks {index - 1} and {index}; "
                "this architecture is not supported"
            )
        if any(id(leaf) in self._others or (isinstance(leaf, Tensor) and leaf.requires_grad) for leaf in call.leaves):
            raise UnsupportedError(
                f"decoder block {index} gets more than the hidden states from earlier blocks; this architecture is "
                "not supported"
            )


@cache
def first_parameter(forward: Callable[..., Any]) -> str:
    """The name of the first argument of a class's `forward`: of a block it is the hidden states."""
    names = inspect.signature(forward).parameters
    return next((name for name in names if name != "self"), "hidden_states")


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
def skipped(
    modules: Sequence[nn.Module], returns: Mapping[type, Returns], hidden: Tensor | None = None
) -> Iterator[None]:
    """In the context the blocks compute nothing: each gives its own input or, if `hidden` is given, the last one gives
    that and all others zeros. The model may write over what they give."""
    zeros = None if hidden is None else zeros_like(hidden)

    def giving(module: nn.Module, is_last: bool) -> Callable[..., Any]:
        name, form = first_parameter(type(module).forward), returns.get(type(module), Returns())

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
