"""Training the student as a whole on the teacher's predictions.

Every so often the student is measured on held-back samples, with the values that the file will hold, and the best is
kept. At the same time the state of the run is saved, so that a killed run continues there and ends as it would have
ended. "Step" here means an optimizer step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsqueeze.distillation.losses import distillation_loss, kl_from_teacher
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import Student
from llmsqueeze.distillation.teacher import Answers
from llmsqueeze.distillation.trained import Trained
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.files import whole_file
from llmsqueeze.model.tensors import shard
from llmsqueeze.progress import Progress

STATE = "state.safetensors"
BATCH_TOKENS = 2048  # tokens that go through the student at once; a larger batch is split
LOGITS_BYTES = 256 << 20  # likewise, by the size of their logits

BETAS = (0.9, 0.95)  # of Adam

Sample = TypeVar("Sample")


@dataclass
class TrainingState:
    """The progress of a run.

    step: optimizer steps done. before, best: KL divergence on held-back samples before the first step and at
    `best_step`, nats per token. moved: codes that moved. reordered: how often alphas had to be put in order. stopped:
    why the run ended early.
    """

    step: int = 0
    before: float = math.nan
    best: float = math.inf
    best_step: int = 0
    moved: int = 0
    reordered: int = 0
    stopped: str | None = None


def train(
    student: Student,
    rows: Sequence[Tensor],
    held_back: Sequence[Tensor],
    settings: Distillation,
    answers: Answers,
    work: Path,
    progress: Progress,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Trains on `rows` [1, length] from the saved state in `work`, or from the beginning.

    Returns the final state, and the best tensors by their names in the file. Raises RecipeError if the folder holds
    nothing to train, CheckpointError for a damaged state.
    """
    trained = student.trained
    groups = trained.parameter_groups(settings.lr)
    if not groups:
        raise RecipeError(f"--train {','.join(settings.train)}: the folder holds no such values")
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    state, best = load_state(work, trained, optimizer)
    if state.step == 0:
        state.before = state.best = held_back_kl(student, held_back, answers)
        best = trained.stored()
        progress.note(f"before: divergence from the teacher on held-back text {state.before:.4f} nats per token")
    progress.stage("distill", settings.steps - state.step)
    while state.step < settings.steps and state.stopped is None:
        set_rate(optimizer, settings.rate(state.step))
        loss = optimizer_step(student, optimizer, batch_of(rows, settings, state.step), settings, answers, state)
        state.step += 1
        if not math.isfinite(loss):
            state.stopped = f"the loss became {loss} at step {state.step}; the result is the best before it"
            progress.note(state.stopped)
        elif state.step % settings.every == 0 or state.step == settings.steps:
            divergence = held_back_kl(student, held_back, answers)
            if divergence < state.best:
                state.best, state.best_step, best = divergence, state.step, trained.stored()
            progress.note(f"step {state.step}: loss {loss:.4f}, divergence on held-back text {divergence:.4f}")
            save_state(work, trained, optimizer, state, best)
        progress.advance()
    return state, best


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets the learning rate of every group to this share of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share


def batch_of(rows: Sequence[Sample], settings: Distillation, step: int) -> list[Sample]:
    """The samples of a step: in every epoch all, in another order, by seed."""
    size = min(settings.batch_size, len(rows))
    epoch, batch = divmod(step, len(rows) // size)
    generator = torch.Generator().manual_seed(settings.seed + 7919 * (epoch + 1))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[batch * size : (batch + 1) * size]]


def optimizer_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Tensor],
    settings: Distillation,
    answers: Answers,
    state: TrainingState,
) -> float:
    """One step on a batch, a chunk of rows at a time; returns its loss. A loss that is not finite changes nothing."""
    optimizer.zero_grad()
    total = 0.0
    weight = settings.weight if settings.loss == "dad" else 0.0
    for chunk in chunks(batch, student.vocabulary):
        teacher = answers.read(chunk, student.device)
        loss = distillation_loss(student.logits(torch.cat(chunk)), teacher, weight, settings.gamma)
        share = len(chunk) / len(batch)
        (loss * share).backward()
        total += float(loss.detach()) * share
    if not math.isfinite(total):
        return total
    optimizer.step()
    state.moved += student.trained.after_step(settings.moves, settings.code_rate(state.step))
    state.reordered = student.trained.reordered
    return total


def held_back_kl(student: Student, rows: Sequence[Tensor], answers: Answers) -> float:
    """Mean KL(teacher || student), nats per token, with the values that the file will hold; inf if it is not finite."""
    total, tokens = 0.0, 0
    with student.trained.as_stored():
        for chunk in chunks(rows, student.vocabulary):
            kl = kl_from_teacher(student.logits(torch.cat(chunk)), answers.read(chunk, student.device))
            total += float(kl.double().sum())
            tokens += len(kl)
    return total / tokens if math.isfinite(total) else math.inf


def chunks(rows: Sequence[Tensor], vocabulary: int) -> list[list[Tensor]]:
    """Rows of one length [1, length], at least one at a time, and as many as BATCH_TOKENS and LOGITS_BYTES allow."""
    tokens = min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary))
    size = max(1, tokens // rows[0].shape[1])
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def save_state(
    work: Path, trained: Trained, optimizer: torch.optim.Optimizer, state: TrainingState, best: Mapping[str, Tensor]
) -> None:
    """Writes everything that a run needs to continue."""
    tensors = {f"student.{name}": tensor for name, tensor in trained.state().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    write_state(work / STATE, state, tensors)


def load_state(
    work: Path, trained: Trained, optimizer: torch.optim.Optimizer
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Continues from a saved state, if there is one. Raises CheckpointError if it is damaged."""
    saved = read_state(work / STATE, f"remove {work} to begin again")
    if saved is None:
        return TrainingState(), {}
    state, tensors = saved

    def of(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}

    trained.restore(of("student."))
    for part in trained.codes[:1]:
        part.reordered = state.reordered
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in of("optimizer.").items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state, of("best.")


def write_state(path: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Writes the file, which appears when it is whole."""
    with whole_file(path) as half:
        shard.write(half, tensors, {"state": json.dumps(asdict(state))})


def read_state(path: Path, remedy: str) -> tuple[TrainingState, dict[str, Tensor]] | None:
    """What was saved; None if there is nothing. Raises CheckpointError, which ends with the `remedy`, if the file is
    damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = TrainingState(**json.loads(file.metadata()["state"]))
        return state, shard.read(path)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, CheckpointError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
