"""The native format: its entry in `config.json`, and the names of the parts' tensors.

    "quantization_config": {
      "quant_method": "llmsqueeze", "format_version": 1,
      "weights": {"model.layers.0.mlp.up_proj": {"shape": [rows, cols], "parts": [
          {"part": "affine", "bits": 3, "group_size": 128, "symmetric": true, "dtype": "bfloat16"},
          {"part": "sparse", "count": 4521, "dtype": "bfloat16"}]}}}

Tensor t of part i of a linear is `<linear>.parts.<i>.<t>`; the linear's bias keeps its name. The parts define their
tensors (llmsqueeze/parts/; README.md lists them). A reader refuses versions that it does not know.

Version 1 has affine and sparse parts.
Version 2 adds affine parts on some rows (`"rows"`: their number, and a tensor `rows` that marks them) or with
half-integer levels (`"half": true`), and low-rank parts.
Version 3 adds dual-binary parts (`"part": "dual_binary", "group_size", "dtype"`, and `"rows"` as above).
Version 5 adds coded parts (`"part": "coded", "words", "tables", "rows_per_stream", "escapes", "dtype"`), their decoded
form (`"part": "integers", "escapes", "dtype"`), which a model that was opened with `keep_codes` saves, and affine and
dual-binary parts with entropy-coded codes (`"streams": {"words", "tables", "rows_per_stream"}`).
Version 4 was version 5 without checksums. It was never released, and no reader accepts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import CheckpointError, UnsupportedError, first_line
from llmsqueeze.progress.stopwatch import timed

METHOD = "llmsqueeze"
FORMAT_VERSIONS = (1, 2, 3, 5)
# numbers in a spec, and the least value of each
LEAST = {
    "bits": 1,
    "group_size": -1,
    "rows": 0,
    "words": 0,
    "tables": 0,
    "rows_per_stream": 1,
    "escapes": 0,
    "count": 0,
    "rank": 0,
}
NEW_IN_2 = {"rows", "half"}


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The entry `quantization_config` of `config.json`."""
    planned = {**plan.weights, **plan.beside}
    weights = {name: {"shape": list(w.shape), "parts": w.specs} for name, w in planned.items()}
    return {"quant_method": METHOD, "format_version": format_version(plan), "weights": weights}


def format_version(plan: Plan) -> int:
    """The oldest version that has everything in the plan."""
    specs = [spec for weight in plan.weights.values() for spec in weight.specs]
    if any(spec["part"] in ("coded", "integers") or "streams" in spec for spec in specs):
        return 5
    if any(spec["part"] == "dual_binary" for spec in specs):
        return 3
    return 2 if any(NEW_IN_2 & set(spec) or spec["part"] == "lowrank" for spec in specs) else 1


@timed("pack")
def stored_tensors(linear: str, weight_parts: Sequence[Any]) -> dict[str, Any]:
    """Name in the file -> tensor, for the parts of a linear, or for what has specs and tensors like parts."""
    return {
        tensor_name(linear, i, name): tensor
        for i, part in enumerate(weight_parts)
        for name, tensor in part.tensors().items()
    }


def tensor_name(linear: str, part: int, tensor: str) -> str:
    return f"{linear}.parts.{part}.{tensor}"


def weight_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """linear -> {"shape", "parts"} of a `quantization_config`. Raises UnsupportedError for an unknown version,
    CheckpointError for a config that is not as ours are."""
    version = config.get("format_version")
    if config.get("quant_method") != METHOD or version not in FORMAT_VERSIONS:
        newer = isinstance(version, int) and version > FORMAT_VERSIONS[-1]
        raise UnsupportedError(
            f"quantization format {config.get('quant_method')!r} version {version!r} is not read by this version; "
            f"it reads {METHOD!r} version {', '.join(map(str, FORMAT_VERSIONS))}"
            + ("; a newer llmsqueeze reads it: pip install --upgrade llmsqueeze" if newer else "")
            + ("; no version reads 4, which had no checksums: compress the original again" if version == 4 else "")
        )
    entries = config.get("weights")
    if not isinstance(entries, dict):
        raise CheckpointError("quantization_config lists no weights")
    for name, entry in entries.items():
        check_entry(name, entry)
    return entries


def check_entry(name: str, entry: Any) -> None:
    """Raises CheckpointError if the entry of linear `name` is not as ours are."""
    if not isinstance(entry, dict) or not isinstance(entry.get("parts"), list) or not entry["parts"]:
        raise CheckpointError(f"quantization_config has no parts for {name}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise CheckpointError(
            f"the shape of {name} is {shape!r} in quantization_config; it must be two numbers above 0"
        )
    for spec in entry["parts"]:
        if not isinstance(spec, dict) or not isinstance(spec.get("streams", {}), dict):
            raise CheckpointError(f"quantization_config describes a part of {name} as {spec!r}")
        for key, value in (spec | spec.get("streams", {})).items():
            if key in LEAST and (type(value) is not int or value < LEAST[key]):
                raise CheckpointError(
                    f"{key} of {name} is {value!r} in quantization_config; it must be a whole number from {LEAST[key]}"
                )
        if spec.get("part") not in parts.PARTS:
            raise CheckpointError(f"{name} holds a part of kind {spec.get('part')!r}; known: {', '.join(parts.PARTS)}")
        if not isinstance(getattr(torch, str(spec.get("dtype")), None), torch.dtype):
            raise CheckpointError(
                f"dtype of {name} is {spec.get('dtype')!r} in quantization_config; torch has no such dtype"
            )
        try:
            parts.layout((shape[0], shape[1]), spec)
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"quantization_config describes a part of {name} incompletely: {first_line(error)} is missing or wrong"
            ) from error
