"""Reading a checkpoint lazily, and the digests of its files.

A checkpoint is a folder with `config.json` and safetensors: one file, or shards and an index. `open_checkpoint` reads
headers only. It finds files that are missing, cut short, or outside the folder. Tensors are read one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsqueeze.errors import CheckpointError, UnsupportedError
from llmsqueeze.files import ADAPTER_CONFIG, INDEX, PICKLES, SINGLE, STRICT, conform, is_pointer, read_json
from llmsqueeze.model.tensors.shard import DTYPES, checksums, compare
from llmsqueeze.progress.stopwatch import timed

LONGEST_NAME = 200  # characters of a shard's name, fewer than any system allows


@dataclass(frozen=True)
class StoredTensor:
    """The file, shape and dtype of one tensor. pieces: the names of those in the file that `join` makes it of, if it is
    not there as one under its own name; in_file: the bytes that these take, if they are not those of the tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[str, ...] = ()
    join: Callable[[list[Tensor]], Tensor] = torch.cat
    in_file: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        if self.in_file is not None:
            return self.in_file
        joined = torch.Size(self.shape).numel() * self.dtype.itemsize
        return joined if self.join is torch.cat else joined * len(self.pieces)


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: its config and its tensors by name. checksums: of tensors as the files name them, which are
    compared when one is read; absent: what its index names and no file has."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    checksums: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the headers of the files."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @timed("read")
    def read(self, name: str) -> Tensor:
        """The tensor in its stored shape and dtype. Raises CheckpointError if it contains NaN or Inf."""
        return self._finite(name, self.read_raw(name))

    @timed("read")
    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Some entries of the first dimension of a tensor, as `read` gives all; the others are not read."""
        return self._finite(name, self._read(name, lambda handle, stored: handle.get_slice(stored)[rows]))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
            kind = "NaN" if bool(tensor.isnan().any()) else "Inf"
            raise CheckpointError(
                f"{name} in {self.tensors[name].file.name} contains {kind}; a damaged weight cannot be compressed: "
                f"download or convert {self.path} again"
            )
        return tensor

    @timed("read")
    def read_raw(self, name: str) -> Tensor:
        """The tensor in its stored shape and dtype; its values are not checked. Raises CheckpointError."""

        def whole(handle: Any, stored: str) -> Tensor:
            tensor: Tensor = handle.get_tensor(stored)
            compare(self.tensors[name].file, stored, tensor, self.checksums)
            return tensor

        return self._read(name, whole)

    def _read(self, name: str, of: Callable[[Any, str], Tensor]) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks {name}, which its config describes")
        tensor = self.tensors[name]
        file = tensor.file
        try:
            with safe_open(file, framework="pt") as handle:
                if not tensor.pieces:
                    return of(handle, name)
                return tensor.join([of(handle, piece) for piece in tensor.pieces])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {file}: {error}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the folder; reads headers only.

    Raises CheckpointError if the checkpoint is missing, damaged or only pickled, or names files outside the folder.
    """
    config = read_config(path)
    if (path / SINGLE).exists():  # transformers also reads it before any index
        return Checkpoint(path, config, *_headers(path / SINGLE))
    if (path / INDEX).exists():
        tensors, sums, named = _indexed(path)
        return Checkpoint(path, config, tensors, sums, tuple(name for name in named if name not in tensors))
    raise CheckpointError(_no_weights(path))


class Config(BaseModel):
    """What is read of a `config.json` by itself; transformers reads the rest."""

    model_config = STRICT
    model_type: str = ""
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None


def read_config(path: Path) -> dict[str, Any]:
    """The folder's `config.json`. Raises CheckpointError if it is missing or is not that of a model."""
    if not (path / "config.json").exists() and (path / ADAPTER_CONFIG).exists():
        base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{path} is a LoRA adapter and no model: compress its base ({base}) with --adapter {path}"
        )
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json, so it is not a model folder")
    config = read_json(path / "config.json")
    conform(path / "config.json", config, Config)
    if "model_type" not in config and "quantization_config" not in config:
        raise CheckpointError(f"{path / 'config.json'} names no model_type, so it is not a transformers model")
    return config


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return pickled_only(str(path), pickles[0])
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        return f"{path} has no {SINGLE} and no {INDEX}, only {', '.join(others[:3])}: was a file renamed or lost?"
    return f"{path} has no weights: {SINGLE} or {INDEX} is needed"


def pickled_only(model: str, file: str) -> str:
    """The error message for a model whose weights are only pickled."""
    return (
        f"{model} has its weights only as pickle ({file}); a pickle can run code when it is opened, so it is not read; "
        "if you trust it, convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
        "writes safetensors"
    )


Stored = tuple[dict[str, StoredTensor], dict[str, str]]  # tensors and their checksums


def _indexed(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str], Mapping[str, str]]:
    """The tensors of the shards and their checksums, and what the index says of them."""
    index = read_json(path / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map of tensor names to files")
    tensors, sums = dict[str, StoredTensor](), dict[str, str]()
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path / INDEX} names {file!r}, which is outside the model folder")
        if len(file) > LONGEST_NAME or not (path / file).exists():
            raise CheckpointError(f"{path} lacks the shard {file[:LONGEST_NAME]} that {INDEX} names")
        stored, checked = _headers(path / file)
        # as transformers do: what counts is what the files hold; a tensor that the model needs is missed later
        for name in (name for name in stored if name not in tensors or weight_map.get(name) == file):
            tensors[name] = stored[name]
            sums |= {name: checked[name]} if checked else {}
    return tensors, sums, weight_map


def _headers(file: Path) -> Stored:
    """The tensors of a file by name; safetensors checks that the file has the length that its header says."""
    try:
        with safe_open(file, framework="pt") as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            tensors = {
                name: StoredTensor(file, tuple(view.get_shape()), DTYPES[view.get_dtype()])
                for name, view in views.items()
            }
            return tensors, checksums(file, handle)
    except KeyError as error:
        raise UnsupportedError(f"{file} contains tensors of dtype {error}, which is not supported") from error
    except (SafetensorError, OSError) as error:
        if is_pointer(file):
            raise CheckpointError(
                f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` there"
            ) from error
        raise CheckpointError(f"{file} is damaged or cut short ({error}); download or copy it again") from error


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, without the copies that `isfinite` makes."""
    low, high = values.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())


@timed("read")
def file_digests(
    checkpoint: Checkpoint, previous: Mapping[str, Any] | None = None, others: Sequence[Path] = ()
) -> dict[str, dict[str, Any]]:
    """File name -> its size, modification time and SHA-256; `others`: files that belong to the weights too.

    A file with the size and time that it has in `previous` is not read again: it gets the digest from there.
    """
    digests: dict[str, dict[str, Any]] = {}
    for file in sorted({*others, *(stored.file for stored in checkpoint.tensors.values())}):
        stat = file.stat()
        identity = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = (previous or {}).get(file.name, {})
        if not identity.items() <= before.items():
            before = {"sha256": _sha256(file, stat.st_size, stat.st_mtime_ns)}
        digests[file.name] = identity | {"sha256": before["sha256"]}
    return digests


@cache
def _sha256(file: Path, _size: int, _mtime_ns: int) -> str:
    """A file with the same size and time is read once in a process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 for all files: of their names and digests, not of their times."""
    text = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
