"""The compressed linears of a folder, as its config describes them, in the native format or compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, UnsupportedError, first_line
from llmsqueeze.files import STRICT, conform
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.parts import Grid, Part, Spec

FORMATS = (native.METHOD, compressed_tensors.METHOD)  # with quantization_config
DENSE = "dense"  # the name of the format without


@dataclass(frozen=True)
class Entry:
    """A compressed linear: shape [rows, cols], the specs of its parts, and for each part: tensor of the part -> its
    name in the file. `beside`: names of tensors that belong to no part."""

    shape: tuple[int, int]
    specs: tuple[Spec, ...]
    names: tuple[Mapping[str, str], ...]
    beside: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def tensors(self) -> list[str]:
        """The names of all its tensors in the file."""
        return [name for names in self.names for name in names.values()] + list(self.beside)


class Group(BaseModel):
    """Linears that are compressed in the same way."""

    model_config = STRICT
    targets: list[str]
    weights: dict[str, Any] | None


class Groups(BaseModel):
    """What is read of the `quantization_config` of compressed-tensors."""

    model_config = STRICT
    config_groups: dict[str, Group]
    ignore: list[str] | None = None


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the folder is in one of our formats."""
    return format_of(checkpoint) in FORMATS


def format_of(checkpoint: Checkpoint) -> str:
    """llmsqueeze, compressed-tensors, dense, or another tool's name for its format."""
    config = checkpoint.config.get("quantization_config")
    return str(config.get("quant_method")) if isinstance(config, dict) else DENSE


def read_entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    """linear -> its entry. Raises UnsupportedError for a format that llmsqueeze does not read."""
    config: Any = checkpoint.config.get("quantization_config")
    method = format_of(checkpoint)
    if method == native.METHOD:
        return {name: _native(name, entry) for name, entry in native.weight_entries(config).items()}
    if method == compressed_tensors.METHOD:
        try:
            return _compressed_tensors(checkpoint, config)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"quantization_config of {checkpoint.path} is not as compressed-tensors' are: {first_line(error)} is "
                "missing or wrong"
            ) from error
    raise UnsupportedError(f"{checkpoint.path} was not compressed by llmsqueeze (its format is {method})")


def read_tensors(checkpoint: Checkpoint, entry: Entry, device: torch.device | str = "cpu") -> list[dict[str, Tensor]]:
    """For each part of a linear: tensor of the part -> its value in the file."""
    return [{kind: checkpoint.read_raw(name).to(device) for kind, name in names.items()} for names in entry.names]


def read_parts(checkpoint: Checkpoint, entry: Entry, device: torch.device | str = "cpu") -> list[Part]:
    """A linear's parts from the file, decoded. Raises CheckpointError for damaged streams."""
    stored = zip(entry.specs, read_tensors(checkpoint, entry, device), strict=True)
    try:
        return [parts.decoded(parts.restore(entry.shape, spec, tensors)) for spec, tensors in stored]
    except CheckpointError as error:
        linear = next(iter(entry.names[0].values())).partition(".parts.")[0]
        raise CheckpointError(f"{checkpoint.path}, {linear}: {error}") from error


def own_names(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Name of a part's tensor in the native format -> its name in the file."""
    return {
        native.tensor_name(linear, i, kind): name
        for linear, entry in entries.items()
        for i, names in enumerate(entry.names)
        for kind, name in names.items()
    }


def native_config(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The native format's `quantization_config` for linears in either format."""
    weights = {name: {"shape": list(entry.shape), "parts": list(entry.specs)} for name, entry in entries.items()}
    return {"quant_method": native.METHOD, "format_version": native.FORMAT_VERSIONS[-1], "weights": weights}


def _native(linear: str, entry: Mapping[str, Any]) -> Entry:
    shape = (entry["shape"][0], entry["shape"][1])
    names = tuple(
        {kind: native.tensor_name(linear, i, kind) for kind in parts.layout(shape, spec)}
        for i, spec in enumerate(entry["parts"])
    )
    return Entry(shape, tuple(entry["parts"]), names)


def _compressed_tensors(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Entry]:
    """Raises UnsupportedError if not as ours are: symmetric integers in groups or rows, columns in order."""
    conform(checkpoint.path / "config.json", config, Groups)
    entries: dict[str, Entry] = {}
    packed = f".{compressed_tensors.NAMES['codes']}"
    linears = [name.removesuffix(packed) for name in checkpoint.tensors if name.endswith(packed)]
    # of several groups a name is stronger than a pattern, and that than a class
    for group in sorted(config["config_groups"].values(), key=lambda group: min(map(_strength, group["targets"]))):
        weights = group["weights"]
        ours = weights["type"] == "int" and weights["symmetric"] and weights.get("strategy") in ("group", "channel")
        ours = ours and weights.get("actorder") in (None, "weight", "static") and not group.get("input_activations")
        targets = dict.fromkeys(group["targets"])
        if targets.keys() & set(compressed_tensors.EXPERTS):
            targets = dict.fromkeys(_experts(checkpoint))
        else:
            means = (compressed_tensors.named(target, linears) for target in targets)
            targets = dict.fromkeys(name for names in means for name in names if name not in entries)
        if not ours or not all("." in target for target in targets):
            raise UnsupportedError(
                f"{checkpoint.path} is in a form of compressed-tensors that llmsqueeze does not write"
            )
        grid = Grid(weights["num_bits"], weights["group_size"] or -1, symmetric=True)
        for linear in targets:
            names = {kind: f"{linear}.{name}" for kind, name in compressed_tensors.NAMES.items()}
            beside = f"{linear}.weight_shape"
            missing = next((name for name in (*names.values(), beside) if name not in checkpoint.tensors), None)
            if missing is not None:
                raise CheckpointError(f"{checkpoint.path} lacks {missing}, which its config describes")
            rows, cols = checkpoint.read_raw(beside).tolist()
            spec = parts.grid_spec(grid, checkpoint.tensors[names["scale"]].dtype)
            entries[linear] = Entry((rows, cols), (spec,), (names,), (beside,))
    return entries


def _strength(target: str) -> int:
    """0 for a name, 1 for a pattern, 2 for a class."""
    return 1 if target.startswith("re:") else 2 * ("." not in target)


def _experts(checkpoint: Checkpoint) -> list[str]:
    """The experts' linears that the file has in pieces (experts.py)."""
    packed = f".{compressed_tensors.NAMES['codes']}"
    return [name.removesuffix(packed) for name, one in checkpoint.tensors.items() if one.pieces and packed in name]
