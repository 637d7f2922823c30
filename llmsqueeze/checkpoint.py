"""Reading a checkpoint lazily and writing one shard by shard.

A checkpoint is a folder with `config.json` and safetensors files, in one piece or sharded behind an index. Opening
it reads headers only and finds what is missing, cut short, or outside the folder; tensors are read one at a time.
Writing happens in a sibling `<name>.partial`, which takes the final name when everything is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze.curvature import all_finite
from llmsqueeze.errors import CheckpointError, HubError, OutputError, UnsupportedError
from llmsqueeze.files import EVALUATION, INDEX, SIDECAR, SINGLE

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)
NOT_COPIED = (*PICKLES, *WEIGHTS, "config.json", "README.md", SIDECAR, EVALUATION, ".*")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: its config and where every tensor lies."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers aside."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The tensor as stored, after checking that it holds no NaN or Inf."""
        tensor = self.read_raw(name)
        if tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
            kind = "NaN" if bool(tensor.isnan().any()) else "Inf"
            raise CheckpointError(
                f"{name} in {self.tensors[name].file.name} holds {kind}; a damaged weight cannot be compressed: "
                f"download or convert {self.path} again"
            )
        return tensor

    def read_raw(self, name: str) -> Tensor:
        """The tensor as stored, unchecked."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {file}: {error}") from error
        return tensor


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the folder; reads headers only.

    Raises CheckpointError for a missing, damaged or pickle-only checkpoint and for files outside the folder.
    """
    config = _read_json(path / "config.json", f"{path} has no config.json, so it is not a model folder")
    if "model_type" not in config and "quantization_config" not in config:
        raise CheckpointError(f"{path / 'config.json'} names no model_type, so it is not a transformers model")
    if (path / INDEX).exists():
        tensors = _indexed(path)
    elif (path / SINGLE).exists():
        tensors = _headers(path / SINGLE)
    else:
        raise CheckpointError(_no_weights(path))
    return Checkpoint(path, config, tensors)


def read_sidecar(path: Path) -> dict[str, Any]:
    """What `llmsqueeze.json` in the folder records; empty if there is none."""
    return _read_json(path / SIDECAR, "") if (path / SIDECAR).exists() else {}


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, not a JSON object")
    return value


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds its weights only as pickle ({pickles[0]}), which can run code when opened, so it is not "
            "read; convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained("
            "new_folder) writes safetensors"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        return f"{path} has no {SINGLE} and no {INDEX}, only {', '.join(others[:3])}: was a file renamed or lost?"
    return f"{path} has no weights: {SINGLE} or {INDEX} is needed"


def _indexed(path: Path) -> dict[str, Stored]:
    index = _read_json(path / INDEX, "")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map of tensor names to files")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path / INDEX} names {file!r}, which lies outside the model folder")
        if not (path / file).exists():
            raise CheckpointError(f"{path} lacks the shard {file} that {INDEX} names")
        held = _headers(path / file)
        for name in (n for n, f in weight_map.items() if f == file):
            if name not in held:
                raise CheckpointError(f"{path / file} does not hold {name}, which {INDEX} expects there")
            tensors[name] = held[name]
    return tensors


def _headers(file: Path) -> dict[str, Stored]:
    """Tensor name -> where it lies; opening checks that the file is as long as its header says."""
    try:
        with safe_open(file, framework="pt") as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            return {
                name: Stored(file, tuple(view.get_shape()), _DTYPES[view.get_dtype()]) for name, view in views.items()
            }
    except KeyError as error:
        raise UnsupportedError(f"{file} holds tensors of dtype {error}, which is not read") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); download or copy it again") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def locate(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: the built-in `demo`, a folder, or a Hub id (downloaded into the Hub's cache).

    Raises CheckpointError if there is no such folder, HubError if the Hub cannot be reached or refuses.
    """
    if model == "demo":
        from llmsqueeze.demo import MODEL_DIR

        return MODEL_DIR
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; name the model's folder, a Hub id such as owner/name, or 'demo'")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {model}; name a local folder, a Hub id (owner/name), or 'demo'")
    return _download(model, revision)


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, ignore_patterns=["original/*", "*.gguf"])
        )
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"there is no local folder {repo}, and the Hub cannot be reached for a model of that name: check the "
            "spelling and the network, or name a local folder or 'demo'"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"the Hub does not give out {repo}: {str(error).splitlines()[0]}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo} is neither a local folder nor a valid Hub id: {error}") from error
    except (OSError, ValueError) as error:
        raise HubError(f"cannot download {repo}: {error}") from error


class Output:
    """The folder under construction: shards as they come, the index at the end, then the final name."""

    def __init__(self, path: Path, shards: int) -> None:
        self.final = path
        self.partial = path.with_name(path.name + ".partial")
        self.shards = shards
        self.weight_map: dict[str, str] = {}
        self.nbytes = 0
        self._written = 0

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next of the announced number of shards."""
        self._written += 1
        name = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        save_file(held, self.partial / name, metadata={"format": "pt"})
        self.weight_map.update(dict.fromkeys(held, name))
        self.nbytes += sum(tensor.nbytes for tensor in held.values())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (self.partial / name).write_text(text + "\n", encoding="utf-8")

    def copy_rest(self, source: Path) -> None:
        """Tokenizer, generation config, licence, code: every file of the model that is not weights or config."""
        for file in sorted(source.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, self.partial / file.name)

    def finish(self) -> None:
        assert self._written == self.shards, f"{self._written} of {self.shards} shards were written"
        self.write_json(INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": self.weight_map})


def check_writable(path: Path, overwrite: bool) -> None:
    """Raises OutputError unless a new folder may be made at `path`."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    if path.is_file():
        raise OutputError(f"{path} is a file; --out names a folder")
    if path.exists() and any(path.iterdir()) and not (path / SIDECAR).exists():
        raise OutputError(f"{path} was not written by llmsqueeze, so --overwrite leaves it alone; choose another --out")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder, so {path} cannot be made")


@contextmanager
def output_folder(path: Path, shards: int, needed: int) -> Iterator[Output]:
    """A folder that appears at `path` when the block ends without error, and not at all when it does not.

    `needed` bytes must be free. A leftover `.partial` of an earlier run is replaced.
    """
    output = Output(path, shards)
    try:
        shutil.rmtree(output.partial, ignore_errors=True)
        output.partial.mkdir(parents=True)
        free = shutil.disk_usage(output.partial).free
        if free < needed:
            raise OutputError(f"{path} needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that disk")
        yield output
        output.finish()
        replaced = path.with_name(path.name + ".replaced")
        if path.exists():
            path.rename(replaced)
        output.partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(output.partial, ignore_errors=True)
