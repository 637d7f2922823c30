"""Where the parameters of a model come from: tensors of the checkpoint, as they are, or converted as on loading.

transformers renames tensors on loading, and may merge, join, split or transpose them (experts that a file holds one by
one and the model in one parameter). Its own operations do it here too, for one expert at a time if they allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError, first_line
from llmsqueeze.model.checkpoint import Checkpoint, StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

META = torch.device("meta")
Shape = tuple[int, ...]


class Source(Protocol):
    """Of a parameter: the names of the tensors that it is made of, its shape, its dtype, and how it is read."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """The parameter in its stored dtype. Raises CheckpointError."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as it is in the file."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> Stored:
        stored = checkpoint.tensors[name]
        return cls(name, stored.shape, stored.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        return checkpoint.read(self.name)


@dataclass(frozen=True)
class Compressed:
    """A parameter that the file holds in parts; it is given, not read."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    names: tuple[str, ...] = ()

    def read(self, checkpoint: Checkpoint) -> Tensor:
        raise CheckpointError(f"{checkpoint.path} holds a weight of shape {list(self.shape)} only in parts")


@dataclass(frozen=True)
class Converted:
    """What an operation of transformers makes of tensors. target: the parameter; first: the first one that the
    operation makes, by which transformers calls it; tensors: pattern of the operation -> names that match it."""

    converter: WeightConverter
    tensors: Mapping[str, tuple[str, ...]]
    target: str
    first: str
    config: Any
    shape: Shape
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for names in self.tensors.values() for name in names)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        return self._run(checkpoint.read, {self.target: self.shape})[self.target].contiguous()

    def read_expert(self, checkpoint: Checkpoint, index: int) -> Tensor:
        """Row `index` of the first dimension, from as little as the operation allows."""
        if not self._by_expert(checkpoint):
            return self.read(checkpoint)[index]
        return self._run_expert(checkpoint.read, checkpoint.read_rows, checkpoint.tensors, index)[0]

    def _by_expert(self, checkpoint: Checkpoint) -> bool:
        """Whether the operation gives one expert's matrix from that expert's tensors."""
        stored = checkpoint.tensors

        def rows_of(name: str, rows: slice) -> Tensor:
            return _empty(stored[name])[rows]

        try:
            one = self._run_expert(lambda name: _empty(stored[name]), rows_of, stored, 0)
        except CheckpointError:
            return False
        return tuple(one.shape) == (1, *self.shape[1:])

    def _run_expert(
        self,
        read: Callable[[str], Tensor],
        read_rows: Callable[[str, slice], Tensor],
        stored: Mapping[str, StoredTensor],
        index: int,
    ) -> Tensor:
        count = self.shape[0]
        tensors, reads = dict[str, tuple[str, ...]](), dict[str, Callable[[], Tensor]]()
        for pattern, names in self.tensors.items():
            name = names[index] if len(names) == count else names[0]
            if len(names) != count and (len(names) > 1 or stored[name].shape[:1] != (count,)):
                raise CheckpointError(f"{name} is not one of {count} experts, nor all of them")
            of_all = len(names) != count
            reads[name] = partial(read_rows, name, slice(index, index + 1)) if of_all else partial(read, name)
            tensors[pattern] = (name,)
        one = replace(self, tensors=tensors)
        return one._run(lambda name: reads[name](), {self.target: (1, *self.shape[1:])})[self.target]

    def _run(self, read: Callable[[str], Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Target -> tensor. Raises CheckpointError if the operation fails."""
        converter = deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                lazy: Any = partial(read, name)
                converter.add_tensor(self.first, name, pattern, lazy)
        try:
            converted = converter.convert(self.first, model=_Shapes(shapes), config=self.config)
        except CheckpointError:
            raise
        except Exception as error:  # the operations raise what torch raises
            raise CheckpointError(
                f"transformers cannot make {self.target} of {described(self.names)}: {first_line(error)}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(frozen=True)
class Slice:
    """The matrix [rows, cols] of one of `count` experts, whose matrices are one parameter. transposed: they lie in it
    as [cols, rows]."""

    whole: Stored | Converted
    index: int
    count: int
    transposed: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.whole.names

    @property
    def shape(self) -> Shape:
        rows, cols = self._lying
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def _lying(self) -> Shape:
        first, *rest = self.whole.shape
        return tuple(rest) if len(rest) == 2 else (first // self.count, *rest)

    def read(self, checkpoint: Checkpoint) -> Tensor:
        if isinstance(self.whole, Converted):
            matrix = self.whole.read_expert(checkpoint, self.index)
        else:
            rows = self.whole.shape[0] // self.count
            matrix = checkpoint.read_rows(self.whole.name, slice(self.index * rows, (self.index + 1) * rows))
        matrix = matrix.reshape(self._lying)
        return matrix.T.contiguous() if self.transposed else matrix.contiguous()


def find_sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Source]:
    """Parameter or buffer -> where it comes from, by the renamings and conversions that transformers applies on
    loading. Raises CheckpointError if a conversion does not fit the tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Source] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):  # the order in which a list is merged
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = name, None
        if renamed not in state:
            continue
        if pattern is None or (renamed == name and checkpoint.tensors[name].shape == state[name].shape):
            sources[renamed] = Stored.of(checkpoint, name)
        else:
            collected.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    for first, lists in collected.items():
        converter, tensors = by_pattern[next(iter(lists))], {p: tuple(names) for p, names in lists.items()}
        sources |= _conversions(model, checkpoint, converter, tensors, first)
    return {name: sources[name] for name in state if name in sources}


def _conversions(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    converter: WeightConverter,
    tensors: Mapping[str, tuple[str, ...]],
    first: str,
) -> dict[str, Converted]:
    """All that a conversion makes, by name; it runs on tensors without data."""
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtype = checkpoint.tensors[next(iter(tensors.values()))[0]].dtype
    trial = Converted(converter, tensors, first, first, model.config, shapes[first], dtype)
    converted = trial._run(lambda name: _empty(checkpoint.tensors[name]), shapes)
    return {
        name: replace(trial, target=name, shape=tuple(tensor.shape))
        for name, tensor in converted.items()
        if name in state
    }


class _Shapes:
    """What the operations of transformers ask of a model: its parameters' shapes."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device=META)


def _empty(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device=META)


def described(names: tuple[str, ...]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
