"""The names that files have in a model folder, and how JSON and YAML are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmsqueeze.errors import CheckpointError, OutputError, RecipeError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDECAR = "llmsqueeze.json"  # what was done: recipe, calibration, sizes, errors
EVALUATION = "evaluation.json"  # the last scores that `llmsqueeze eval` measured
COMPARISON = "comparison.json"  # the table that `llmsqueeze compare` measured, this folder among the models
FRONTIER = "frontier.png"  # and its picture
TEMPLATES = "additional_chat_templates"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHER_WEIGHTS = ("*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "*.npz", "*.mlmodel")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises CheckpointError when the file cannot be read as one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds a {type(value).__name__}; a JSON object is expected")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Raises OutputError."""
    try:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write to; the file appears at `path` when the block ends, whole. Raises OutputError."""
    half = path.with_suffix(".half")
    try:
        yield half
        half.rename(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def read_yaml(path: Path, what: str) -> Any:
    """What the YAML file `path` holds. Raises RecipeError where there is none, calling it by `what` it should be."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no {what} {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from error


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty for a file that does not exist."""
    return read_json(path) if path.exists() else {}
