"""The student's folder: opened and checked against its teacher, and written again with trained tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.distillation.settings import Distillation
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json_if_there
from llmsqueeze.formats import native, verify
from llmsqueeze.formats.entries import is_compressed, own_names, read_entries
from llmsqueeze.formats.folder import Output, rewrite
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import LowRank


def open_student(source: Path) -> Checkpoint:
    """The files of a compressed folder. Raises RecipeError if there is none, UnsupportedError if it is not ours."""
    if not source.is_dir():
        raise RecipeError(f"{source} is no folder; distill needs one that `llmsqueeze quantize` wrote")
    checkpoint = open_checkpoint(source)
    if not is_compressed(checkpoint):
        raise UnsupportedError(f"{source} was not compressed by llmsqueeze, so there is nothing to distil")
    read_entries(checkpoint)
    return checkpoint


def check_trainable(student: Checkpoint, settings: Distillation) -> None:
    """Raises RecipeError if the folder has no numbers of the kinds in `train`."""
    kinds = {spec["part"] for entry in read_entries(student).values() for spec in entry.specs}
    if set(settings.train) == {"lowrank"} and LowRank.kind not in kinds:
        raise RecipeError(f"train lowrank: {student.path} holds no low-rank parts; choose scales, norms or codes too")


def original_of(source: Path) -> str:
    """The original that the folder's record names. Raises RecipeError if it names none, or a local folder."""
    name = read_json_if_there(source / SIDECAR).get("model")
    if not name:
        raise RecipeError(f"{source / SIDECAR} does not name the original of {source}; name it with --teacher")
    if "/" not in name and name != "demo" and not Path(name).is_dir():
        raise RecipeError(f"{source} was made from a local folder {name}; give its path with --teacher")
    return str(name)


def check_teacher(skeleton: Skeleton, student: Checkpoint, source: Path, teacher: str) -> None:
    """Raises RecipeError unless the student was made from this teacher."""
    made_from = read_json_if_there(source / SIDECAR).get("model")
    rows, _ = skeleton.embedding_shape
    embeddings: Any = skeleton.model.get_input_embeddings()
    name = next(name for name, p in skeleton.model.named_parameters() if p is embeddings.weight)
    stored = student.tensors.get(name)
    if stored is not None and stored.shape[0] != rows:
        raise RecipeError(
            f"teacher {teacher} has a vocabulary of {rows} tokens, {source} one of {stored.shape[0]}: "
            f"{source} was made from {made_from}"
        )
    wrong = f"{source} was made from {made_from}, and {teacher} is another model: "
    linears = {name for block in skeleton.linears for name in block}
    for linear, entry in read_entries(student).items():
        if linear not in {*linears, *skeleton.ends} or skeleton.shape(linear) != entry.shape:
            raise RecipeError(f"{wrong}it has no {linear} of {entry.shape[0]} x {entry.shape[1]}")
    if name.removesuffix(".weight") in read_entries(student):
        return  # coded embeddings differ from the original's
    if stored is None or not torch.equal(student.read(name), skeleton.checkpoint.read(skeleton.sources[name])):
        raise RecipeError(f"{wrong}its embeddings are not those of {source}")


def write_folder(
    student: Checkpoint,
    best: Mapping[str, Tensor],
    entry: Mapping[str, Any],
    out: Path,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """Writes the student's folder to `out` with the `best` tensors in place of its own, and `entry` in its record."""
    record = read_json_if_there(student.path / SIDECAR)
    record = record | {"distillation": [*record.get("distillation", []), dict(entry)]}
    stored_as = own_names(read_entries(student))
    best = {stored_as.get(name, name): tensor for name, tensor in best.items()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        return {name: best[name] if name in best else student.read_raw(name) for name in names}

    def inspect(output: Output) -> None:
        verify.verify(output, verify.Computed(weights=None), trust_remote_code=trust_remote_code)

    config = refitted(student.config, best)
    rewrite(student, out, student.nbytes, overwrite, shard_of, config, partial(sized, record), inspect)


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
