"""What blocks hand to later blocks beside the hidden states: in a mapping that all of them get (keys and values of
attention that later blocks use again), or as outputs that the model gives to later blocks. Between blocks it is packed
behind the hidden states, in one tensor, so that every stream of activations has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.blockwise.recorder import BlockCall, others_of
from llmsqueeze.model.tensors.shard import DTYPES

Content = dict[Any, Any]
DTYPES_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Layout:
    """How hidden states and what is handed on lie in one tensor: the shapes and dtypes of all, and their structure."""

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    structure: Any

    @classmethod
    def of(cls, hidden: Tensor, content: Content) -> tuple[Tensor, Layout | None]:
        """The hidden states with the content behind them, and how they lie; alone, with None, if there is none.

        Integers lie there as numbers of the hidden states' dtype: in float32 those below 2^24, as indices are.
        Raises UnsupportedError if the content is not tensors, or of a floating-point dtype that is another.
        """
        values, structure = pytree.tree_flatten(content)
        if not values:
            return hidden, None
        if any(not isinstance(x, Tensor) or (x.dtype != hidden.dtype and x.is_floating_point()) for x in values):
            raise UnsupportedError("decoder blocks hand something to later blocks that is no tensor in their dtype")
        tensors = [hidden, *values]
        shapes, dtypes = tuple(x.shape for x in tensors), tuple(x.dtype for x in tensors)
        return torch.cat([x.reshape(-1).to(hidden.dtype) for x in tensors]), cls(shapes, dtypes, structure)

    def as_json(self) -> list[Any]:
        """For a journal; `from_json` makes the same layout of it."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        nested = pytree.tree_unflatten([0] * (len(self.shapes) - 1), self.structure)
        return [[list(shape) for shape in self.shapes], dtypes, _plain(nested)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Layout:
        """Raises ValueError, TypeError or KeyError for what `as_json` never gives. torch's own reader of structures
        would import the modules that they name."""
        shapes, dtypes, plain = value
        structure = pytree.tree_structure(_nested(plain))
        if not structure.num_leaves == len(shapes) - 1 == len(dtypes) - 1:
            raise ValueError("a layout has a shape and a dtype for each of its tensors")
        return cls(tuple(torch.Size(shape) for shape in shapes), tuple(DTYPES_BY_NAME[d] for d in dtypes), structure)

    def unpacked(self, packed: Tensor) -> tuple[Tensor, Content]:
        """The hidden states and the content."""
        parts = packed.split([shape.numel() for shape in self.shapes])
        lie = zip(parts, self.shapes, self.dtypes, strict=True)
        hidden, *values = (part.view(shape).to(dtype) for part, shape, dtype in lie)
        content: Content = pytree.tree_unflatten(values, self.structure)
        return hidden, content


def _plain(nested: Any) -> Any:
    """Dicts, lists and tuples of leaves as JSON: a leaf is 0."""
    if isinstance(nested, dict):
        return ["dict", *([key, _plain(one)] for key, one in nested.items())]
    if isinstance(nested, list | tuple):
        return ["list" if isinstance(nested, list) else "tuple", *map(_plain, nested)]
    return 0


def _nested(plain: Any) -> Any:
    """What `_plain` was given."""
    if plain == 0:
        return 0
    kind, *inside = plain
    if kind == "dict":
        return {key: _nested(one) for key, one in inside}
    return {"list": list, "tuple": tuple}[kind](map(_nested, inside))


def board_in(leaves: Sequence[Any]) -> MutableMapping[Any, Any] | None:
    """The mapping among a block's arguments, if there is one. Plain dicts are none: each block gets its own."""
    return next((leaf for leaf in leaves if isinstance(leaf, MutableMapping) and not isinstance(leaf, dict)), None)


class Outputs:
    """The outputs of blocks beside their hidden states that the model gives to later ones, as `BlockCall.links` tells.

    calls: of all blocks, for one sample.
    """

    def __init__(self, calls: Sequence[BlockCall], content: Mapping[str, Tensor]) -> None:
        self._calls, self._content = calls, content

    def given(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block with the outputs of earlier ones in their places; None is one that was not given."""
        if not (links := self._calls[index].links):
            return args, kwargs
        leaves, structure = pytree.tree_flatten((args, kwargs))
        for at, link in links.items():
            leaves[at] = self._content.get(_key(*link))
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return args, kwargs

    def behind(self, index: int, output: Any) -> dict[str, Tensor]:
        """What later blocks need, if a block has returned `output`."""
        content = dict(self._content) | {_key(index, at): one for at, one in enumerate(others_of(output))}
        needed = {_key(*link) for call in self._calls[index + 1 :] for link in call.links.values()}
        return {key: content[key] for key in sorted(needed & content.keys()) if isinstance(content[key], Tensor)}


def _key(block: int, number: int) -> str:
    return f"{block}.{number}"
