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

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.distillation.losses import kl_from_teacher
from llmsqueeze.distillation.options import TRAINABLE
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import StudentBlock
from llmsqueeze.distillation.teacher import Answers
from llmsqueeze.distillation.training import BETAS, TrainingState, batch_of, read_state, set_rate, write_state
from llmsqueeze.errors import UnsupportedError
from llmsqueeze.formats.entries import read_parts
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress import Progress

CHECKS = 5  # measurements on held-back samples, per block

BlockLoss = Callable[[int, dict[str, Tensor]], Tensor]  # of a sample, by the block's tensors


def train_blocks(
    skeleton: Skeleton,
    student: Folder,
    rows: Sequence[Tensor],
    held_back: Sequence[Tensor],
    settings: Distillation,
    answers: Answers,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Trains every block on `rows` [1, length]; finished blocks come from `work`.

    Returns the final state, and the trained tensors by their names in the file: none if they are not better. Raises
    UnsupportedError if blocks share linears.
    """
    if skeleton.shared:
        raise UnsupportedError(
            f"--blockwise trains one block after the other, and {skeleton.shared[0]} serves several: train the whole "
            "model, without it"
        )
    with Spill(parent=work) as spill:
        walk = Walk(skeleton, [*rows, *held_back], spill, torch.float32, device)
        state, best = train_in_turn(walk, student, len(rows), settings, work, progress)
    state.before, state.best = (
        blockwise_kl(skeleton, student, stored, held_back, answers, device, work) for stored in ({}, best)
    )
    if state.best >= state.before:
        state.best, best = state.before, {}
    else:
        state.best_step = state.step
    return state, best


def train_in_turn(
    walk: Walk, student: Folder, count: int, settings: Distillation, work: Path, progress: Progress
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Every block on the walk's first `count` samples, from the outputs of the trained blocks before it.

    Returns the sums of the blocks' states, and the tensors that are best on the walk's other samples.
    """
    skeleton, state, best = walk.skeleton, TrainingState(), dict[str, Tensor]()
    original = compressed = walk.embed()
    if any(f"{name}.weight" not in student.checkpoint.tensors for name in (*skeleton.ends, *skeleton.outer)):
        with skeleton.overriding(outside_blocks(skeleton, student)):
            compressed = walk.embed()
    for index in progress.over(range(len(skeleton.blocks)), "blockwise", len(skeleton.blocks)):
        block = StudentBlock(skeleton, student, index, frozenset(settings.train), walk.device)
        with walk.resident_block(index):
            next_original = walk.through(index, original)
            targets = walk.through(index, compressed) if settings.targets == "inputs" else next_original
        file = block_file(work, index)
        finished = read_state(file, "remove it to train this block again")
        if finished is None:
            finished = train_block(walk, index, block, compressed, targets, count, settings, progress)
            write_state(file, *finished)
        of_block, stored = finished
        next_compressed = walk.through(index, compressed, block.overlay(stored))
        for stream in {original, compressed, targets} - {next_original}:
            stream.clear()
        original, compressed = next_original, next_compressed
        best |= stored
        state.step += settings.steps
        state.moved += of_block.moved
        state.reordered += of_block.reordered
        state.stopped = state.stopped or of_block.stopped
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
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Trains one block on the first `count` samples. Returns its state, with relative errors of its output in the place
    of divergences, and its tensors that are best on the other samples."""
    state, groups = TrainingState(), block.trained.parameter_groups(settings.lr)
    if not groups:
        return state, {}
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    loss_of = partial(block_loss, walk, index, inputs, targets)
    held_back, every = range(count, len(walk.samples)), max(1, settings.steps // CHECKS)
    state.before = state.best = held_back_loss(block, loss_of, held_back)
    best = block.trained.stored()
    while state.step < settings.steps and state.stopped is None:
        batch = batch_of(range(count), settings, state.step)
        loss = block_step(block, optimizer, loss_of, batch, settings, state)
        state.step += 1
        if not math.isfinite(loss):
            state.stopped = (
                f"the loss of block {index} became {loss} at step {state.step}; the result is the best before it"
            )
            progress.note(state.stopped)
        elif state.step % every == 0 or state.step == settings.steps:
            measured = held_back_loss(block, loss_of, held_back)
            if measured < state.best:
                state.best, state.best_step, best = measured, state.step, block.trained.stored()
    progress.note(
        f"block {index}: relative error of its output on held-back text {state.before:.3e} -> {state.best:.3e}"
    )
    return state, best


def block_step(
    block: StudentBlock,
    optimizer: torch.optim.Optimizer,
    loss_of: BlockLoss,
    batch: Sequence[int],
    settings: Distillation,
    state: TrainingState,
) -> float:
    """One optimizer step on the samples of a batch; returns its loss. A loss that is not finite changes nothing."""
    set_rate(optimizer, settings.rate(state.step))
    optimizer.zero_grad()
    tensors = block.tensors()
    loss = sum((loss_of(i, tensors) for i in batch), torch.zeros(())) / len(batch)
    if bool(loss.isfinite()):
        loss.backward()
        optimizer.step()
        state.moved += block.trained.after_step(settings.moves, settings.code_rate(state.step))
        state.reordered = block.trained.reordered
    return float(loss.detach())


def held_back_loss(block: StudentBlock, loss_of: BlockLoss, samples: Sequence[int]) -> float:
    """Mean loss of the samples, with the values that the file will hold."""
    with block.trained.as_stored():
        tensors = block.tensors()
        return sum(float(loss_of(i, tensors)) for i in samples) / len(samples)


def block_loss(
    walk: Walk, index: int, inputs: Activations, targets: Activations, sample: int, tensors: dict[str, Tensor]
) -> Tensor:
    """The loss of a sample, relative to the change that the original block makes."""
    hidden, target = inputs.get(sample, walk.device), targets.get(sample, walk.device)
    output = walk.run(index, sample, hidden, tensors)
    hidden = walk.hidden_in(index, sample, hidden)
    output, target = (walk.hidden_in(index + 1, sample, one) for one in (output, target))
    return (output - target).square().sum() / (target - hidden).square().sum().clamp(min=1e-12)


def blockwise_kl(
    skeleton: Skeleton,
    student: Folder,
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
                logits = torch.cat([part for _, part in walk.head.logits(last, row)], dim=1)
                total += float(kl_from_teacher(logits, answers.read([row], device)).double().sum())
                tokens += len(logits)
    return total / tokens if math.isfinite(total) else math.inf


def outside_blocks(skeleton: Skeleton, student: Folder) -> dict[str, Callable[[], Tensor]]:
    """name -> reader of the student's embeddings, head and last norm, which may be coded, or trained before."""

    def read(name: str) -> Tensor:
        if name in student.checkpoint.tensors:
            return student.checkpoint.read(name)
        linear = name.removesuffix(".weight")
        rows = parts.sum_of_parts(read_parts(student.checkpoint, student.entries[linear]))
        return as_rows(skeleton.module(linear), rows)

    return {name: partial(read, name) for name in skeleton.names_around_blocks()}


def block_file(work: Path, index: int) -> Path:
    """The file of a finished block."""
    return work / f"block-{index:05d}.safetensors"
