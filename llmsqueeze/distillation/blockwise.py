"""Distillation block by block: every compressed block learns to give the output of the original block.

    loss = |B(y; trained) - B(x; original)|^2 / |B(x; original) - x|^2, summed over the tokens of a sample

y [tokens, width] are the block's inputs in the compressed model, after the blocks that were trained before it. x are
the inputs of the original block: those in the original model for the same tokens (`--targets stream`), or y itself
(`--targets inputs`). The trained numbers are those of the whole model (trained.py). Of each block the best on held-back
samples is kept. The result is used only if the whole model's predictions on them come nearer to the teacher's. A killed
run continues after its last finished block. "Step" here means an optimizer step. Memory: one block of both models with
its gradients and one sample inside it; the activations between blocks, spilled past a limit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.distillation.losses import kl_from_teacher
from llmsqueeze.distillation.options import TRAINABLE
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import StudentBlock
from llmsqueeze.distillation.teacher import Answers
from llmsqueeze.distillation.training import BETAS, TrainingState, batch_of, set_rate
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import whole_file
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.model.activations import Activations, Spill
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress

CHECKS = 5  # measurements on held-back samples, per block


@dataclass
class BlockState:
    """A trained block, as in `TrainingState`: codes that moved, reordered alphas, why it ended early."""

    moved: int = 0
    reordered: int = 0
    stopped: str | None = None


def train_blocks(
    skeleton: Skeleton,
    student: Checkpoint,
    rows: Sequence[Tensor],
    held_back: Sequence[Tensor],
    settings: Distillation,
    answers: Answers,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Trains every block on `rows` [1, length]; finished blocks come from `work`.

    Returns the final state, and the trained tensors by their names in the file: none if they are not better.
    """
    state, best = TrainingState(), dict[str, Tensor]()
    with Spill(parent=work) as spill:
        walk = Walk(skeleton, [*rows, *held_back], spill, torch.float32, device)
        original = compressed = walk.embed()
        if any(f"{name}.weight" not in student.tensors for name in skeleton.ends):
            with skeleton.overriding(outside_blocks(skeleton, student)):
                compressed = walk.embed()
        for index in progress.over(range(len(skeleton.blocks)), "blockwise", len(skeleton.blocks)):
            block = StudentBlock(skeleton, student, index, frozenset(settings.train), device)
            own_targets = Activations(spill)
            with walk.resident_block(index):
                next_original = walk.through(index, original)
                if settings.targets == "inputs":
                    own_targets = walk.through(index, compressed)
            targets = own_targets if settings.targets == "inputs" else next_original
            finished = load_block(work, index)
            if finished is None:
                finished = train_block(walk, index, block, compressed, targets, len(rows), settings, progress)
                save_block(work, index, *finished)
            stored, block_state = finished
            state.moved += block_state.moved
            state.reordered += block_state.reordered
            state.stopped = state.stopped or block_state.stopped
            next_compressed = walk.through(index, compressed, block.overlay(stored))
            for stream in {id(s): s for s in (original, compressed, own_targets)}.values():
                stream.clear()
            original, compressed = next_original, next_compressed
            best |= stored
            state.step += settings.steps
        original.clear()
        compressed.clear()
    state.before, state.best = (
        blockwise_kl(skeleton, student, stored, held_back, answers, device, work) for stored in ({}, best)
    )
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
) -> tuple[dict[str, Tensor], BlockState]:
    """Trains one block on the first `count` samples. Returns its tensors that are best on the other samples."""
    trained, state = block.trained, BlockState()
    groups = trained.parameter_groups(settings.lr)
    if not groups:
        return {}, state
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    held_back = range(count, len(walk.samples))

    def held_back_loss() -> float:
        with trained.as_stored():
            tensors = block.tensors()
            return sum(float(block_loss(walk, index, i, inputs, targets, tensors)) for i in held_back) / len(held_back)

    before = least = held_back_loss()
    best, numbers = trained.stored(), [torch.tensor([i]) for i in range(count)]
    every = max(1, settings.steps // CHECKS)
    for step in range(1, settings.steps + 1):
        set_rate(optimizer, settings.rate(step - 1))
        optimizer.zero_grad()
        batch = [int(i) for i in batch_of(numbers, settings, step - 1)]
        tensors = block.tensors()
        loss = sum((block_loss(walk, index, i, inputs, targets, tensors) for i in batch), torch.zeros(())) / len(batch)
        if not bool(loss.isfinite()):
            state.stopped = (
                f"the loss of block {index} became {float(loss.detach())} at step {step}; the result is the best "
                "before it"
            )
            progress.note(state.stopped)
            break
        loss.backward()
        optimizer.step()
        state.moved += trained.after_step(settings.moves, settings.code_rate(step - 1))
        if step % every == 0 or step == settings.steps:
            measured = held_back_loss()
            if measured < least:
                least, best = measured, trained.stored()
    state.reordered = trained.reordered
    progress.note(f"block {index}: relative error of its output on held-back text {before:.3e} -> {least:.3e}")
    return best, state


def block_loss(
    walk: Walk, index: int, sample: int, inputs: Activations, targets: Activations, tensors: dict[str, Tensor]
) -> Tensor:
    """The loss of a sample, relative to the change that the original block makes."""
    hidden, target = inputs.get(sample, walk.device), targets.get(sample, walk.device)
    output = walk.run(index, sample, hidden, tensors)
    return (output - target).square().sum() / (target - hidden).square().sum().clamp(min=1e-12)


def blockwise_kl(
    skeleton: Skeleton,
    student: Checkpoint,
    stored: Mapping[str, Tensor],
    rows: Sequence[Tensor],
    answers: Answers,
    device: torch.device,
    work: Path,
) -> float:
    """Mean KL(teacher || student), nats per token, of the student with `stored` in it; inf if it is not finite."""
    total, tokens = 0.0, 0
    with Spill(parent=work) as spill, torch.no_grad():
        walk = Walk(skeleton, rows, spill, torch.float32, device)
        with skeleton.overriding(outside_blocks(skeleton, student)):
            hidden = walk.embed()
        for index in range(len(skeleton.blocks)):
            block = StudentBlock(skeleton, student, index, frozenset(TRAINABLE), device)
            of_block = {name: t for name, t in stored.items() if name.startswith(block.prefix)}
            ahead = walk.through(index, hidden, block.overlay(of_block))
            hidden.clear()
            hidden = ahead
        with skeleton.overriding(outside_blocks(skeleton, student)), walk.head.resident():
            for row, last in zip(rows, hidden.each(device), strict=True):
                logits = torch.cat([part for _, part in walk.head.logits(last)], dim=1)
                total += float(kl_from_teacher(logits, answers.read([row], device)).double().sum())
                tokens += len(logits)
    return total / tokens if math.isfinite(total) else math.inf


def outside_blocks(skeleton: Skeleton, student: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """name -> reader of the student's embeddings, head and last norm, which may be coded, or trained before."""
    entries = read_entries(student)

    def read(name: str) -> Tensor:
        if name in student.tensors:
            return student.read(name)
        return parts.sum_of_parts(read_parts(student, entries[name.removesuffix(".weight")]))

    return {name: partial(read, name) for name in skeleton.names_outside_blocks()}


def block_file(work: Path, index: int) -> Path:
    """The file of a finished block."""
    return work / f"block-{index:05d}.safetensors"


def save_block(work: Path, index: int, stored: dict[str, Tensor], state: BlockState) -> None:
    """Writes the trained tensors of a finished block."""
    with whole_file(block_file(work, index)) as half:
        save_file({n: t.contiguous() for n, t in stored.items()}, half, {"state": json.dumps(asdict(state))})


def load_block(work: Path, index: int) -> tuple[dict[str, Tensor], BlockState] | None:
    """A block that a killed run finished. Raises CheckpointError if its file is damaged."""
    if not block_file(work, index).exists():
        return None
    try:
        with safe_open(block_file(work, index), framework="pt") as file:
            state = BlockState(**json.loads(file.metadata()["state"]))
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{block_file(work, index)} is damaged ({error}); remove it") from error
