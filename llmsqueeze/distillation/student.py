"""A compressed model whose scales, norms and codes can be trained: the student of a distillation.

The weights stay as compressed as they are in the file; a dense weight exists only while its block computes, forward
and once more backward, for every block is checkpointed. Memory: the file's bytes (norms and embeddings in float32),
Adam's two copies of what is trained, one row's activations between the blocks, one block's inside, one row's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmsqueeze.distillation.trained import Trained, TrainedWeight, norm_names
from llmsqueeze.formats import load
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.linears import find_blocks

TRAINABLE = ("scales", "norms", "lowrank", "codes")


class Student:
    """An opened folder, ready to be trained; `trained` is what of it will be."""

    def __init__(
        self, model: str, checkpoint_: Checkpoint, train: frozenset[str], device: torch.device, trust_remote_code: bool
    ) -> None:
        self.model: Any = load.load(
            model,
            keep_codes=True,
            dtype=torch.float32,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
        )
        self.device = device
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        weights: dict[str, TrainedWeight] = {}
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, SumOfParts):
                made = TrainedLinear(layer, train)
                weights[name] = made.weight
                self.model.set_submodule(name, made)
        dtypes = {name: stored.dtype for name, stored in checkpoint_.tensors.items()}
        named = [n for n in norm_names(self.model) if n in dtypes] if "norms" in train else []
        norms: dict[str, nn.Parameter] = {name: self.model.get_parameter(name) for name in named}
        for norm in norms.values():
            norm.requires_grad_(True)
        self.trained = Trained(weights, norms, dtypes)
        for block in find_blocks(self.model):
            module: Any = self.model.get_submodule(block)
            module.forward = _checkpointed(module.forward)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [rows * (length - 1), V] float32 for `tokens` [rows, length]."""
        found: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return found[:, :-1].flatten(0, 1).float()


class TrainedLinear(nn.Module):
    """A linear layer on a weight that is trained."""

    def __init__(self, layer: SumOfParts, train: frozenset[str]) -> None:
        super().__init__()
        tensors = [dict(holder.named_buffers()) for holder in layer.parts]
        self.weight = TrainedWeight(layer.shape, layer.specs, tensors, train)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dense().to(x.dtype), self.bias)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, keeping nothing but its inputs for the backward pass."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
