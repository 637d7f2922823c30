"""Experts in compressed-tensors: one by one, under the names that the Hub's files give them.

Everything but the file itself has an expert's matrix under the name of its linear, `P.<expert>`. In the file it is one
linear or several, each with some of its rows: gate and up apart. `llmsqueeze.json` says how they are called:

    "experts_stored_as": {"model.layers.0.mlp.experts.gate_up_proj": [
      ["model.layers.0.mlp.experts.{}.gate_proj", 768], ["model.layers.0.mlp.experts.{}.up_proj", 768]]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.checkpoint import Checkpoint, StoredTensor
from llmsqueeze.model.tensors.shard import Stored, present

KEY = "experts_stored_as"
SHAPE = "weight_shape"
TENSOR = re.compile(r"(?P<stack>.+)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)")
StoredAs = Mapping[str, Sequence[tuple[str, int]]]  # stack -> names with {} for the expert's number, and their rows
NO_EXPERTS: StoredAs = MappingProxyType({})


def split(tensors: Mapping[str, Stored], experts: StoredAs) -> dict[str, Stored]:
    """The tensors as the file has them."""
    return {stored: part for name, tensor in tensors.items() for stored, part in _parts(name, tensor, experts)}


def _parts(name: str, tensor: Stored, experts: StoredAs) -> Iterator[tuple[str, Stored]]:
    match = TENSOR.fullmatch(name)
    if match is None or match["stack"] not in experts:
        yield name, tensor
        return
    first = 0
    for template, rows in experts[match["stack"]]:
        stored = f"{template.format(match['expert'])}.{match['leaf']}"
        if match["leaf"] == SHAPE:
            yield stored, torch.tensor([rows, int(present(tensor)[1])])
        else:
            yield stored, tensor[first : first + rows]
        first += rows


def joined_tensors(stored: Mapping[str, Tensor], experts: StoredAs) -> dict[str, Tensor]:
    """The tensors that `split` took apart."""
    tensors, own = dict(stored), dict[str, list[Tensor]]()
    for name, (linear, leaf) in names_in_file(stored, experts).items():
        own.setdefault(f"{linear}.{leaf}", []).append(tensors.pop(name))
    return tensors | {name: (_joined_shape if _is_shape(name) else torch.cat)(pieces) for name, pieces in own.items()}


def stored_names(name: str, experts: StoredAs) -> list[str]:
    """What a tensor is called in the file, in pieces if it is an expert's."""
    match = TENSOR.fullmatch(name)
    if match is None or match["stack"] not in experts:
        return [name]
    return [f"{template.format(match['expert'])}.{match['leaf']}" for template, _ in experts[match["stack"]]]


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every expert's tensors under the names of its linear, if its record says that they are
    called otherwise."""
    experts = experts_of(read_record(checkpoint.path))
    if not experts:
        return checkpoint
    tensors, own = dict(checkpoint.tensors), dict[str, list[str]]()
    for stored, (linear, leaf) in names_in_file(checkpoint.tensors, experts).items():
        own.setdefault(f"{linear}.{leaf}", []).append(stored)
    for name, pieces in own.items():
        tensors[name] = _joined(name, [(piece, tensors.pop(piece)) for piece in pieces])
    return replace(checkpoint, tensors=tensors)


def names_in_file(stored: Iterable[str], experts: StoredAs) -> dict[str, tuple[str, str]]:
    """Name of a tensor of an expert in the file -> its linear and the tensor, in the order of the linear's rows."""
    templates = {template: (stack, at) for stack, pieces in experts.items() for at, (template, _) in enumerate(pieces)}
    places: dict[str, tuple[int, str, str]] = {}
    for name in stored:
        for match in re.finditer(r"\.(\d+)\.", name):
            rest, _, leaf = name[match.end() :].rpartition(".")
            template = f"{name[: match.start()]}.{{}}.{rest}"
            if template in templates:
                stack, at = templates[template]
                places[name] = at, f"{stack}.{match[1]}", leaf
    return {name: (linear, leaf) for name, (_, linear, leaf) in sorted(places.items(), key=lambda one: one[1][0])}


def _joined(name: str, pieces: Sequence[tuple[str, StoredTensor]]) -> StoredTensor:
    first, sizes = pieces[0][1], [stored.shape for _, stored in pieces]
    if any(stored.shape[1:] != first.shape[1:] or stored.file != first.file for _, stored in pieces):
        raise CheckpointError(f"{pieces[0][0]} and the others that make {name} do not belong together")
    of_shapes = _is_shape(name)
    shape = first.shape if of_shapes else (sum(size[0] for size in sizes), *first.shape[1:])
    names = tuple(piece for piece, _ in pieces)
    return StoredTensor(first.file, shape, first.dtype, names, _joined_shape if of_shapes else torch.cat)


def _is_shape(name: str) -> bool:
    return name.endswith(f".{SHAPE}")


def _joined_shape(shapes: Sequence[Tensor]) -> Tensor:
    return torch.stack([sum((one[0] for one in shapes), torch.zeros_like(shapes[0][0])), shapes[0][1]])


def experts_of(record: Mapping[str, Any]) -> StoredAs:
    """What a folder's record says of its experts; empty if nothing."""
    stored: StoredAs = record.get(KEY) or {}
    return stored


def pieces_of(linears: Iterable[str], experts: StoredAs) -> dict[str, list[tuple[str, int]]]:
    """Linear of an expert -> the linears in the file that have its rows, and how many each has."""
    pieces = {}
    for linear in linears:
        stack, _, number = linear.rpartition(".")
        if stack in experts:
            pieces[linear] = [(template.format(number), rows) for template, rows in experts[stack]]
    return pieces
