"""The compressed model, with scales, norms, factors and codes that can be trained: as a whole, and one block of it.

The weights stay compressed as in the file. A dense weight exists only while its block computes, once forward and once
more backward, because every block is checkpointed. In training linears multiply in `products`, if that is another
dtype; what is measured is computed in float32. Memory of the whole: the bytes of the file (norms and embeddings in
float32), Adam's two copies of the trained numbers, one batch's activations between blocks, those inside one block, and
its logits. Of a block: the same for the block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmsqueeze.distillation.trained import Trained, TrainedWeight, norm_names
from llmsqueeze.formats import load
from llmsqueeze.formats.entries import read_tensors
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.casting import is_plain, multiplied_in
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.linears import as_rows, find_blocks, output_head
from llmsqueeze.model.skeleton import Skeleton


class Student:
    """The whole model in memory. trained: its trained numbers."""

    def __init__(
        self,
        model: str,
        files: Checkpoint,
        train: frozenset[str],
        device: torch.device,
        trust_remote_code: bool,
        products: torch.dtype = torch.float32,
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
        blocks = find_blocks(self.model)
        trained: dict[nn.Module, TrainedLinear] = {}  # in the place of a layer, wherever it stands
        for name, layer in list(self.model.named_modules(remove_duplicate=False)):
            if isinstance(layer, SumOfParts):
                if layer not in trained:
                    trained[layer] = TrainedLinear(layer, train, products)
                    weights[name] = trained[layer].weight
                self.model.set_submodule(name, trained[layer])
            elif products != torch.float32 and is_plain(layer):
                layer.forward = partial(_in_training, layer.forward, partial(multiplied_in, products, layer))
        dtypes = {name: stored.dtype for name, stored in files.tensors.items()}
        names = [n for n in norm_names(self.model) if n in dtypes] if "norms" in train else []
        norms: dict[str, nn.Parameter] = {name: self.model.get_parameter(name) for name in names}
        for norm in norms.values():
            norm.requires_grad_(True)
        self.trained = Trained(weights, norms, dtypes)
        for block in blocks:
            module: Any = self.model.get_submodule(block)
            module.forward = _checkpointed(module.forward)

    @property
    def vocabulary(self) -> int:
        """Tokens in the vocabulary."""
        head: Any = output_head(self.model)
        return int(head.weight.shape[0])

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [rows * (length - 1), V] float32 for `tokens` [rows, length]."""
        logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits[:, :-1].flatten(0, 1).float()


class TrainedLinear(nn.Module):
    """A linear layer whose weight is trained."""

    def __init__(self, layer: SumOfParts, train: frozenset[str], products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.products, self.in_features, self.out_features = products, layer.in_features, layer.out_features
        tensors = [dict(holder.named_buffers()) for holder in layer.parts]
        self.weight = TrainedWeight(layer.shape, layer.specs, tensors, train)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = self.weight.dense()
        if self.products == torch.float32 or not torch.is_grad_enabled():
            return nn.functional.linear(x, weight.to(x.dtype), self.bias)
        return multiplied_in(self.products, self, x, weight)


def _in_training(exact: Callable[[Tensor], Tensor], faster: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return faster(x) if torch.is_grad_enabled() else exact(x)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which keeps only its inputs for the backward pass."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped


class StudentBlock:
    """One block. trained: its trained numbers. untrained: its other tensors, by name, float32 if they are real."""

    def __init__(
        self, skeleton: Skeleton, student: Folder, index: int, train: frozenset[str], device: torch.device
    ) -> None:
        self.skeleton, self.prefix = skeleton, skeleton.blocks[index] + "."
        checkpoint, entries, weights = student.checkpoint, student.entries, {}
        for name in (name for name in skeleton.linears[index] if name in entries):
            entry = entries[name]
            tensors = read_tensors(checkpoint, entry, device)
            weights[name] = TrainedWeight(entry.shape, entry.specs, tensors, train)
        compressed = {f"{name}.weight" for name in weights}
        names = [name for name in skeleton.names_in(skeleton.blocks[index]) if name not in compressed]
        stored = {name: checkpoint.read_raw(name).to(device) for name in names}
        self.untrained = {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}
        of_norms = norm_names(skeleton.module(skeleton.blocks[index]), skeleton.blocks[index])
        norms = {n: nn.Parameter(self.untrained[n]) for n in of_norms if n in names and "norms" in train}
        self.trained = Trained(weights, norms, {name: t.dtype for name, t in stored.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The block's tensors by their names inside it, with gradients; weights as their modules store them."""
        weights = {name: weight.dense() for name, weight in self.trained.weights.items()}
        return self._as_modules(self.trained.norms, weights)

    def overlay(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `tensors`, with the trained numbers from `stored` (`Trained.stored`)."""
        weights = {}
        for name, weight in self.trained.weights.items():
            prefix = f"{name}."
            of_weight = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(f"{prefix}parts.")}
            weights[name] = weight.overlay(of_weight)
        norms = {n: t.to(self.untrained[n]) for n, t in stored.items() if n in self.trained.norms}
        return self._as_modules(norms, weights)

    def _as_modules(self, norms: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the block; `weights` [rows, cols] by linear."""
        tensors = self.untrained | dict(norms)
        tensors |= {f"{name}.weight": as_rows(self.skeleton.module(name), weight) for name, weight in weights.items()}
        return {name.removeprefix(self.prefix): tensor for name, tensor in tensors.items()}
