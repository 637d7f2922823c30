"""A GGUF file of the same model, in which tensors are replaced: read, and its tensors matched with ours.

How the converter turned a tensor is found by comparing values, never by names. For a weight W [rows, cols] of ours and
a tensor B of the base with the same shape:

    columns:  sum_r W[r, c]  is the same in every order of the rows; the nearest B by it is its counterpart
    rows:     W P and B P, P [cols, PROJECTIONS] random: row b of B is the row of W whose projection is nearest

Both hold for weights that were rounded since: other rows and other layers are farther away than what rounding does.
Memory: two dense weights, and the sums of all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError, UnsupportedError, first_line

PROJECTIONS = 24
SAME_WEIGHT = 0.9  # relative distance of two weights in the order that was found; unrelated ones are 1.4 apart


@dataclass(frozen=True)
class Match:
    """The base's tensor of a weight. order [rows]: row i of the tensor is row order[i] of the weight; None if the rows
    are in the same order. distance: relative, between the weight and what the base has."""

    tensor: str
    order: Tensor | None
    distance: float


def open_base(file: Path) -> Any:
    """The reader of a GGUF file, which maps it. Raises CheckpointError for a file that is not one, is cut, or is of
    another byte order, and UnsupportedError if the package `gguf` is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedError("GGUF files need the package gguf: pip install 'llmsqueeze[gguf]'") from error
    try:
        reader = GGUFReader(str(file))
        for field in reader.fields.values():
            field.contents()  # texts are decoded here and not before
    except (OSError, ValueError, KeyError, IndexError) as error:  # the second is also that of a text in no UTF-8
        raise CheckpointError(f"{file} cannot be read as a GGUF file: {first_line(error)}") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{file} is a big-endian GGUF file; llama.cpp's converter writes little-endian ones")
    return reader


def dense(tensor: Any) -> Tensor:
    """float32, of a tensor of a GGUF file, as llama.cpp decodes it: [rows, cols], or with stacks before."""
    from gguf.quants import dequantize

    return torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def matches(
    base: Iterable[Any], weights: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Match]:
    """Weight -> its counterpart among the tensors of `base`; weights without one are left out.

    weights: name -> what gives the dense weight [rows, cols], float32; shapes: name -> its shape.
    """
    of_shape: dict[tuple[int, ...], list[Any]] = {}
    for tensor in base:
        if len(tensor.shape) == 2:
            of_shape.setdefault(tuple(reversed(tensor.shape.tolist())), []).append(tensor)
    wanted = set(shapes.values())
    sums = {t.name: dense(t).sum(dim=0) for shape, tensors in of_shape.items() if shape in wanted for t in tensors}
    matched: dict[str, Match] = {}
    taken: set[str] = set()
    for name, read in weights.items():
        candidates = [one for one in of_shape.get(shapes[name], []) if one.name not in taken]
        if not candidates:
            continue
        weight = read()
        own = weight.sum(dim=0)
        apart = [_distance(sums[one.name], own) for one in candidates]
        nearest = candidates[int(np.argmin(apart))]
        if (match := in_order(weight, dense(nearest), nearest.name)) is not None:
            matched[name] = match
            taken.add(nearest.name)
    return matched


def in_order(weight: Tensor, other: Tensor, name: str) -> Match | None:
    """How the rows of `other` [rows, cols], the base's tensor `name`, are those of `weight`; None if they are not."""
    straight = _distance(other, weight)
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(weight.shape[1], PROJECTIONS, generator=generator)
    ours, theirs = weight @ projection, other @ projection
    order = torch.cat([torch.cdist(part, ours).argmin(dim=1) for part in theirs.split(1024)])
    moved = not torch.equal(order, torch.arange(len(order)))
    if moved and len(order.unique()) == len(order):
        turned = _distance(other, weight[order])
        if turned < min(straight, SAME_WEIGHT):
            return Match(name, order, turned)
    return Match(name, None, straight) if straight < SAME_WEIGHT else None


def _distance(one: Tensor, other: Tensor) -> float:
    """Of two tensors, relative to the first."""
    return float((one - other).norm() / one.norm().clamp(min=torch.finfo(torch.float32).tiny))
