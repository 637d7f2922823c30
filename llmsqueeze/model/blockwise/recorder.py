"""One forward pass in which stubs replace all decoder blocks and record the arguments of each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal, nn

from llmsqueeze.errors import UnsupportedError


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block after the hidden states: positional ones and keywords (masks, rotary embeddings)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def sharing(self, first: BlockCall) -> BlockCall:
        """This call, with the tensors of `first` where they are equal, so that equal masks exist once."""
        return BlockCall(_shared(first.args, self.args), _shared(first.kwargs, self.kwargs))


class Recorder:
    """Replaces all blocks in one forward pass: each stub records its call and passes its input on."""

    def __init__(self, modules: list[nn.Module], returns_tuple: bool) -> None:
        self.modules, self.returns_tuple = modules, returns_tuple
        self.calls: list[BlockCall] = []
        self.first_input: Tensor
        self._last: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In the context the stubs are in place. Raises UnsupportedError if not every block was called."""
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                stack.enter_context(replaced(module, self._stub(index)))
            yield
        if len(self.calls) != len(self.modules):
            raise UnsupportedError(
                f"{len(self.calls)} of {len(self.modules)} decoder blocks were called in a forward pass"
            )

    @contextmanager
    def stopping_at_first(self) -> Iterator[None]:
        """In the context the call of the first block ends the forward pass. Raises UnsupportedError without a call."""

        def stub(*args: Any, **kwargs: Any) -> Tensor:
            self._stub(0)(*args, **kwargs)
            raise _Stop

        with replaced(self.modules[0], stub):
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
                    f"the model changes the hidden states between decoder blocks {index - 1} and {index}; "
                    "this architecture is not supported"
                )
            if index == 0:
                self.first_input = hidden
            self._last = hidden
            self.calls.append(BlockCall(tuple(args[1:]), kwargs))
            return (hidden,) if self.returns_tuple else hidden

        return stub


class _Stop(Exception):  # noqa: N818 - no error
    """Ends a forward pass after the first block's call."""


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
def skipped(modules: Sequence[nn.Module], returns_tuple: bool, hidden: Tensor | None = None) -> Iterator[None]:
    """In the context the blocks compute nothing: each gives `hidden`, or its own input if there is none."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = (args[0] if args else kwargs["hidden_states"]) if hidden is None else hidden
        return (given,) if returns_tuple else given

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, forward))
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
