"""Writing a model folder, shard by shard.

It grows in a sibling `<name>.partial`, which takes the final name when it is complete. A run that fails removes it; the
next run removes that of a run that was killed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmsqueeze.errors import OutputError, VerificationError
from llmsqueeze.files import (
    COMPARISON,
    EVALUATION,
    FRONTIER,
    INDEX,
    OTHER_WEIGHTS,
    PICKLES,
    SIDECAR,
    TEMPLATES,
    write_json,
)
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed

OWNER = ".owner"  # in a .partial: the process that writes it
NOT_COPIED = (
    *PICKLES,
    *OTHER_WEIGHTS,
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "README.md",
    "README.before-push.md",
    "report.html",
    SIDECAR,
    EVALUATION,
    COMPARISON,
    FRONTIER,
    ".*",
)


class Output:
    """The folder under construction: shards as they come, the index at the end, then the final name."""

    def __init__(self, path: Path, shards: int) -> None:
        self.final = path
        self.partial = path.with_name(path.name + ".partial")
        self.shards = shards
        self.weight_map: dict[str, str] = {}
        self.nbytes = 0
        self.digests: dict[str, bytes] = {}  # of every tensor before it is written
        self._written = 0
        self._writing: Future[None] | None = None

    @timed("write")
    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the next of the announced number of shards, while the run goes on; the tensors must not change.

        Raises what the writing of an earlier shard raised.
        """
        self.wait()
        self._written += 1
        name = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        stored = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        self.weight_map.update(dict.fromkeys(stored, name))
        self.nbytes += sum(tensor.nbytes for tensor in stored.values())
        self._writing = _writer().submit(self._write, name, stored)

    def _write(self, name: str, stored: Mapping[str, Tensor]) -> None:
        self.digests |= {key: digest(tensor) for key, tensor in stored.items()}
        save_file(dict(stored), self.partial / name, metadata={"format": "pt"})
        flush(self.partial / name)

    @timed("write")
    def wait(self) -> None:
        """Until all shards are on the disk. Raises what the writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @timed("write")
    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.partial / name, value)

    @timed("write")
    def copy_rest(self, source: Path) -> None:
        """Tokenizer, generation config, licence, code: every file of the model that is not weights or config."""
        for file in sorted(source.iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, self.partial / file.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, self.partial / TEMPLATES)

    def finish(self) -> None:
        """Writes the index: now the folder can be opened."""
        self.wait()
        assert self._written == self.shards, f"{self._written} of {self.shards} shards were written"
        self.write_json(INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": self.weight_map})


@cache
def _writer() -> ThreadPoolExecutor:
    """The one thread of the process that writes behind a run."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")


def digest(tensor: Tensor) -> bytes:
    """16 bytes, from a tensor's shape, dtype and bits."""
    hashed = hashlib.blake2b(f"{list(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    hashed.update(array)
    return hashed.digest()


def flush(file: Path) -> None:
    """Forces the file to the disk and, if the system allows it, out of its cache, so that reading it reads the disk.

    Also lets other users read it, as a server may be one: safetensors lets only the owner.
    """
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_writable(path: Path, overwrite: bool) -> None:
    """Raises OutputError unless the run may write a new folder at `path`."""
    if path.is_file():
        raise OutputError(f"{path} is a file; --out names a folder")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    if path.exists() and any(path.iterdir()) and not (path / SIDECAR).exists():
        raise OutputError(f"{path} was not written by llmsqueeze, so --overwrite leaves it alone; choose another --out")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder, so {path} cannot be written")


@contextmanager
def output_folder(path: Path, shards: int, needed: int, overwrite: bool = False) -> Iterator[Output]:
    """A folder that appears at `path` only if the `with` block ends without error.

    The block calls `finish` when all is written. After a VerificationError the `.partial` stays. `needed` bytes must be
    free. The `.partial` of a run that was killed is replaced. A folder at `path` at the end is replaced only with
    `overwrite`, and put back if the new one cannot take the name. Raises OutputError.
    """
    output = Output(path, shards)
    try:
        with partial_folder(path) as partial:
            free = shutil.disk_usage(partial).free
            if free < needed:
                raise OutputError(
                    f"{path} needs {needed / 1e9:.2f} GB during the run (activations included; fewer or shorter "
                    f"samples need less), and {free / 1e9:.2f} GB are free on that disk"
                )
            try:
                yield output
            except BaseException:
                with suppress(Exception):  # the first error counts
                    output.wait()
                raise
            assert (partial / INDEX).exists(), "finish was called"
            publish(partial, path, overwrite)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """`<path>.partial` with a mark of this process, removed at the end unless it was renamed or failed verification.

    That of a run that was killed is replaced. Raises OutputError if it belongs to a living run or to the user.
    """
    partial = path.with_name(path.name + ".partial")
    _clear_leftover(partial)
    partial.mkdir(parents=True)
    try:
        _write_owner(partial)
        yield partial
    except VerificationError:
        raise  # the folder stays for inspection
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial, ignore_errors=True)


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    needed: int,
    overwrite: bool,
    shard_of: Callable[[list[str]], dict[str, Tensor]],
    config: Mapping[str, Any],
    sidecar: Callable[[int], Mapping[str, Any]],
    inspect: Callable[[Output], None],
    progress: Progress | None = None,
) -> int:
    """Writes the checkpoint's folder again as `out`, file by file with other tensors; returns the bytes of its tensors.

    `shard_of`: names of the tensors in a file -> tensors of the new file. `sidecar`: bytes of all tensors -> the record
    of the run. `inspect` sees the finished folder before it gets its name. `needed` bytes must be free on the disk.
    """
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    with output_folder(out, len(files), needed, overwrite) as output:
        for file in (progress or Progress()).over(files, "rewrite", len(files)):
            names = sorted(name for name, stored in checkpoint.tensors.items() if stored.file == file)
            output.write_shard(shard_of(names))
        output.copy_rest(checkpoint.path)
        output.write_json("config.json", config)
        output.write_json(SIDECAR, sidecar(output.nbytes))
        output.finish()
        inspect(output)
    return output.nbytes


def publish(folder: Path, path: Path, overwrite: bool) -> None:
    """Gives a finished folder its final name; a folder at `path` is replaced only with `overwrite`."""
    (folder / OWNER).unlink(missing_ok=True)
    check_writable(path, overwrite)
    _take_name(folder, path)


def _clear_leftover(partial: Path) -> None:
    """Removes the `.partial` of a dead run. Raises OutputError if it belongs to a living run or to the user."""
    if not partial.exists():
        return
    try:
        owner = int((partial / OWNER).read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{partial} exists, and llmsqueeze did not write it; remove or rename it") from error
    if owner != os.getpid() and _alive(owner):
        raise OutputError(f"another run (process {owner}) is writing {partial}; wait for it, or choose another --out")
    shutil.rmtree(partial)


def _write_owner(partial: Path) -> None:
    (partial / OWNER).write_text(str(os.getpid()))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _take_name(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.replaced-", dir=path.parent))
    path.rename(aside / path.name)
    try:
        partial.rename(path)
    except OSError:
        (aside / path.name).rename(path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
