"""The verb `distill`: a folder that we wrote and its original -> the same folder, trained to answer as that does.

The teacher answers first, and its answers are kept (distillation/teacher.py); then the student trains on them, as a
whole (training.py there) or block by block (blockwise.py). What is written in the end is the best that was measured,
which may be what there was before. Until then everything that a run needs to go on is in `<out>.distill`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.distillation.blockwise import train_blocks
from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.distillation.student import Student
from llmsqueeze.distillation.teacher import ask
from llmsqueeze.distillation.training import State, train
from llmsqueeze.errors import CalibrationError, OutputError, RecipeError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json, read_json_if_there, whole_file
from llmsqueeze.formats import native, verify
from llmsqueeze.formats.entries import is_compressed, own_names, read_entries
from llmsqueeze.formats.folder import Output, check_writable, rewrite
from llmsqueeze.memory import peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.calibration import read_calibration
from llmsqueeze.model.checkpoint import Checkpoint, file_digests, open_checkpoint, weights_digest
from llmsqueeze.model.original import Source, open_original, pick_device
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.text import Calibration
from llmsqueeze.parts import LowRank
from llmsqueeze.progress import Progress


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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the compressed `folder` towards `teacher` and writes the result; returns what the command prints."""
    start, progress, place = time.monotonic(), progress or Progress(), pick_device(device)
    source = Path(folder)
    student = open_student(source)
    out = out or source.with_name(source.resolve().name + "-distilled")
    check_writable(out, overwrite)
    check_trainable(student, settings)
    original = open_original(Source(teacher or original_of(source), revision, trust_remote_code))
    skeleton = original.skeleton
    check_teacher(skeleton, student, source, original.source.model)
    text = read_calibration(original, settings.text, progress, settings.held_back, place)
    rows, apart = split(text.rows, text.held_back, settings.held_back)
    work = working_folder(out, student, skeleton, settings, text.sha256)
    cache, asked = teacher_cache or work / "teacher", apart if settings.blockwise else [*rows, *apart]
    answered = cache, ask(skeleton, asked, cache, settings.top_k, place, progress, work)
    if settings.blockwise:
        state, best = train_blocks(skeleton, student, rows, apart, settings, answered, work, place, progress)
    else:
        opened = Student(folder, student, frozenset(settings.train), place, trust_remote_code)
        state, best = train(opened, rows, apart, settings, answered, work, progress)
    if not best:
        progress.note("nothing that was tried is better than what there was: the result is the same folder again")
    write(student, best, record_of(original.source.model, text, settings, state), out, overwrite, trust_remote_code)
    shutil.rmtree(work, ignore_errors=True)
    return summary_of(original.source.model, text, settings, state, folder, out) | {
        "nbytes": open_checkpoint(out).nbytes,
        "nbytes_before": student.nbytes,
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_mb": peak_memory_mb(),
        "peak_device_memory_mb": peak_device_memory_mb(str(place)),
    }


def summary_of(
    teacher: str, text: Calibration, settings: Distillation, state: State, folder: str, out: Path
) -> dict[str, Any]:
    """What the command says of how it went."""
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
        "guarded": state.guarded,
        "stopped": state.stopped,
        "calibration": text.as_dict(),
    }


def split(rows: list[Tensor], apart: list[Tensor], wanted: int) -> tuple[list[Tensor], list[Tensor]]:
    """Samples to train on and samples to measure on, also where the text fills no more than the former."""
    if apart:
        return rows, apart
    count = min(wanted, len(rows) // 4)
    if not count:
        raise CalibrationError(f"the text fills {len(rows)} samples, too few to hold some back; take shorter ones")
    return rows[:-count], rows[-count:]


def record_of(teacher: str, text: Calibration, settings: Distillation, state: State) -> dict[str, Any]:
    """What the folder will say of its distillation; no paths and no times."""
    local = Path(teacher).expanduser().is_dir()
    return {
        "teacher": Path(teacher).resolve().name if local else teacher,
        "settings": asdict(settings) | {"calibration": text.source},
        "calibration_sha256": text.sha256,
        "kl_before": state.before,
        "kl_after": state.best,
        "best_step": state.best_step,
    }


def open_student(source: Path) -> Checkpoint:
    """The folder's tensors and config. Raises UnsupportedError for what we did not write."""
    if not source.is_dir():
        raise RecipeError(f"{source} is no folder; distill refines one that `llmsqueeze quantize` wrote")
    checkpoint = open_checkpoint(source)
    if not is_compressed(checkpoint):
        raise UnsupportedError(f"{source} was not compressed by llmsqueeze, so there is nothing to distil")
    read_entries(checkpoint)
    return checkpoint


def check_trainable(student: Checkpoint, settings: Distillation) -> None:
    """Raises RecipeError if the folder holds nothing of what `train` names."""
    kinds = {spec["part"] for entry in read_entries(student).values() for spec in entry.specs}
    if set(settings.train) == {"lowrank"} and LowRank.kind not in kinds:
        raise RecipeError(f"train lowrank: {student.path} holds no low-rank parts; choose scales, norms or codes too")


def original_of(source: Path) -> str:
    """What the folder says that it was made from. Raises RecipeError where that cannot be found."""
    name = read_json_if_there(source / SIDECAR).get("model")
    if not name:
        raise RecipeError(f"{source / SIDECAR} does not say what {source} was made from; name it with --teacher")
    if "/" not in name and name != "demo" and not Path(name).is_dir():
        raise RecipeError(f"{source} was made from a local folder {name}; say where it is with --teacher")
    return str(name)


def check_teacher(skeleton: Skeleton, student: Checkpoint, source: Path, teacher: str) -> None:
    """Raises RecipeError unless the student was made from this teacher."""
    made_from = read_json_if_there(source / SIDECAR).get("model")
    rows, _ = skeleton.embedding_shape
    embeddings: Any = skeleton.model.get_input_embeddings()
    name = next(name for name, p in skeleton.model.named_parameters() if p is embeddings.weight)
    held = student.tensors.get(name)
    if held is not None and held.shape[0] != rows:
        raise RecipeError(
            f"teacher {teacher} has a vocabulary of {rows} tokens, {source} one of {held.shape[0]}: "
            f"{source} was made from {made_from}"
        )
    wrong = f"{source} was made from {made_from}, and {teacher} is another model: "
    linears = {name for block in skeleton.linears for name in block}
    for linear, entry in read_entries(student).items():
        if linear not in {*linears, *skeleton.outer} or skeleton.shape(linear) != entry.shape:
            raise RecipeError(f"{wrong}it has no {linear} of {entry.shape[0]} x {entry.shape[1]}")
    if name.removesuffix(".weight") in read_entries(student):
        return  # coded, so that they tell nothing
    if held is None or not torch.equal(student.read(name), skeleton.checkpoint.read(skeleton.sources[name])):
        raise RecipeError(f"{wrong}its embeddings are not those that {source} kept")


def working_folder(out: Path, student: Checkpoint, skeleton: Skeleton, settings: Distillation, text: str) -> Path:
    """`<out>.distill`, with what it is the working folder of. Raises OutputError for one of another run."""
    work = out.with_name(out.name + ".distill")
    about = asdict(settings) | {
        "text": text,
        "student": weights_digest(file_digests(student)),
        "original": weights_digest(file_digests(skeleton.checkpoint)),
    }
    about = json.loads(json.dumps(about))
    if (work / "settings.json").exists():
        before = read_json(work / "settings.json")
        differing = next((key for key in about if about[key] != before.get(key)), None)
        if differing is not None:
            raise OutputError(
                f"{work} is of a run with {differing} {before.get(differing)}, not {about[differing]}: run that again "
                "to go on with it, or remove the folder"
            )
        return work
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {work}: {error}") from error
    with whole_file(work / "settings.json") as half:
        half.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return work


def write(
    student: Checkpoint,
    best: Mapping[str, Tensor],
    about: Mapping[str, Any],
    out: Path,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """The folder again, with the `best` tensors in the place of those that it had."""
    record = read_json_if_there(student.path / SIDECAR)
    taught = record | {"distillation": [*record.get("distillation", []), dict(about)]}

    stored_as = own_names(read_entries(student))
    best = {stored_as.get(name, name): tensor for name, tensor in best.items()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        return {name: best[name] if name in best else student.read_raw(name) for name in names}

    def inspect(output: Output) -> None:
        verify.verify(output, verify.Computed(weights=None), trust_remote_code=trust_remote_code)

    config = refitted(student.config, best)
    rewrite(student, out, student.nbytes, overwrite, shard_of, config, partial(sized, taught), inspect)


def sized(record: Mapping[str, Any], nbytes: int) -> dict[str, Any]:
    """The record with the bytes that the weights take now."""
    more = nbytes - record.get("nbytes", nbytes)
    if not more:
        return dict(record)
    bits = record["bits_per_weight"] + 8 * more / record["quantized_weights"]
    return {**record, "nbytes": nbytes, "bits_per_weight": round(bits, 6)}


def refitted(config: Mapping[str, Any], best: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config with the sizes that coded parts have now: their streams are made anew."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    weights = made["quantization_config"].get("weights", {})
    for linear, entry in weights.items():
        for i, spec in enumerate(entry["parts"]):
            words, tables = (best.get(native.tensor_name(linear, i, kind)) for kind in ("words", "tables"))
            if words is not None and tables is not None:
                streams = spec.get("streams", spec)
                streams |= {"words": len(words), "tables": len(tables)}
    return made
