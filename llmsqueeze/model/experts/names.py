"""The names that experts' matrices have in the Hub's files, where they lie one by one: transformers' own conversions on
loading, reversed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsqueeze.errors import first_line
from llmsqueeze.model.experts.find import stacks_of
from llmsqueeze.model.experts.stack import ExpertStack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT = ".weight"


StoredAs = dict[str, list[tuple[str, int]]]  # stack -> names with {} for the expert's number, and their rows


def experts_in_files(model: PreTrainedModel) -> StoredAs | str:
    """What every expert's linear is in the Hub's files: linears of some of its rows, in their order. A string says why
    it is nothing of that kind."""
    stored: StoredAs = {}
    for name, stack in stacks_of(model).items():
        pieces = _pieces(model, name, stack)
        if isinstance(pieces, str):
            return f"{name}: {pieces}"
        stored[name] = pieces
    return stored


def _pieces(model: PreTrainedModel, name: str, stack: ExpertStack) -> list[tuple[str, int]] | str:
    from transformers.core_model_loading import revert_weight_conversion

    if stack.of_heads:
        return "the file holds the matrices of its heads together"
    if stack.ndim != 3:
        return "the model holds its experts' matrices in two dimensions"
    try:
        reverted: Mapping[str, Any] = revert_weight_conversion(model, {name: _numbered(stack)})
    except Exception as error:  # the operations raise what torch raises
        return f"transformers cannot take its experts apart: {first_line(error)}"
    pieces: dict[int, list[tuple[int, str, int]]] = {}
    for stored, tensor in reverted.items():
        numbers = tensor.reshape(-1).long()
        expert, first = divmod(int(numbers[0]), stack.rows)
        in_order = torch.equal(numbers, torch.arange(len(numbers)) + numbers[0])
        if not stored.endswith(WEIGHT) or not in_order or first + len(numbers) > stack.rows:
            return "the Hub's files hold its experts together, or their rows in another order"
        pieces.setdefault(expert, []).append((first, stored.removesuffix(WEIGHT), len(numbers)))
    templates = [(_template(one), rows) for _, one, rows in sorted(pieces.get(0, []))]
    names = {i: [(template.format(i), rows) for template, rows in templates] for i in range(len(stack))}
    if names != {i: [(one, rows) for _, one, rows in sorted(of)] for i, of in pieces.items()}:
        return "transformers takes its experts apart under names that differ in more than a number"
    if not _read_back(model, [one for of in names.values() for one, _ in of], name):
        return "transformers does not put its experts together again"
    return templates


def _template(name: str) -> str:
    """The name of a piece of expert 0 with a place for the number."""
    before, _, after = name.rpartition(".0.")
    return f"{before}.{{}}.{after}"


def _numbered(stack: ExpertStack) -> Tensor:
    """The parameter with one column, in which every row of every expert has a number of its own."""
    numbers = torch.arange(len(stack) * stack.rows, dtype=torch.float64).reshape(len(stack), stack.rows, 1)
    return numbers.transpose(1, 2).contiguous() if stack.transposed else numbers


def _read_back(model: PreTrainedModel, names: list[str], parameter: str) -> bool:
    """Whether transformers makes the parameter of the tensors of these linears, in an operation on all of them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state: dict[str, Any] = {parameter: None}
    for name in names:
        renamed, pattern = rename_source_key(name + WEIGHT, renamings, converters, model.base_model_prefix, state)
        if renamed != parameter or pattern is None or not pattern.endswith(WEIGHT):
            return False
    return True
