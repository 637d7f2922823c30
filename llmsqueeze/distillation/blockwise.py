"""Distillation block by block: every compressed block learns to give what the original block gives.

    least  |B(y; trained) - B(x; original)|^2 / |B(x; original) - x|^2, summed over the tokens of a sample

y [tokens, width] the block's inputs in the compressed model, behind the blocks that were trained before it; x the
original model's inputs for the same tokens (`targets` stream: what the block should give after all) or y itself
(`targets` inputs: what the original block makes of the compressed model's inputs). What is trained, and how, is as for
the whole model (trained.py); the best on held-back samples is kept, block by block, and the result as a whole only if
its answers on them come nearer to the teacher's. A run that was killed goes on behind its last finished block. Memory:
one block of both models with its gradients, one sample inside it; the activations between blocks, spilled past a limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.distillation.losses import divergences
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.teacher import answers, together
from llmsqueeze.distillation.trained import Trained, TrainedWeight, norm_names
from llmsqueeze.distillation.training import BETAS, Answers, State, batch_of, set_rate
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import whole_file
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.model.activations import Activations, Spill
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress

CHECKS = 5  # measurements on held-back samples, per block


@dataclass
class Tally:
    """What the training of a block came to, beside its tensors."""

    moved: int = 0
    guarded: int = 0
    stopped: str | None = None


class StudentBlock:
    """A block of the compressed model; `trained` is what of it will be."""

    def __init__(
        self, skeleton: Skeleton, student: Checkpoint, index: int, train: frozenset[str], device: torch.device
    ) -> None:
        self.skeleton, self.prefix = skeleton, skeleton.blocks[index] + "."
        entries = read_entries(student)
        weights = {}
        for name in (name for name in skeleton.linears[index] if name in entries):
            entry = entries[name]
            tensors = [{kind: student.read_raw(n).to(device) for kind, n in names.items()} for names in entry.names]
            weights[name] = TrainedWeight(entry.shape, entry.specs, tensors, train)
        replaced = {f"{name}.weight" for name in weights}
        names = [name for name in skeleton.names_in(skeleton.blocks[index]) if name not in replaced]
        stored = {name: student.read_raw(name).to(device) for name in names}
        self.kept = {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}
        named = norm_names(skeleton.module(skeleton.blocks[index]), skeleton.blocks[index])
        norms = {name: nn.Parameter(self.kept[name]) for name in named if name in names and "norms" in train}
        self.trained = Trained(weights, norms, {name: t.dtype for name, t in stored.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What the block computes with, by the names inside it; weights as its modules store them."""
        made = self.kept | dict(self.trained.norms)
        for name, weight in self.trained.weights.items():
            made[f"{name}.weight"] = as_rows(self.skeleton.module(name), weight.dense())
        return {name.removeprefix(self.prefix): tensor for name, tensor in made.items()}

    def overlay(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `tensors`, with what was trained as the file holds it (`Trained.stored`)."""
        made = self.kept | {n: t.to(self.kept[n]) for n, t in stored.items() if n in self.trained.norms}
        for name, weight in self.trained.weights.items():
            mine = {n.removeprefix(f"{name}."): t for n, t in stored.items() if n.startswith(f"{name}.parts.")}
            made[f"{name}.weight"] = as_rows(self.skeleton.module(name), weight.overlay(mine))
        return {name.removeprefix(self.prefix): tensor for name, tensor in made.items()}


def train_blocks(
    skeleton: Skeleton,
    student: Checkpoint,
    rows: Sequence[Tensor],
    apart: Sequence[Tensor],
    settings: Distillation,
    answered: Answers,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[State, dict[str, Tensor]]:
    """Trains every block; returns how it went and the tensors by their names in the file, none if it does not help."""
    train = frozenset(settings.train)
    state, best = State(), dict[str, Tensor]()
    with Spill(parent=work) as spill:
        walk = Walk(skeleton, [*rows, *apart], spill, torch.float32, device)
        original = compressed = walk.embed()
        if any(f"{name}.weight" not in student.tensors for name in skeleton.outer):
            with skeleton.overriding(outside_blocks(skeleton, student)):
                compressed = walk.embed()
        for index in progress.over(range(len(skeleton.blocks)), "blockwise", len(skeleton.blocks)):
            block = StudentBlock(skeleton, student, index, train, device)
            targets = Activations(spill)
            with walk.resident_block(index):
                ahead = walk.through(index, original)
                if settings.targets == "inputs":
                    targets = walk.through(index, compressed)
            wanted = targets if settings.targets == "inputs" else ahead
            done = trained_before(work, index)
            if done is None:
                done = train_block(walk, index, block, compressed, wanted, len(rows), settings, progress)
                keep_block(work, index, *done)
            stored, tally = done
            state.moved += tally.moved
            state.guarded += tally.guarded
            state.stopped = state.stopped or tally.stopped
            behind = walk.through(index, compressed, block.overlay(stored))
            for stream in {id(s): s for s in (original, compressed, targets)}.values():
                stream.clear()
            original, compressed = ahead, behind
            best |= stored
            state.step += settings.steps
        original.clear()
        compressed.clear()
    tried = [dict[str, Tensor](), best]
    state.before, state.best = (divergence(skeleton, student, t, apart, answered, device, work) for t in tried)
    if state.best >= state.before:
        state.best, best = state.before, {}
    else:
        state.best_step = state.step
    return state, best


def train_block(
    walk: Walk,
    index: int,
    block: StudentBlock,
    inputs: Activations,
    targets: Activations,
    count: int,
    settings: Distillation,
    progress: Progress,
) -> tuple[dict[str, Tensor], Tally]:
    """Trains one block on the first `count` samples, measured on the others; returns the best that was measured."""
    trained, tally = block.trained, Tally()
    groups = trained.parameter_groups(settings.lr)
    if not groups:
        return {}, tally
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    apart = range(count, len(walk.samples))

    def measured() -> float:
        with trained.as_stored():
            tensors = block.tensors()
            return sum(float(mismatch(walk, index, i, inputs, targets, tensors)) for i in apart) / len(apart)

    before = least = measured()
    best, numbers = trained.stored(), [torch.tensor([i]) for i in range(count)]
    every = max(1, settings.steps // CHECKS)
    for step in range(1, settings.steps + 1):
        set_rate(optimizer, settings.rate(step - 1))
        optimizer.zero_grad()
        batch = [int(i) for i in batch_of(numbers, settings, step - 1)]
        tensors = block.tensors()
        loss = sum((mismatch(walk, index, i, inputs, targets, tensors) for i in batch), torch.zeros(())) / len(batch)
        if not bool(loss.isfinite()):
            tally.stopped = f"the loss of block {index} became {float(loss.detach())} at step {step}; the best is kept"
            progress.note(tally.stopped)
            break
        loss.backward()
        optimizer.step()
        tally.moved += trained.after_step(settings.moves, settings.wish(step - 1))
        if step % every == 0 or step == settings.steps:
            found = measured()
            if found < least:
                least, best = found, trained.stored()
    tally.guarded = trained.guarded
    progress.note(f"block {index}: relative error of its output on held-back text {before:.3e} -> {least:.3e}")
    return best, tally


def mismatch(
    walk: Walk, index: int, sample: int, inputs: Activations, targets: Activations, tensors: dict[str, Tensor]
) -> Tensor:
    """The loss of a sample, relative to what the block adds."""
    hidden, wanted = inputs.get(sample, walk.device), targets.get(sample, walk.device)
    found = walk.run(index, sample, hidden, tensors)
    return (found - wanted).square().sum() / (wanted - hidden).square().sum().clamp(min=1e-12)


def divergence(
    skeleton: Skeleton,
    student: Checkpoint,
    stored: dict[str, Tensor],
    apart: Sequence[Tensor],
    answered: Answers,
    device: torch.device,
    work: Path,
) -> float:
    """Mean KL(teacher || student), nats per token, of the student's blocks with `stored` in them."""
    total, tokens = 0.0, 0
    with Spill(parent=work) as spill, torch.no_grad():
        walk = Walk(skeleton, apart, spill, torch.float32, device)
        with skeleton.overriding(outside_blocks(skeleton, student)):
            hidden = walk.embed()
        for index in range(len(skeleton.blocks)):
            block = StudentBlock(skeleton, student, index, frozenset(("scales", "norms", "lowrank", "codes")), device)
            mine = {name: t for name, t in stored.items() if name.startswith(block.prefix)}
            ahead = walk.through(index, hidden, block.overlay(mine))
            hidden.clear()
            hidden = ahead
        with skeleton.overriding(outside_blocks(skeleton, student)), walk.head.resident():
            for row, last in zip(apart, hidden.each(device), strict=True):
                logits = torch.cat([part for _, part in walk.head.logits(last)], dim=1)
                teacher = together([answers(*answered, row)], device)
                total += float(divergences(logits, teacher).double().sum())
                tokens += len(logits)
    return total / tokens if math.isfinite(total) else math.inf


def outside_blocks(skeleton: Skeleton, student: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """How the student's embeddings, head and last norm are read; they may be coded, or have been trained before."""
    entries = read_entries(student)

    def made(name: str) -> Tensor:
        if name in student.tensors:
            return student.read(name)
        return parts.sum_of_parts(read_parts(student, entries[name.removesuffix(".weight")]))

    return {name: partial(made, name) for name in skeleton.names_outside_blocks()}


def block_file(work: Path, index: int) -> Path:
    return work / f"block-{index:05d}.safetensors"


def keep_block(work: Path, index: int, stored: dict[str, Tensor], tally: Tally) -> None:
    """Writes what was trained of a finished block."""
    held = {name: tensor.contiguous() for name, tensor in stored.items()}
    with whole_file(block_file(work, index)) as half:
        save_file(held, half, {"tally": json.dumps(asdict(tally))})


def trained_before(work: Path, index: int) -> tuple[dict[str, Tensor], Tally] | None:
    """What a killed run had finished of a block."""
    if not block_file(work, index).exists():
        return None
    try:
        with safe_open(block_file(work, index), framework="pt") as file:
            tally = Tally(**json.loads(file.metadata()["tally"]))
            return {name: file.get_tensor(name) for name in file.keys()}, tally  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{block_file(work, index)} is damaged ({error}); remove it") from error
