"""The verb `export`: a compressed folder in another format, shard by shard; nothing is rounded again.

compressed-tensors: the same codes and scales under the names that stock transformers and vLLM know; refused where a
part has no place there. dense: the sum of the parts as an ordinary checkpoint, for whatever opens one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmsqueeze import parts
from llmsqueeze.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.checks import choice
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json_if_there
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.formats.entries import Entry, read_entries, read_parts
from llmsqueeze.output import check_writable
from llmsqueeze.parts import spec_grid
from llmsqueeze.progress import Progress
from llmsqueeze.rewrite import rewrite
from llmsqueeze.skeleton import all_linears, empty_model, is_transposed, load_config

TARGETS = ("compressed-tensors", "dense")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    folder: str,
    target: str,
    out: Path | None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the folder in the format `target`; `dtype` (bf16, fp16, fp32) is for dense weights, else the model's own.

    Raises UnsupportedError where a part would be lost, naming the first.
    """
    target, dtype = checked(target, dtype)
    source, progress = Path(folder), progress or Progress()
    if not source.is_dir():
        raise RecipeError(f"{source} is no folder; export converts one that llmsqueeze wrote")
    checkpoint = open_checkpoint(source)
    entries = read_entries(checkpoint)
    out = out or source.with_name(f"{source.resolve().name}-{target}")
    check_writable(out, overwrite)
    model = empty_model(source, load_config(source, trust_remote_code), trust_remote_code)
    transposed = {name for name in entries if is_transposed(model.get_submodule(name))}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if target == "compressed-tensors":
        refuse_loss(source, entries, transposed)
        config["quantization_config"] = portable_config(model, entries)
    elif dtype is not None:
        config["dtype"] = parts.dtype_name(DTYPES[dtype])
    record = read_json_if_there(source / SIDECAR)
    stored = {name for entry in entries.values() for name in entry.tensors}
    kept = checkpoint.nbytes - sum(checkpoint.tensors[name].nbytes for name in stored)
    numel = sum(rows * cols for rows, cols in (entry.shape for entry in entries.values()))

    def sidecar(nbytes: int) -> Mapping[str, Any]:
        return record | {"nbytes": nbytes, "bits_per_weight": round((nbytes - kept) * 8 / numel, 6), "format": target}

    needed = 2 * checkpoint.nbytes if target == "compressed-tensors" else dense_nbytes(entries, dtype) + kept
    shard_of = converter(checkpoint, entries, target, dtype, transposed)
    nbytes = rewrite(checkpoint, out, needed, overwrite, shard_of, config, sidecar, progress)
    return {
        "out": str(out),
        "model": folder,
        "target": target,
        "nbytes_before": checkpoint.nbytes,
        "nbytes": nbytes,
        "linears": len(entries),
    }


def checked(target: str, dtype: str | None) -> tuple[str, str | None]:
    """What was asked for, if there is such a thing. Raises RecipeError."""
    target = choice(TARGETS)("target", target)
    if dtype is not None:
        dtype = choice(tuple(DTYPES))("dtype", dtype)
        if target != "dense":
            raise RecipeError(f"dtype {dtype} goes with --to dense; {target} keeps the model's own")
    return target, dtype


def converter(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], target: str, dtype: str | None, transposed: set[str]
) -> Callable[[list[str]], dict[str, Tensor]]:
    """Names of the tensors in a file -> those of the new file; a linear goes where the first of its tensors was."""
    owner = {name: linear for linear, entry in entries.items() for name in entry.tensors}
    first = {entry.tensors[0] for entry in entries.values()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for name in names:
            if name not in owner:
                held[name] = as_asked(checkpoint.read(name), target, dtype)
            elif name in first:
                linear = owner[name]
                held |= converted(checkpoint, linear, entries[linear], target, dtype, linear in transposed)
        return held

    return shard_of


def refuse_loss(source: Path, entries: Mapping[str, Entry], transposed: set[str]) -> None:
    """Raises UnsupportedError if compressed-tensors has no place for something that the folder holds."""
    for linear, entry in entries.items():
        what = "a transposed weight (Conv1D)" if linear in transposed else None
        what = what or compressed_tensors.lost(entry.shape, entry.specs)
        if what is not None:
            raise UnsupportedError(
                f"{linear} in {source} holds {what}, which compressed-tensors has no place for; quantize with "
                "--portable, or export --to dense"
            )


def portable_config(model: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The quantization config of linears that compressed-tensors can hold; all others are on its ignore list."""
    grids = {name: (spec_grid(entry.specs[0]), entry.shape[1]) for name, entry in entries.items()}
    return compressed_tensors.quantization_config(grids, all_linears(model) - set(entries))


def converted(
    checkpoint: Checkpoint, linear: str, entry: Entry, target: str, dtype: str | None, transposed: bool
) -> dict[str, Tensor]:
    """A linear's tensors in the format `target`."""
    held = read_parts(checkpoint, entry)
    if target == "compressed-tensors":
        return compressed_tensors.stored_tensors(linear, held)
    own = getattr(torch, entry.specs[0]["dtype"])
    dense = parts.sum_of_parts(held).to(DTYPES[dtype] if dtype else own)
    if not bool(dense.isfinite().all()):
        raise UnsupportedError(f"{linear} has weights beyond what {dtype or dense.dtype} can hold; take --dtype bf16")
    return {f"{linear}.weight": dense.T.contiguous() if transposed else dense}


def as_asked(tensor: Tensor, target: str, dtype: str | None) -> Tensor:
    """What was not compressed, in the dtype asked for."""
    return tensor.to(DTYPES[dtype]) if target == "dense" and dtype and tensor.is_floating_point() else tensor


def dense_nbytes(entries: Mapping[str, Entry], dtype: str | None) -> int:
    """Bytes of the linears' dense weights."""
    return sum(
        rows * cols * (DTYPES[dtype] if dtype else getattr(torch, entry.specs[0]["dtype"])).itemsize
        for entry in entries.values()
        for rows, cols in [entry.shape]
    )
