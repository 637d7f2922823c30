"""The parts of compressed weights, kept like activations until they are written: those of many experts take too much
memory together."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.tensors.shard import Later
from llmsqueeze.parts import Part, Spec

CPU = torch.device("cpu")


class KeptParts(Sequence[Part]):
    """The parts of a weight of `shape` [rows, cols]; each is read when it is asked for."""

    def __init__(self, shape: tuple[int, int], weight_parts: Sequence[Part], spill: Spill) -> None:
        self._shape, self._tensors = shape, Activations(spill)
        self._parts: list[tuple[Spec, dict[str, int]]] = []
        for part in weight_parts:
            places = {}
            for name, tensor in part.tensors().items():
                places[name] = len(self._tensors)
                self._tensors.append(tensor)
            self._parts.append((part.spec(), places))
        weakref.finalize(self, self._tensors.clear)

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> list[Part]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        spec, places = self._parts[index]
        return parts.restore(self._shape, spec, {name: self.tensor(index, name) for name in places})

    @property
    def later(self) -> list[PartLater]:
        """The parts, with tensors that are read when they are needed."""
        return [PartLater(self._shape, spec, self, i) for i, (spec, _) in enumerate(self._parts)]

    def tensor(self, index: int, name: str) -> Tensor:
        """A tensor of a part."""
        return self._tensors.get(self._parts[index][1][name], CPU)


@dataclass(frozen=True)
class PartLater:
    """Part `index` of `of`, a weight of `shape`."""

    shape: tuple[int, int]
    about: Spec
    of: KeptParts
    index: int

    def spec(self) -> Spec:
        return self.about

    def tensors(self) -> dict[str, Later]:
        layout = parts.layout(self.shape, self.about)
        return {name: Later(*one, partial(self.of.tensor, self.index, name)) for name, one in layout.items()}
