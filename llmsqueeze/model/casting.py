"""A model in memory that computes in another dtype than that of its weights.

The weights of linears and embeddings stay as they are. A linear casts its weight at every use, which costs little
beside the product with many tokens; an embedding casts the rows that it looked up. All other parameters (norms, biases)
are cast in memory. So the model takes hardly more memory. Opened in float32, a bfloat16 model would take twice as much.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsqueeze.model.linears import as_rows, is_transposed, output_head


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes `model` compute in `dtype`. A layer whose forward is not known has its parameters cast in memory.

    Integers, buffers and parameters of one byte stay as they are: they belong to compressed layers, which take the
    dtype of their input. A module that reads the weight of a plain linear inside the model gets it cast.
    """
    head = output_head(model)
    for module in list(model.modules()):
        kept = None
        if hasattr(module, "weight_dtype"):  # of what a compressed layer gives as its weight
            layer_of_parts: Any = module
            layer_of_parts.weight_dtype = dtype
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(partial(_cast_output, dtype))
            kept = module.weight
        elif is_plain(module):
            layer: Any = module
            layer.forward, kept = partial(_casting, layer), layer.weight
            if layer is not head:
                layer.__class__ = _read_as(layer.__class__, dtype)
        for parameter in module.parameters(recurse=False):
            if parameter is not kept and parameter.is_floating_point() and parameter.itemsize > 1:
                parameter.data = parameter.data.to(dtype)


@cache
def _read_as(kind: Hashable, dtype: torch.dtype) -> Any:
    """A class of linears whose weight is cast when it is read."""

    def weight(self: nn.Module) -> Tensor:
        stored = self._parameters["weight"]
        assert stored is not None, "a linear has a weight"
        return stored.to(dtype)

    own: Any = kind
    return type(own.__name__, (own,), {"weight": property(weight)})


def is_plain(module: nn.Module) -> bool:
    """Whether the module computes what a linear does, and nothing else."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def plain_linear(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the plain linear `layer` gives for x [..., cols] with this weight, as it stores it: [..., rows]."""
    if is_transposed(layer):
        return torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return nn.functional.linear(x, weight, layer.bias)


def multiplied_in(dtype: torch.dtype, layer: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What the plain linear `layer` gives for x [..., cols], multiplied in `dtype`: the processor adds the products up
    in float32. x, the bias and the result [..., rows] keep their dtype, and so do gradients. weight: as the layer
    stores it, in the place of its own."""
    rows = as_rows(layer, layer.weight if weight is None else weight)
    product = nn.functional.linear(x.to(dtype), rows.to(dtype)).to(x.dtype)
    return product if layer.bias is None else product + layer.bias


def _casting(layer: Any, x: Tensor) -> Tensor:
    return plain_linear(layer, x, layer._parameters["weight"].to(x.dtype))


def _cast_output(dtype: torch.dtype, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)
