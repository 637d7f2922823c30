"""The student's folder: checked against its teacher, and written again with trained tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.errors import RecipeError
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats import native, verify
from llmsqueeze.formats.entries import own_names
from llmsqueeze.formats.experts import experts_of
from llmsqueeze.formats.folder import Output, rewrite
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.original import Source
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import LowRank
from llmsqueeze.progress import Progress


def check_trainable(student: Folder, settings: Distillation) -> None:
    """Raises RecipeError if the folder has no numbers of the kinds in `train`."""
    kinds = {spec["part"] for entry in student.entries.values() for spec in entry.specs}
    if set(settings.train) == {"lowrank"} and LowRank.kind not in kinds:
        raise RecipeError(f"train lowrank: {student.path} holds no low-rank parts; choose scales, norms or codes too")


def original_of(student: Folder) -> str:
    """The original that the folder's record names. Raises RecipeError if it names none, or a local folder."""
    name, path = student.record.get("model"), student.path
    if not name:
        raise RecipeError(f"{path / SIDECAR} does not name the original of {path}; name it with --teacher")
    if "/" not in name and name != "demo" and not Path(name).is_dir():
        raise RecipeError(f"{path} was made from a local folder {name}; give its path with --teacher")
    return str(name)


def check_adapter(teacher: Source, student: Folder) -> None:
    """Raises RecipeError if an adapter was merged into the student's original, and the teacher is that original without
    it."""
    made_from, merged = student.record.get("model"), student.record.get("adapter")
    named = Path(teacher.model).expanduser()
    is_original = made_from in (teacher.model, named.absolute().name if named.exists() else None)
    if merged and is_original and teacher.adapter is None and not teacher.merge_adapter:
        raise RecipeError(
            f"{student.path} was made from {made_from} with a LoRA adapter ({merged}) merged: name the adapter with "
            "--adapter (--merge-adapter if it is in the original's folder), or the merged model with --teacher"
        )


def check_teacher(skeleton: Skeleton, student: Folder, teacher: str) -> None:
    """Raises RecipeError unless the student was made from this teacher."""
    source, made_from = student.path, student.record.get("model")
    rows, _ = skeleton.embedding_shape
    embeddings: Any = skeleton.model.get_input_embeddings()
    name = next(name for name, p in skeleton.model.named_parameters() if p is embeddings.weight)
    stored = student.checkpoint.tensors.get(name)
    if stored is not None and stored.shape[0] != rows:
        raise RecipeError(
            f"teacher {teacher} has a vocabulary of {rows} tokens, {source} one of {stored.shape[0]}: "
            f"{source} was made from {made_from}"
        )
    wrong = f"{source} was made from {made_from}, and {teacher} is another model: "
    linears = {*skeleton.all_linears, *skeleton.ends, *skeleton.tower_linears}
    for linear, entry in student.entries.items():
        if linear not in linears or skeleton.shape(linear) != entry.shape:
            raise RecipeError(f"{wrong}it has no {linear} of {entry.shape[0]} x {entry.shape[1]}")
    if name.removesuffix(".weight") in student.entries:
        return  # coded embeddings differ from the original's
    if stored is None or not torch.equal(student.checkpoint.read(name), skeleton.read(name)):
        raise RecipeError(f"{wrong}its embeddings are not those of {source}")


def write_folder(
    student: Folder,
    best: Mapping[str, Tensor],
    entry: Mapping[str, Any],
    out: Path,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the student's folder to `out` with the `best` tensors in place of its own, and `entry` in its record.
    Returns what opens it, for the summary."""
    checkpoint, trust = student.checkpoint, student.trust_remote_code
    record = student.record | {"distillation": [*student.record.get("distillation", []), dict(entry)]}
    stored_as = own_names(student.entries)
    best = {stored_as.get(name, name): tensor for name, tensor in best.items()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        return {name: best[name] if name in best else checkpoint.read_raw(name) for name in names}

    def inspect(output: Output) -> None:
        opens, opened = verify.rewritten(output, None, trust, progress)
        seen.update({"opens": opens, **opened.as_dict()})

    seen: dict[str, Any] = {}
    config, size, experts = refitted(checkpoint.config, best), partial(sized, record), experts_of(record)
    rewrite(checkpoint, out, checkpoint.nbytes, overwrite, shard_of, config, size, inspect, experts=experts)
    return seen


def sized(record: Mapping[str, Any], nbytes: int) -> dict[str, Any]:
    """The record with the sizes of the trained weights."""
    more = nbytes - record.get("nbytes", nbytes)
    if not more:
        return dict(record)
    bits = record["bits_per_weight"] + 8 * more / record["quantized_weights"]
    return {**record, "nbytes": nbytes, "bits_per_weight": round(bits, 6)}


def refitted(config: Mapping[str, Any], best: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config with the sizes of the streams that were encoded again."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    weights = copy["quantization_config"].get("weights", {})
    for linear, entry in weights.items():
        for i, spec in enumerate(entry["parts"]):
            words, tables = (best.get(native.tensor_name(linear, i, kind)) for kind in ("words", "tables"))
            if words is not None and tables is not None:
                streams = spec.get("streams", spec)
                streams |= {"words": len(words), "tables": len(tables)}
    return copy
