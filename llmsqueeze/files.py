"""The names of files in a model folder, and reading and writing of JSON and YAML."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from llmsqueeze.errors import CheckpointError, OutputError, RecipeError, SqueezeError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDECAR = "llmsqueeze.json"  # the record of the compression: recipe, calibration, sizes, errors
SPILL = "llmsqueeze-"  # how the names of folders with spilled activations begin
EVALUATION = "evaluation.json"  # the last scores that `llmsqueeze eval` measured
REPORT = "report.html"
COMPARISON = "comparison.json"  # the last table of `llmsqueeze compare` with this folder among the models
FRONTIER = "frontier.png"  # the picture of that table
TEMPLATES = "additional_chat_templates"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
)  # of a LoRA adapter, as PEFT has it

POINTER = b"version https://git-lfs"  # how a file begins that is not the file
MOST_JSON, MOST_YAML = 1 << 28, 1 << 24  # bytes of a file that is read as such

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHER_WEIGHTS = ("*.bin.index.json", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "*.npz", "*.mlmodel")


STRICT = ConfigDict(strict=True)  # of a class that says what a file of ours holds; other fields may be there
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def conform(path: Path, value: Any, form: type[BaseModel], error: type[SqueezeError] = CheckpointError) -> None:
    """Raises `error`, which names the file and the field, unless what the file holds is as `form` says."""
    try:
        form.model_validate(value)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False)[0]
        field, content = ".".join(map(str, first["loc"])) or "its content", repr(first["input"])
        content = content if len(content) <= 40 else f"{content[:40]}..."
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise error(f"'{path}': {field} is {content}; {said}") from wrong
    except RecursionError as deep:
        raise error(f"'{path}' holds lists in lists that are far too deep") from deep


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises CheckpointError if the file is not one, or is far too large for one."""
    try:
        value = json.loads(text_within(path, MOST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        if is_pointer(path):
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` there") from error
        raise CheckpointError(f"'{path}' is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' contains a {type(value).__name__}; a JSON object is expected")
    return value


def is_pointer(file: Path) -> bool:
    """Whether a file is what Git has in the place of a large one."""
    if not file.is_file():  # a pipe would be waited for
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_links(folder: Path) -> None:
    """Raises OutputError if a folder is a link, or holds anything but folders and files of its own: a run goes on with
    what it has left, writes to it and removes it."""
    inside = (Path(at) / name for at, folders, files in os.walk(folder) for name in (*folders, *files))
    for path in (folder, *inside):
        about = path.lstat()
        if not stat.S_ISDIR(about.st_mode) and not (stat.S_ISREG(about.st_mode) and about.st_nlink <= 1):
            raise OutputError(f"{path} is a link or no file, and no run of llmsqueeze leaves one: remove {folder}")


def text_within(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes. Raises OSError or ValueError."""
    if not path.is_file() and path.exists():
        raise OSError("it is no regular file")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size} bytes; at most {most} are read")
    return path.read_text(encoding="utf-8")


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`, but empty if the file does not exist."""
    return read_json(path) if path.exists() else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes the JSON object `value`. Raises OutputError if the file cannot be written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `whole_file` does. Raises OutputError."""
    with whole_file(path) as half:
        half.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the path to write to. The whole file appears at `path` when the context ends. Raises OutputError.

    A link at `path`, which a folder may bring, is replaced: nothing is written to where it leads.
    """
    partial = path.with_suffix(".half")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def read_yaml(path: Path, what: str) -> Any:
    """The value in the YAML file `path`. Raises RecipeError if it cannot be read; `what` names the file's kind."""
    import yaml

    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a {what}")
    try:
        text = text_within(path, MOST_YAML)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise RecipeError(f"{path} has an alias (*name), which a {what} cannot have")
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no {what} {path}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{path}{where} is not readable YAML: {error.problem or error.context}") from error
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not readable YAML: {first_line(error)}") from error


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    """YAML's loader takes the last of two equal keys in silence."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    seen: set[str] = set()
    for key, value in pairs:
        if key.id == "scalar" and key.value in seen:
            raise RecipeError(f"{path}, line {key.start_mark.line + 1}: {key.value} is there twice")
        seen.add(key.value if key.id == "scalar" else "")
        _refuse_repeated_keys(path, value)
