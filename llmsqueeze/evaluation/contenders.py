"""The models of a comparison: found, checked against the original, and with their sizes, before any of them opens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.evaluation import bnb
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.formats.entries import format_of
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.config import empty_model, load_config, vocabulary
from llmsqueeze.model.linears import find_blocks, find_linears
from llmsqueeze.model.original import locate


@dataclass(frozen=True)
class StoredModel:
    """A folder or Hub id. kind: `original`, or the format that it is stored in. The sizes are those of its files.
    method, bits: how it was compressed and the width of its codes, as far as it tells."""

    name: str
    kind: str
    open: Callable[[], OpenModel]
    nbytes: int
    bits_per_weight: float
    method: str | None = None
    bits: float | None = None


@dataclass(frozen=True)
class RoundedModel:
    """The original, which bitsandbytes rounds while it opens. Its sizes can be counted only then."""

    name: str
    kind: str
    open: Callable[[], OpenModel]
    method: str
    bits: float


Contender = StoredModel | RoundedModel


def find_contenders(
    original: str,
    folders: Sequence[str],
    bnb_types: Sequence[str],
    device: torch.device,
    trust_remote_code: bool,
    dtype: str,
) -> tuple[StoredModel, list[Contender]]:
    """The original, and the models to compare it with. dtype: what they compute in (`precision.DTYPES`).

    Raises RecipeError, CheckpointError or HubError for a model that cannot be found, UnsupportedError for a
    vocabulary of another size.
    """
    if not folders and not bnb_types:
        raise RecipeError("there is nothing to compare the original with; name folders, or --bnb nf4")
    if twice := next((name for name in folders if name == original or list(folders).count(name) > 1), None):
        raise RecipeError(f"{twice} is named twice")
    path = locate(original)
    config = load_config(path, trust_remote_code)
    checkpoint = open_checkpoint(path)
    model = empty_model(path, config, trust_remote_code)
    linears = {name for block in find_blocks(model) for name in find_linears(model, block)}

    def stored(name: str, kind: str, files: Checkpoint) -> StoredModel:
        opener = partial(open_model, name, device, trust_remote_code, dtype)
        made = (None, None) if kind == "original" else method_and_bits(files)
        return StoredModel(name, kind, opener, files.nbytes, bits_per_weight(files, model, linears), *made)

    others: list[Contender] = []
    for name in folders:
        folder = locate(name)
        files = open_checkpoint(folder)
        size, expected = vocabulary(load_config(folder, trust_remote_code)), vocabulary(config)
        if size != expected:
            raise UnsupportedError(
                f"{name} has a vocabulary of {size} tokens and {original} one of {expected}: {name} was not "
                f"made from {original}, so they cannot be compared"
            )
        others.append(stored(name, format_of(files), files))
    for kind in bnb_types:
        opener = partial(open_model, original, device, trust_remote_code, dtype, loader=partial(bnb.load, kind=kind))
        name = f"{Path(original).name} ({kind})"
        others.append(RoundedModel(name, bnb.NAMES[kind], opener, bnb.NAMES[kind], bnb.BITS[kind]))
    return stored(original, "original", checkpoint), others


def method_and_bits(checkpoint: Checkpoint) -> tuple[str | None, float | None]:
    """How a folder was compressed and the width of its codes: of our record, or of what another tool wrote into the
    config; None for what it does not tell."""
    record = read_record(checkpoint.path)
    if recipe := record.get("recipe"):
        width = record.get("code_bits") or recipe.get("bits")
        return recipe.get("method"), None if width is None else round(float(width), 2)
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, dict):
        return None, None
    return str(config.get("quant_method")), _width(config)


def _width(config: Mapping[str, Any]) -> float | None:
    """The first width of weights that a quantization config names, however deep."""
    named = (config.get(key) for key in ("bits", "w_bit", "num_bits", "weight_bits"))
    widths = [float(one) for one in named if isinstance(one, (int, float)) and not isinstance(one, bool)]
    inner = (_width(value) for value in config.values() if isinstance(value, dict))
    return next((width for width in (*widths, *inner) if width is not None), None)


def bits_per_weight(checkpoint: Checkpoint, model: PreTrainedModel, linears: Iterable[str]) -> float:
    """Bits per weight of the compressed linears, with every byte that is stored for them except biases.

    If the folder compresses none, bits per weight of all linears. `model` is the original, without its weights.
    """
    total = {True: [0, 0], False: [0, 0]}  # compressed or not -> bytes, weights
    prefix = f"{model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in checkpoint.tensors)  # as GPT-2 is on the Hub
    stored = {prefix + name if bare else name: tensor for name, tensor in checkpoint.tensors.items()}
    by_linear = tensors_by_linear(stored, linears)
    for linear in linears:
        names = [name for name in by_linear[linear] if name != f"{linear}.bias"]
        if names:
            compressed = names != [f"{linear}.weight"]
            total[compressed][0] += sum(stored[name].nbytes for name in names)
            total[compressed][1] += model.get_parameter(f"{linear}.weight").numel()
    nbytes, numel = total[True] if total[True][1] else total[False]
    return round(8 * nbytes / numel, 6) if numel else math.nan


def tensors_by_linear(tensors: Iterable[str], linears: Iterable[str]) -> dict[str, list[str]]:
    """linear -> the tensors below its name."""
    by_linear: dict[str, list[str]] = {linear: [] for linear in linears}
    for name in tensors:
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in by_linear:
                by_linear[parent].append(name)
                break
    return by_linear
