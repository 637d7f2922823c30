"""The trained weights and norms of a model, or of one block.

A weight is the sum of its parts (trained_parts.py). `dense` gives it as the training sees it, `stored` the tensors that
the file will hold, and `overlay` the weight that they make. Memory: that of the parts, and a dense weight while it is
used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.distillation.adjusted import Adjusted
from llmsqueeze.distillation.trained_parts import TrainedCoded, TrainedCodes, TrainedLowRank
from llmsqueeze.parts import Affine, Coded, DualBinary, Integers, LowRank, Sparse, Spec
from llmsqueeze.parts.coding import rans


class TrainedWeight(nn.Module):
    """A weight [rows, cols] as the sum of its parts. The kinds of numbers that `train` names are trained."""

    def __init__(
        self,
        shape: tuple[int, int],
        specs: Sequence[Spec],
        tensors: Sequence[Mapping[str, Tensor]],
        train: frozenset[str],
    ) -> None:
        """tensors: those of each part, in any float dtype. train: of scales, codes, lowrank; others are ignored."""
        super().__init__()
        self.shape, self.count = shape, len(specs)
        self.fixed: dict[int, parts.Part] = {}
        self.trained: dict[int, TrainedCodes | TrainedCoded | TrainedLowRank] = {}
        for i, (spec, of_part) in enumerate(zip(specs, tensors, strict=True)):
            part = parts.restore(shape, spec, _in_dtype(shape, spec, of_part))
            if isinstance(part, (Affine, DualBinary)) and train & {"scales", "codes"}:
                self.trained[i] = TrainedCodes(part, "scales" in train, "codes" in train)
            elif isinstance(part, (Coded, Integers)):
                # even if no number of it is trained: it is decoded once, not for every use
                self.trained[i] = TrainedCoded(part.decoded() if isinstance(part, Coded) else part, "scales" in train)
            elif isinstance(part, LowRank) and "lowrank" in train:
                self.trained[i] = TrainedLowRank(part)
            else:
                self.fixed[i] = part
        self.members = nn.ModuleList(self.trained.values())

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        summands = [self.trained[i] if i in self.trained else self.fixed[i] for i in range(self.count)]
        total: Tensor = reduce(torch.add, (part.dense() for part in summands if not isinstance(part, Sparse)))
        for part in summands:
            if isinstance(part, Sparse):  # outliers replace the sum of the other parts
                part.put(total)
        return total

    def stored(self) -> dict[str, Tensor]:
        """`parts.<i>.<name>` -> its value in the file, for every trained tensor."""
        return {
            f"parts.{i}.{name}": tensor for i, part in self.trained.items() for name, tensor in part.stored().items()
        }

    @torch.no_grad()
    def overlay(self, stored: Mapping[str, Tensor]) -> Tensor:
        """float32 [rows, cols]: the weight with the tensors of `stored` in place of those of the file."""
        summands = []
        for i in range(self.count):
            part = self.trained[i].part if i in self.trained else self.fixed[i]
            tensors, spec = part.tensors(), part.spec()
            prefix = f"parts.{i}."
            device = next(iter(tensors.values())).device
            new = {n.removeprefix(prefix): t.to(device) for n, t in stored.items() if n.startswith(prefix)}
            if new and isinstance(part, Integers):
                spec |= {"part": Coded.kind, "rows_per_stream": rans.rows_per_stream(*self.shape)}
            summands.append(parts.restore(self.shape, spec, tensors | new))
        return parts.sum_of_parts(summands)


class Trained:
    """The trained numbers of a model, or of one block. weights: by the name of their linear. norms: by their own."""

    def __init__(
        self,
        weights: Mapping[str, TrainedWeight],
        norms: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """dtypes: of the norms in the file."""
        self.weights, self.norms, self.dtypes = weights, norms, dtypes
        self.codes = [part for weight in weights.values() for part in weight.members if isinstance(part, TrainedCodes)]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimizer: norms learn in proportion to their mean size. Empty if no continuous number is trained."""
        pending = {id(part.pending) for part in self.codes}  # they change by a rule of their own
        every = [p for weight in self.weights.values() for p in weight.parameters()]
        deltas = [p for p in every if p.requires_grad and id(p) not in pending]
        groups: list[dict[str, Any]] = [{"params": deltas, "lr": lr, "full_lr": lr}] if deltas else []
        for norm in self.norms.values():
            norm_lr = lr * (float(norm.detach().abs().mean()) or 1.0)
            groups.append({"params": [norm], "lr": norm_lr, "full_lr": norm_lr})
        return groups

    def after_step(self, moves: float, rate: float) -> int:
        """After an optimizer step: keeps all numbers valid, and moves trained codes, at most the share `moves`.

        rate: levels that the step adds to the pending change of a code (`TrainedCodes.move_codes`). Returns the number
        of codes that moved.
        """
        for weight in self.weights.values():
            for part in weight.trained.values():
                part.keep_valid()
        return sum(part.move_codes(moves, rate) for part in self.codes if part.codes is not None)

    @property
    def reordered(self) -> int:
        """How often the two alphas of a group had to be put in order again."""
        return sum(part.reordered for part in self.codes)

    def stored(self) -> dict[str, Tensor]:
        """name in the file -> value in the file, for every trained tensor; copies, on the CPU."""
        tensors = {f"{name}.{key}": t for name, weight in self.weights.items() for key, t in weight.stored().items()}
        tensors |= {name: norm.detach().to(self.dtypes[name]) for name, norm in self.norms.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, for `restore`."""
        tensors: dict[str, Tensor] = dict(self.norms)
        for name, weight in self.weights.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.named_parameters()}
            tensors |= {f"{name}.{key}": tensor for key, tensor in weight.named_buffers() if key.endswith("codes")}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets every tensor to its value in a saved `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """In the context every number has the value that the file will hold, and no gradient is computed."""
        adjusted = [m for weight in self.weights.values() for m in weight.modules() if isinstance(m, Adjusted)]
        exact = {name: norm.detach().clone() for name, norm in self.norms.items()}
        with torch.no_grad():
            try:
                for module in adjusted:
                    module.as_stored = True
                for name, norm in self.norms.items():
                    norm.copy_(norm.to(self.dtypes[name]))
                yield
            finally:
                for module in adjusted:
                    module.as_stored = False
                for name, norm in self.norms.items():
                    norm.copy_(exact[name])


def norm_names(module: nn.Module, prefix: str = "") -> list[str]:
    """The parameters of the norms inside a module, by their full names."""
    names = []
    for name, inner in module.named_modules(prefix=prefix):
        if "norm" in type(inner).__name__.lower():
            names += [f"{name}.{key}" for key, _ in inner.named_parameters(recurse=False)]
    return names


def _in_dtype(shape: tuple[int, int], spec: Spec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part in the dtypes of its spec; transformers may have opened them in others."""
    return {name: tensors[name].to(dtype) for name, (_, dtype) in parts.layout(shape, spec).items()}
