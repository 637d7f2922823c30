"""The layer of a compressed linear: its parts stay as they are in the file.

The layer rebuilds its weight for every call and multiplies with it as nn.Linear does; in training, once more for the
gradient of its inputs. Memory: the compressed model and one dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmsqueeze import parts
from llmsqueeze.errors import UnsupportedError
from llmsqueeze.parts import Spec


class Computed(Tensor):
    """A weight that was computed from parts: what is written into it would be lost, so that is refused."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedError(
            "the weight of a compressed linear cannot be changed; to merge an adapter: llmsqueeze export FOLDER "
            "--to dense --adapter ADAPTER, or model.dequantize() before the adapter is loaded"
        )


class Product(torch.autograd.Function):
    """x [..., cols] -> [..., rows] by a layer's weight, which is computed again for the gradient, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SumOfParts) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dense(gradient.dtype), None


class SumOfParts(nn.Linear):
    """A linear layer whose weight [rows, cols] is a sum of parts; their tensors are buffers `parts.<i>.<name>`.

    An nn.Linear, so that adapters can be trained on it, as PEFT knows layers by class; without a parameter `weight`.
    weight_dtype: the dtype of the model that the layer is in, which code that reads its weight expects. kind: the class
    of linears whose forward it has, with their attributes; None: that of plain ones.
    """

    kind: Any = None
    attributes: Mapping[str, Any] = {}

    def __init__(self, shape: tuple[int, int], specs: Sequence[Spec], bias: bool, transposed: bool) -> None:
        """Empty tensors on the default device. shape: [rows, cols]; `transposed`: the layer replaces a Conv1D."""
        nn.Module.__init__(self)
        self._is_hf_initialized = True  # transformers would draw the weight of a linear at random
        self.shape, self.specs, self.transposed = shape, list(specs), transposed
        self.out_features, self.in_features = shape
        self.parts = nn.ModuleList()
        for spec in specs:
            layout = parts.layout(shape, spec)
            self.parts.append(buffers({name: torch.empty(size, dtype=dtype) for name, (size, dtype) in layout.items()}))
        self.bias: Any = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if bias else None
        self.weight_dtype: torch.dtype = getattr(torch, specs[0]["dtype"])

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols]: the sum of the parts, taken in float32."""
        pairs = zip(self.specs, self.parts, strict=True)
        return parts.dense_as([parts.restore(self.shape, spec, dict(p.named_buffers())) for spec, p in pairs], dtype)

    def decode(self) -> None:
        """Entropy-coded parts become plain ones: integers of one byte, or codes of a fixed width."""
        for i, (spec, stored) in enumerate(zip(self.specs, self.parts, strict=True)):
            if parts.is_coded(spec):
                part = parts.decoded(parts.restore(self.shape, spec, dict(stored.named_buffers())))
                self.specs[i], self.parts[i] = part.spec(), buffers(part.tensors())

    def compute_as(self, module: nn.Module) -> None:
        """Makes the layer compute what `module` does, whose weight it holds, if that is of a class of linears with a
        forward of its own: one whose rows belong to groups of inputs, for example."""
        kind: Any = type(module)
        if kind.forward not in (nn.Linear.forward, Conv1D.forward):
            self.kind, self.attributes = kind, {n: v for n, v in vars(module).items() if n not in vars(self)}
            self.__class__ = type(kind.__name__, (SumOfParts, kind), {"forward": kind.forward})
            vars(self).update(self.attributes)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight in the model's dtype, for code that reads a linear's weight; computed at every access."""
        weight = self.dense(self.weight_dtype).as_subclass(Computed)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # GPT-2 would draw it at random on loading
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            product: Tensor = Product.apply(x, self)  # type: ignore[no-untyped-call]
            return product
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def as_linear(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary layer with the same weight."""
        weight = nn.Parameter(self.dense(dtype), requires_grad=False)
        kind: Any = Conv1D if self.transposed else nn.Linear
        with torch.device("meta"):
            layer: Any = kind(*self.shape) if self.transposed else kind(*reversed(self.shape))
        layer.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if self.transposed else weight
        layer.bias = self.bias
        if self.kind is not None:
            layer.__class__ = self.kind
            vars(layer).update(self.attributes)
        linear: nn.Module = layer
        return linear

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{s['part']}{s.get('bits', '')}" for s in self.specs)
        return f"in_features={self.in_features}, out_features={self.out_features}, parts=[{kinds}]"


def buffers(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds the tensors of one part."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module
