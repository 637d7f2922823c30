"""What of a written weight can be trained: its parts with their continuous numbers, and optionally their codes, free.

Scales, zeros, alphas and low-rank factors are `start + delta * unit`, delta being trained, so that one learning rate
fits all. Codes, where they are trained, get the gradient of the dense weight straight through: every code has a wish,
in levels, that Adam moves; codes whose wish is beyond half a level go one level that way, at each step only the share
that wishes most, for a step of all would undo itself, after PV-Tuning (arXiv 2405.14852). Memory: a part's dense
weight while it is used; with codes, 9 bytes a code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.distillation.adjusted import Adjusted, AdjustedSteps, scale_of
from llmsqueeze.parts import Affine, Coded, DualBinary, Integers, LowRank, Sparse, Spec, bitpack
from llmsqueeze.parts.coding import rans
from llmsqueeze.parts.dual_binary import planes_of
from llmsqueeze.parts.grid import onto_rows
from llmsqueeze.quantizers import dual_binary


class TrainedCodes(nn.Module):
    """An `Affine` or `DualBinary` part; what of it is trained: its scales (and zeros), its codes, or both."""

    codes: Tensor | None
    sign: Tensor

    def __init__(self, part: Affine | DualBinary, scales: bool, moving: bool) -> None:
        super().__init__()
        self.part = part
        self.guarded = 0
        self.scale = scale_of(part.alpha1 if isinstance(part, DualBinary) else part.scale)
        self.zero: Adjusted | None = None
        if isinstance(part, DualBinary):
            self.zero = scale_of(part.alpha2)
        elif part.zero is not None:
            zero = bitpack.unpack(part.zero, part.grid.bits, len(part.codes)).T.float()
            self.zero = Adjusted(zero, 1.0, torch.float32)
        self.register_buffer("sign", self.scale.start.sign(), persistent=False)
        for one in (self.scale, self.zero):
            if one is not None:
                one.delta.requires_grad_(scales)
        codes = part.symbols().contiguous() if moving else None  # codes that move are addressed flat
        self.register_buffer("codes", codes)
        self.wish = None if codes is None else nn.Parameter(torch.zeros_like(codes, dtype=torch.float32))

    def dense(self) -> Tensor:
        """float32 [rows, cols], with a gradient towards what is trained."""
        grid, cols = self.part.grid, self.part.shape[1]
        codes = self.part.symbols() if self.codes is None else self.codes
        scale = grid.expand(self.scale.forward(), cols)
        if isinstance(self.part, DualBinary):
            assert self.zero is not None
            first, second = planes_of(codes)
            held = first.float() * scale + second.float() * grid.expand(self.zero.forward(), cols)
        else:
            zero = grid.fixed_zero if self.zero is None else grid.expand(self._rounded_zero(), cols)
            held = (codes.float() - zero) * scale
        if self.wish is not None:
            # the codes stay whole; the wish gets the gradient that they would have
            level = scale / 2 if grid.dual else scale
            held = held + (self.wish - self.wish.detach()) * level.detach()
        return onto_rows(held, self.part.rows, self.part.shape)

    @torch.no_grad()
    def keep_valid(self) -> None:
        """After a step: alphas keep their order, zeros stay on the grid. Counts the groups that had to be held."""
        if self.zero is None:
            return
        if isinstance(self.part, DualBinary):
            first, second, moved = dual_binary.put_in_order(self.scale.forward(), self.zero.forward(), self.sign)
            self.scale.put(first)
            self.zero.put(second)
            self.guarded += int(moved.sum())
        else:
            self.zero.put(self.zero.forward().clamp(0, self.part.grid.max_code))

    @torch.no_grad()
    def move_codes(self, share: float, rate: float) -> int:
        """Adds to the wishes, then moves codes by one level where half a level is wished for, at most this `share`.

        A wish grows by `rate` levels where its gradient is of the part's root mean square. Returns how many moved.
        """
        assert self.codes is not None
        assert self.wish is not None
        if self.wish.grad is None:
            return 0
        size = self.wish.grad.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        self.wish.sub_(self.wish.grad * (rate / size))
        self.wish.grad = None
        step = self.wish.sign()
        wished = self.codes.float() + step
        possible = (wished >= 0) & (wished <= self.part.grid.max_code)
        self.wish.copy_(torch.where(possible, self.wish, self.wish.clamp(-0.5, 0.5)))
        strength = torch.where(possible & (self.wish.abs() > 0.5), self.wish.abs(), 0.0).flatten()
        best = strength.topk(round(share * strength.numel()))
        chosen = best.indices[best.values > 0]
        self.codes.view(-1)[chosen] = wished.flatten()[chosen].to(torch.uint8)
        self.wish.view(-1)[chosen] -= step.flatten()[chosen]
        return len(chosen)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What was trained, as the file will hold it, by the names of the part's tensors."""
        scale = self.scale.stored()
        if self.zero is None:
            zero = torch.zeros_like(scale)
        else:
            zero = self.zero.stored() if self.part.grid.dual else self._rounded_zero()
        if self.codes is not None:
            part = parts.of_codes(self.codes, scale, zero, self.part.grid)
            made = (part if self.part.streams is None else part.packed()).tensors()
        elif isinstance(self.part, DualBinary):
            return {"alpha1": scale, "alpha2": zero}
        else:
            made = replace(self.part, scale=scale).plain().tensors()
            if self.part.zero is not None:
                made["zero"] = bitpack.pack(zero.T.to(torch.uint8), self.part.grid.bits)
            del made["codes"]
        made.pop("rows", None)
        return made

    def _rounded_zero(self) -> Tensor:
        """The zero as the file holds it, with the gradient of the one that is trained."""
        assert self.zero is not None
        value = self.zero.forward()
        return value + (value.detach().round().clamp(0, self.part.grid.max_code) - value.detach())


class TrainedCoded(nn.Module):
    """A `Coded` part, decoded, whose row and column steps are trained; stored, its streams are made anew."""

    def __init__(self, part: Integers, scales: bool) -> None:
        super().__init__()
        self.part = part
        self.rows, self.cols = (AdjustedSteps(exponent) for exponent in part.exponents())
        for one in (self.rows, self.cols):
            one.delta.requires_grad_(scales)

    def dense(self) -> Tensor:
        """float32 [rows, cols], with a gradient towards the steps."""
        return self.part.values() * self.cols.forward() * self.rows.forward()[:, None]

    def keep_valid(self) -> None:
        """After a step: steps keep their sign by how they are stored."""

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As for `TrainedCodes`."""
        return Coded.from_integers(
            self.part.values(), self.rows.stored(), self.cols.stored(), self.part.dtype
        ).tensors()


class TrainedLowRank(nn.Module):
    """A `LowRank` part whose factors and scales are trained."""

    def __init__(self, part: LowRank) -> None:
        super().__init__()
        self.part = part
        self.left = Adjusted(part.left.float() / 127, 1.0, torch.float32)
        self.right = Adjusted(part.right.float() / 127, 1.0, torch.float32)
        self.scale = scale_of(part.scale)

    @torch.no_grad()
    def keep_valid(self) -> None:
        """After a step: no entry of a factor beyond what 8 bits hold."""
        for factor in (self.left, self.right):
            factor.put(factor.forward().clamp(-1.0, 1.0))

    def dense(self) -> Tensor:
        left, right = self.left.forward(), self.right.forward()
        if self.left.as_stored:
            left, right = _eighths(left).float() / 127, _eighths(right).float() / 127
        return left @ (right * self.scale.forward()[:, None])

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As for `TrainedCodes`."""
        left, right = _eighths(self.left.forward()), _eighths(self.right.forward())
        return {"left": left, "right": right, "scale": self.scale.stored()}


class TrainedWeight(nn.Module):
    """A weight [rows, cols] as the sum of its parts, of which those kinds that `train` names are trained."""

    def __init__(
        self,
        shape: tuple[int, int],
        specs: Sequence[Spec],
        tensors: Sequence[Mapping[str, Tensor]],
        train: frozenset[str],
    ) -> None:
        """`tensors`: those of each part, in any float dtype. `train`: scales, codes, lowrank."""
        super().__init__()
        self.shape = shape
        self.fixed: dict[int, parts.Part] = {}
        self.trained: dict[int, TrainedCodes | TrainedCoded | TrainedLowRank] = {}
        for i, (spec, held) in enumerate(zip(specs, tensors, strict=True)):
            part = parts.restore(shape, spec, _in_dtype(shape, spec, held))
            if isinstance(part, (Affine, DualBinary)) and train & {"scales", "codes"}:
                self.trained[i] = TrainedCodes(part, "scales" in train, "codes" in train)
            elif isinstance(part, (Coded, Integers)):
                # also where nothing of it is trained: it is decoded once, not for every use
                self.trained[i] = TrainedCoded(part.decoded() if isinstance(part, Coded) else part, "scales" in train)
            elif isinstance(part, LowRank) and "lowrank" in train:
                self.trained[i] = TrainedLowRank(part)
            else:
                self.fixed[i] = part
        self.members = nn.ModuleList(self.trained.values())

    def dense(self) -> Tensor:
        """float32 [rows, cols]."""
        total: Tensor | None = None
        for i in range(len(self.fixed) + len(self.trained)):
            part = self.trained[i] if i in self.trained else self.fixed[i]
            if isinstance(part, Sparse):
                assert total is not None, "outliers come last"
                part.put(total)
            else:
                dense: Tensor = part.dense()
                total = dense if total is None else total + dense
        assert total is not None, "a weight has parts"
        return total

    def stored(self) -> dict[str, Tensor]:
        """`parts.<i>.<name>` -> tensor as the file will hold it, of what was trained."""
        made = {i: part.stored() for i, part in self.trained.items()}
        return {f"parts.{i}.{name}": tensor for i, held in made.items() for name, tensor in held.items()}

    @torch.no_grad()
    def overlay(self, stored: Mapping[str, Tensor]) -> Tensor:
        """float32 [rows, cols]: the weight with what `stored` returned in the place of what was read."""
        made = []
        for i in range(len(self.fixed) + len(self.trained)):
            part = self.trained[i].part if i in self.trained else self.fixed[i]
            held, spec = part.tensors(), part.spec()
            prefix = f"parts.{i}."
            device = next(iter(held.values())).device
            new = {n.removeprefix(prefix): t.to(device) for n, t in stored.items() if n.startswith(prefix)}
            if new and isinstance(part, Integers):
                spec |= {"part": Coded.kind, "rows_per_stream": rans.rows_per_stream(*self.shape)}
            made.append(parts.restore(self.shape, spec, held | new))
        return parts.sum_of_parts(made)


class Trained:
    """Everything that is trained of a model, or of one block: weights by their linear's name, norms by their own."""

    def __init__(
        self,
        weights: Mapping[str, TrainedWeight],
        norms: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """`dtypes`: of the norms in the file."""
        self.weights, self.norms, self.dtypes = weights, norms, dtypes
        self.codes = [part for weight in weights.values() for part in weight.members if isinstance(part, TrainedCodes)]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimizer: norms learn in proportion to their own size. Empty if there is nothing to train."""
        wishes = {id(part.wish) for part in self.codes}  # they move by a rule of their own
        every = [p for weight in self.weights.values() for p in weight.parameters()]
        deltas = [p for p in every if p.requires_grad and id(p) not in wishes]
        groups: list[dict[str, Any]] = [{"params": deltas, "lr": lr, "full_lr": lr}] if deltas else []
        for norm in self.norms.values():
            own = lr * (float(norm.detach().abs().mean()) or 1.0)
            groups.append({"params": [norm], "lr": own, "full_lr": own})
        return groups

    def after_step(self, moves: float, wish: float) -> int:
        """Keeps everything valid, and moves codes where they are trained, at most the share `moves`.

        `wish`: levels that the step adds to the wish of a code with a gradient of mean size. Returns how many moved.
        """
        for weight in self.weights.values():
            for part in weight.trained.values():
                part.keep_valid()
        return sum(part.move_codes(moves, wish) for part in self.codes if part.codes is not None)

    @property
    def guarded(self) -> int:
        """How often a group's alphas had to be put in order."""
        return sum(part.guarded for part in self.codes)

    def stored(self) -> dict[str, Tensor]:
        """File name of a tensor -> what the file will hold, of all that is trained; copies, on the CPU."""
        made = {f"{name}.{key}": t for name, weight in self.weights.items() for key, t in weight.stored().items()}
        made |= {name: norm.detach().to(self.dtypes[name]) for name, norm in self.norms.items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in made.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that training has changed, for `restore`."""
        made: dict[str, Tensor] = dict(self.norms)
        for name, weight in self.weights.items():
            made |= {f"{name}.{key}": tensor for key, tensor in weight.named_parameters()}
            made |= {f"{name}.{key}": tensor for key, tensor in weight.named_buffers() if key.endswith("codes")}
        return {name: tensor.detach() for name, tensor in made.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a `state` that was kept."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Within the context everything has the value that the file will hold, and nothing is trained."""
        adjusted = [m for weight in self.weights.values() for m in weight.modules() if isinstance(m, Adjusted)]
        exact = {name: norm.detach().clone() for name, norm in self.norms.items()}
        with torch.no_grad():
            try:
                for one in adjusted:
                    one.as_stored = True
                for name, norm in self.norms.items():
                    norm.copy_(norm.to(self.dtypes[name]))
                yield
            finally:
                for one in adjusted:
                    one.as_stored = False
                for name, norm in self.norms.items():
                    norm.copy_(exact[name])


def norm_names(module: nn.Module, prefix: str = "") -> list[str]:
    """The parameters of the norms inside a module, by their full names."""
    found = []
    for name, inner in module.named_modules(prefix=prefix):
        if "norm" in type(inner).__name__.lower():
            found += [f"{name}.{key}" for key, _ in inner.named_parameters(recurse=False)]
    return found


def _eighths(values: Tensor) -> Tensor:
    """int8 of a factor in -1 .. 1."""
    return (values.detach() * 127).round().clamp(-127, 127).to(torch.int8)


def _in_dtype(shape: tuple[int, int], spec: Spec, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part in the dtypes that its spec says, from whatever they were opened in."""
    return {name: held[name].to(dtype) for name, (_, dtype) in parts.layout(shape, spec).items()}
