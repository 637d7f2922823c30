"""Matrices that lie in one parameter [heads, rows, cols], one for each head, and that a block multiplies its inputs by.

A parameter of that shape can be anything. So a block of every kind runs without data, and only what is used in products
alone is taken. Like experts' matrices it becomes a stack of linears (experts/stack.py).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmsqueeze.model.blockwise.dry_run import run_without_data
from llmsqueeze.model.blockwise.recorder import kind_of
from llmsqueeze.model.experts.stack import ExpertStack, stacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = re.compile("heads")  # in the names of attributes
LEAST = 8  # rows and columns of a matrix
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


def stack_heads(model: PreTrainedModel, blocks: Sequence[str]) -> dict[str, ExpertStack]:
    """Puts a stack of linears in the place of every parameter in the blocks that holds heads' matrices; parameter ->
    stack. The linears have no data. `model`: on the meta device."""
    kinds = {name: kind for block in blocks for name, kind in _candidates(model.get_submodule(block), block).items()}
    if not kinds:
        return {}
    uses = Uses()
    try:
        run_without_data(model, blocks, lambda tensors: uses.watching({name: tensors[name] for name in kinds}))
    except Exception:  # a path that depends on data: torch has many errors for it, and the models their own
        return {}
    multiplied = {kinds[name] for name in uses.products - uses.others}
    return {name: put_stack(model, name) for name, kind in kinds.items() if kind in multiplied}


def put_stack(model: nn.Module, name: str) -> ExpertStack:
    """The stack of linears that takes the place of parameter `name` [heads, rows, cols]."""
    owner, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(owner), model.get_parameter(name)
    heads, rows, cols = parameter.shape
    stack = stacked(parameter, (heads, rows, cols), transposed=False)
    stack.of_heads = True
    delattr(module, leaf)
    setattr(module, leaf, stack)
    return stack


def _candidates(block: nn.Module, prefix: str) -> dict[str, Hashable]:
    """The parameters that have the shape: full name -> the kind of block, and the name in it."""
    kinds: dict[str, Hashable] = {}
    for name, module in block.named_modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        counts = {n for key, n in vars(module).items() if COUNTS.search(key) and type(n) is int and n > 1}
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] in counts and min(parameter.shape[1:]) >= LEAST:
                inside = ".".join(filter(None, (name, leaf)))
                kinds[f"{prefix}.{inside}"] = kind_of(block), inside
    return kinds


class Uses(TorchFunctionMode):
    """Sees what watched tensors are used for: as the left factor of products, or for others. What is taken of one with
    a dimension more is the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.others = set[str](), set[str]()
        self._watched: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no other gets their place

    def watching(self, tensors: Mapping[str, Tensor]) -> Uses:
        self._watched |= {id(tensor): (name, tensor) for name, tensor in tensors.items()}
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for at, value in enumerate((*args, *(kwargs or {}).values())):
            if id(value) in self._watched and isinstance(result, Tensor):
                name, tensor = self._watched[id(value)]
                if func is Tensor.__getitem__ and result.shape == tensor[:, None].shape and tensor.dim() == 3:
                    self._watched[id(result)] = name, result
                else:
                    (self.products if func in PRODUCTS and at == 0 else self.others).add(name)
        return result
