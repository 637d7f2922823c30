"""What blocks hand to later blocks beside the hidden states, in a mapping that all of them get (keys and values of
attention that later blocks use again). Between blocks it is packed behind the hidden states, in one tensor, so that
every stream of activations has its own.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from llmsqueeze.errors import UnsupportedError


@dataclass(frozen=True)
class Layout:
    """How hidden states and the content of a mapping lie in one tensor: the shapes of all, and their structure."""

    shapes: tuple[torch.Size, ...]
    structure: Any

    @classmethod
    def of(cls, hidden: Tensor, content: dict[Any, Any]) -> tuple[Tensor, Layout | None]:
        """The hidden states with the content behind them, and how they lie; alone, with None, if there is none.

        Raises UnsupportedError if the content is not tensors of the same dtype.
        """
        values, structure = pytree.tree_flatten(content)
        if not values:
            return hidden, None
        if not all(isinstance(value, Tensor) and value.dtype == hidden.dtype for value in values):
            raise UnsupportedError("decoder blocks hand something to later blocks that is no tensor in their dtype")
        tensors = [hidden, *values]
        shapes = tuple(tensor.shape for tensor in tensors)
        return torch.cat([tensor.reshape(-1) for tensor in tensors]), cls(shapes, structure)

    def as_json(self) -> list[Any]:
        """For a journal; `from_json` makes the same layout of it."""
        return [[list(shape) for shape in self.shapes], pytree.treespec_dumps(self.structure)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Layout:
        shapes, structure = value
        return cls(tuple(torch.Size(shape) for shape in shapes), pytree.treespec_loads(structure))

    def unpacked(self, packed: Tensor) -> tuple[Tensor, dict[Any, Any]]:
        """The hidden states and the content."""
        parts = packed.split([shape.numel() for shape in self.shapes])
        hidden, *values = (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
        content: dict[Any, Any] = pytree.tree_unflatten(values, self.structure)
        return hidden, content


def board_in(leaves: Sequence[Any]) -> MutableMapping[Any, Any] | None:
    """The mapping among a block's arguments, if there is one. Plain dicts are none: each block gets its own."""
    return next((leaf for leaf in leaves if isinstance(leaf, MutableMapping) and not isinstance(leaf, dict)), None)
