"""The verb `distill`: trains a compressed folder to predict as its original does.

First the original's predictions are written (teacher.py). Then the student trains on them, as a whole (training.py) or
block by block (blockwise.py). The result is never worse than the input on held-back text: it is the best that was
measured, or the same folder again. Until then `<out>.distill` holds everything that a run needs to continue.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.distillation.blockwise import train_blocks
from llmsqueeze.distillation.folder import check_adapter, check_teacher, check_trainable, original_of, write_folder
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import Student
from llmsqueeze.distillation.teacher import Answers, ask
from llmsqueeze.distillation.training import TrainingState, train
from llmsqueeze.errors import CalibrationError, OutputError
from llmsqueeze.files import read_json, whole_file
from llmsqueeze.formats.folder import check_writable
from llmsqueeze.formats.opened import Folder, open_compressed
from llmsqueeze.memory import peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.calibration import Earlier, read_calibration
from llmsqueeze.model.checkpoint import Checkpoint, file_digests, open_checkpoint, weights_digest
from llmsqueeze.model.original import Source, open_original, pick_device
from llmsqueeze.model.precision import fastest_dtype
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parallel import processes
from llmsqueeze.parts.grid import dtype_name
from llmsqueeze.progress import Progress
from llmsqueeze.text.rows import Calibration
from llmsqueeze.text.source import check_calibration

SETTINGS = "settings.json"
PRODUCTS = ("float32", "bfloat16")


def distill(
    folder: str,
    teacher: str | None,
    settings: Distillation,
    out: Path | None,
    *,
    teacher_cache: Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    merge_adapter: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the compressed `folder` on the predictions of `teacher`, by default its original, and writes `out`.

    teacher_cache: folder for the predictions, to use them again. adapter: a LoRA adapter to merge into the teacher
    first; merge_adapter: the one in the teacher's folder. Returns the summary that the command prints; its
    divergences are in nats per token. Raises RecipeError, UnsupportedError, CalibrationError, OutputError or
    CheckpointError."""
    start, progress, chosen_device = time.monotonic(), progress or Progress(), pick_device(device)
    student = open_compressed(folder, "distill needs one that `llmsqueeze quantize` wrote", trust_remote_code)
    out = out or student.path.with_name(student.path.resolve().name + "-distilled")
    check_writable(out, overwrite)
    check_calibration(settings.calibration)
    settings = with_products(settings, chosen_device, working_path(out))
    check_trainable(student, settings)
    source = Source(teacher or original_of(student), revision, trust_remote_code, adapter, merge_adapter)
    check_adapter(source, student)
    original = open_original(source)
    check_teacher(skeleton := original.skeleton, student, original.source.model)
    earlier = Earlier.of(student.record)
    about_text = settings.text, progress, settings.held_back, chosen_device, earlier
    text = processes.of_first(lambda: read_calibration(original, *about_text))
    samples = split(text.rows, text.held_back, settings.held_back)
    about = student.checkpoint, skeleton, settings, text.sha256
    work = processes.of_first(lambda: working_folder(out, *about))
    needed = samples[1] if settings.blockwise else [*samples[0], *samples[1]]
    cache = teacher_cache or work / "teacher"
    answers = ask(skeleton, needed, cache, settings.top_k, chosen_device, progress, work)

    def train_and_write() -> tuple[TrainingState, dict[str, Any]]:
        state, best = trained(student, skeleton, samples, settings, answers, work, chosen_device, progress)
        record = record_of(original.source.model, text, settings, state)
        opens = write_folder(student, best, record, out, overwrite, progress)
        shutil.rmtree(work, ignore_errors=True)
        return state, opens

    state, opens = processes.of_first(train_and_write)
    sizes = {"nbytes": open_checkpoint(out).nbytes, "nbytes_before": student.checkpoint.nbytes}
    spent = {
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_mb": peak_memory_mb(),
        "peak_device_memory_mb": peak_device_memory_mb(str(chosen_device)),
    }
    return summary_of(original.source.model, text, settings, state, folder, out) | opens | sizes | spent


def trained(
    student: Folder,
    skeleton: Skeleton,
    samples: tuple[list[Tensor], list[Tensor]],
    settings: Distillation,
    answers: Answers,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """The student trained on the first of the samples and measured on the others, block by block or as a whole: how it
    went, and the best of its tensors; none if no step made it better."""
    rows, held_back = samples
    if settings.blockwise:
        about = settings, answers, work, device, progress
        state, best = train_blocks(skeleton, student, rows, held_back, *about)
    else:
        trains, products = frozenset(settings.train), getattr(torch, settings.products)
        opened = Student(str(student.path), student.checkpoint, trains, device, student.trust_remote_code, products)
        state, best = train(opened, rows, held_back, settings, answers, work, progress)
    if not best:
        progress.note("no step made it better on held-back text: the result is the same folder again")
    return state, best


def with_products(settings: Distillation, device: torch.device, work: Path) -> Distillation:
    """The settings with the dtype of the products decided: if it is open, by a short trial, or as the killed run in
    `work` did."""
    if settings.products != "auto":
        return settings
    before = read_json(work / SETTINGS).get("products") if (work / SETTINGS).exists() else None
    chosen = dtype_name(torch.float32 if settings.blockwise else fastest_dtype(device))
    return replace(settings, products=before if before in PRODUCTS else chosen)


def summary_of(
    teacher: str, text: Calibration, settings: Distillation, state: TrainingState, folder: str, out: Path
) -> dict[str, Any]:
    """The result as the command prints it; kl_before and kl_after in nats per token."""
    return {
        "out": str(out),
        "model": folder,
        "teacher": teacher,
        "loss": "blockwise" if settings.blockwise else settings.loss,
        "steps": state.step,
        "best_step": state.best_step,
        "kl_before": state.before,
        "kl_after": state.best,
        "codes_moved": state.moved,
        "guarded": state.reordered,
        "stopped": state.stopped,
        "calibration": text.as_dict(),
    }


def split(rows: list[Tensor], held_back: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Samples to train on, and samples to measure on. If the text has none left for the latter, some of the former.

    Raises CalibrationError if there are fewer than four."""
    if held_back:
        return rows, held_back
    count = min(count, len(rows) // 4)
    if not count:
        raise CalibrationError(f"the text fills {len(rows)} samples, too few to hold some back; take shorter ones")
    return rows[:-count], rows[-count:]


def record_of(teacher: str, text: Calibration, settings: Distillation, state: TrainingState) -> dict[str, Any]:
    """The entry for this distillation in the folder's record; without paths and times."""
    local = Path(teacher).expanduser().is_dir()
    return {
        "teacher": Path(teacher).resolve().name if local else teacher,
        "settings": asdict(settings) | {"calibration": text.source},
        "calibration_sha256": text.sha256,
        "kl_before": state.before,
        "kl_after": state.best,
        "best_step": state.best_step,
    }


def working_path(out: Path) -> Path:
    """Where a run keeps what it needs to continue."""
    return out.with_name(out.name + ".distill")


def working_folder(out: Path, student: Checkpoint, skeleton: Skeleton, settings: Distillation, text: str) -> Path:
    """`<out>.distill`, with the settings of the run. Raises OutputError if it is there with other settings."""
    work = working_path(out)
    about: dict[str, Any] = asdict(settings) | {
        "text": text,
        "student": weights_digest(file_digests(student)),
        "original": weights_digest(file_digests(skeleton.checkpoint)),
    }
    about = json.loads(json.dumps(about))
    if (work / SETTINGS).exists():
        before = read_json(work / SETTINGS)
        differing = next((key for key in about if about[key] != before.get(key)), None)
        if differing is not None:
            raise OutputError(
                f"{work} belongs to a run with {differing} {before.get(differing)}, not {about[differing]}: repeat "
                "that run to continue it, or remove the folder"
            )
        return work
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {work}: {error}") from error
    with whole_file(work / SETTINGS) as half:
        half.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return work
