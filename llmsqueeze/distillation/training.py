"""The steps of a distillation: the student trains on the teacher's answers, and the best that was measured is kept.

Every so often the student is measured on held-back samples with the values that the file will hold, and all that is
needed to go on is written, so that a run that was killed goes on from there and ends as it would have ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze.distillation.losses import distillation_loss, divergences
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import Student
from llmsqueeze.distillation.teacher import answers, together
from llmsqueeze.distillation.trained import Trained
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.files import whole_file
from llmsqueeze.progress import Progress

STATE = "state.safetensors"
CHECKS = 10  # measurements on held-back samples, over a run
BATCH_TOKENS = 2048  # that go through the student at once; a batch of more is summed up
LOGITS_BYTES = 256 << 20  # likewise

BETAS = (0.9, 0.95)  # Adam's
Answers = tuple[Path, str]  # where the teacher's are, and under which key


@dataclass
class State:
    """Where training stands: steps done, the best measured and where, and what went wrong."""

    step: int = 0
    before: float = math.nan
    best: float = math.inf
    best_step: int = 0
    moved: int = 0
    guarded: int = 0
    stopped: str | None = None


def train(
    student: Student,
    rows: Sequence[Tensor],
    apart: Sequence[Tensor],
    settings: Distillation,
    answered: Answers,
    work: Path,
    progress: Progress,
) -> tuple[State, dict[str, Tensor]]:
    """The steps from where they stand; returns how it went, and the best tensors by their names in the file."""
    trained = student.trained
    groups = trained.parameter_groups(settings.lr)
    if not groups:
        raise RecipeError(f"train {', '.join(settings.train)} names nothing that the folder holds")
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    state, best = resume(work, trained, optimizer)
    every = max(1, settings.steps // CHECKS)
    if state.step == 0:
        state.before = state.best = held_back_divergence(student, apart, answered)
        best = trained.stored()
        progress.note(f"before: divergence from the teacher on held-back text {state.before:.4f} nats per token")
    progress.stage("distill", settings.steps - state.step)
    while state.step < settings.steps and state.stopped is None:
        set_rate(optimizer, settings.rate(state.step))
        loss = step(student, optimizer, batch_of(rows, settings, state.step), settings, answered, state)
        state.step += 1
        if not math.isfinite(loss):
            state.stopped = f"the loss became {loss} at step {state.step}; what was best before it is kept"
            progress.note(state.stopped)
        elif state.step % every == 0 or state.step == settings.steps:
            found = held_back_divergence(student, apart, answered)
            if found < state.best:
                state.best, state.best_step, best = found, state.step, trained.stored()
            progress.note(f"step {state.step}: loss {loss:.4f}, divergence on held-back text {found:.4f}")
            keep(work, trained, optimizer, state, best)
        progress.advance()
    return state, best


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Sets every group's learning rate to this share of its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share


def batch_of(rows: Sequence[Tensor], settings: Distillation, step: int) -> list[Tensor]:
    """The samples of a step: every epoch in another order, by seed."""
    size = min(settings.batch_size, len(rows))
    per_epoch = len(rows) // size
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(settings.seed + 7919 * (epoch + 1))
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[place * size : (place + 1) * size]]


def step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Tensor],
    settings: Distillation,
    answered: Answers,
    state: State,
) -> float:
    """One step on a batch, some rows at a time; returns its loss. Nothing is changed by one that is not finite."""
    optimizer.zero_grad()
    total = 0.0
    weight = settings.weight if settings.loss == "dad" else 0.0
    for some in chunks(batch, student.vocabulary):
        teacher = together([answers(*answered, row) for row in some], student.device)
        loss = distillation_loss(student.logits(torch.cat(some)), teacher, weight, settings.gamma)
        share = len(some) / len(batch)
        (loss * share).backward()
        total += float(loss.detach()) * share
    if not math.isfinite(total):
        return total
    optimizer.step()
    state.moved += student.trained.after_step(settings.moves, settings.wish(state.step))
    state.guarded = student.trained.guarded
    return total


def held_back_divergence(student: Student, rows: Sequence[Tensor], answered: Answers) -> float:
    """Mean KL(teacher || student), nats per token, with the values that the file will hold; inf where it is NaN."""
    total, tokens = 0.0, 0
    with student.trained.as_stored():
        for some in chunks(rows, student.vocabulary):
            teacher = together([answers(*answered, row) for row in some], student.device)
            losses = divergences(student.logits(torch.cat(some)), teacher)
            total += float(losses.double().sum())
            tokens += len(losses)
    return total / tokens if math.isfinite(total) else math.inf


def chunks(rows: Sequence[Tensor], vocabulary: int) -> list[list[Tensor]]:
    """Rows of one length [1, length], as many at a time as have few tokens and small logits, at least one."""
    tokens = min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary))
    size = max(1, tokens // rows[0].shape[1])
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def keep(
    work: Path, trained: Trained, optimizer: torch.optim.Optimizer, state: State, best: Mapping[str, Tensor]
) -> None:
    """Writes everything that a run needs to go on."""
    held = {f"student.{name}": tensor for name, tensor in trained.state().items()}
    held |= {f"best.{name}": tensor for name, tensor in best.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        held |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    with whole_file(work / STATE) as half:
        save_file({name: t.cpu().contiguous() for name, t in held.items()}, half, {"state": json.dumps(asdict(state))})


def resume(work: Path, trained: Trained, optimizer: torch.optim.Optimizer) -> tuple[State, dict[str, Tensor]]:
    """Where a killed run stood, taken up; the beginning where there was none."""
    if not (work / STATE).exists():
        return State(), {}
    try:
        with safe_open(work / STATE, framework="pt") as file:
            state = State(**json.loads(file.metadata()["state"]))
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{work / STATE} is damaged ({error}); remove {work} to begin anew") from error

    def of(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): t for name, t in held.items() if name.startswith(kind)}

    trained.restore(of("student."))
    for part in trained.codes[:1]:
        part.guarded = state.guarded
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in of("optimizer.").items():
        number, _, key = name.partition(".")
        moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state, of("best.")
