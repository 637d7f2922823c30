"""Writing a model folder, shard by shard.

It grows in a sibling `<name>.partial` (journal/partial.py), which takes the final name when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmsqueeze import journal as journals
from llmsqueeze.errors import CheckpointError, OutputError
from llmsqueeze.files import INDEX, SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats.experts import NO_EXPERTS, StoredAs, joined_tensors, split, stored_names
from llmsqueeze.formats.inspection import beside
from llmsqueeze.formats.inspection.damage import CONFIG, config_checksums
from llmsqueeze.journal import NO_JOURNAL, Journal, write_behind
from llmsqueeze.journal.partial import (
    FILES,
    OWNER,
    About,
    behind,
    files_of,
    partial_folder,
    partial_of,
    remove_journals,
    take_name,
)
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.tensors import shard as shards
from llmsqueeze.model.tensors.shard import Later, Stored, present
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.progress.log import RUN_LOG
from llmsqueeze.progress.stopwatch import timed


class Output:
    """The folder under construction: shards as they come, the index at the end, then the final name. Of several
    processes the first one writes it; the others only count."""

    def __init__(self, path: Path, shards: int, journal: Journal = NO_JOURNAL) -> None:
        self.final = path
        self.partial = partial_of(path)
        self.shards = shards
        self.journal = journal
        self.experts: StoredAs = {}  # how the file calls experts' tensors
        self.weight_map: dict[str, str] = {}  # tensor -> its file
        self.about: dict[str, str] = {}  # checksums of config.json, for the index
        self.nbytes = 0
        self.digests: dict[str, bytes] = {}  # of every tensor before it is written
        self._written = 0
        self._writing: Future[None] | None = None

    @timed("write")
    def write_shard(self, tensors: Mapping[str, Stored]) -> None:
        """Writes the next of the announced number of shards, while the run goes on; the tensors must not change.

        Raises what the writing of an earlier shard raised.
        """
        self.wait()
        self._written += 1
        name = self.last_shard
        stored = {key: one if isinstance(one, Later) else present(one) for key, one in tensors.items()}
        self.weight_map.update(dict.fromkeys(stored, name))
        self.nbytes += sum(tensor.nbytes for tensor in split(stored, self.experts).values())
        if processes.first():
            self._writing = write_behind().submit(self._write, name, stored)

    @property
    def last_shard(self) -> str:
        """The file name of the shard that was written last."""
        return self._name(self._written)

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    def names_in(self, shard: str) -> list[str]:
        """The tensors of a shard."""
        return [key for key, file in self.weight_map.items() if file == shard]

    def hex_digests(self, names: Sequence[str]) -> dict[str, str]:
        """The digests of tensors that this process has written to the disk."""
        return {name: self.digests[name].hex() for name in names if name in self.digests}

    def take_over(self, shard: str, digests: Mapping[str, str]) -> bool:
        """Takes the next shard from the run that was killed; False if it is not what that run wrote."""
        return processes.of_first(lambda: self._take_over(shard, digests))

    def _take_over(self, shard: str, digests: Mapping[str, str]) -> bool:
        if shard != self._name(self._written + 1):
            return False
        try:
            read = shards.read(self.partial / shard)
        except CheckpointError:
            return False
        own = joined_tensors(read, self.experts)
        if {key: digest(tensor).hex() for key, tensor in own.items()} != digests:
            return False
        self._written += 1
        self.weight_map.update(dict.fromkeys(digests, shard))
        self.nbytes += sum(tensor.nbytes for tensor in read.values())
        self.digests |= {key: bytes.fromhex(one) for key, one in digests.items()}
        return True

    def tensors_of(self, prefix: str) -> dict[str, Tensor]:
        """The tensors that were written under names with this prefix, without it. Of a process that writes, after
        `wait`."""
        tensors = {}
        for name in (name for name in self.weight_map if name.startswith(prefix)):
            with safe_open(self.partial / self.weight_map[name], framework="pt") as file:
                tensors[name.removeprefix(prefix)] = file.get_tensor(name)
        return tensors

    def start_over(self) -> None:
        """Forgets all shards."""
        self.wait()
        self._written, self.nbytes = 0, 0
        self.weight_map.clear()
        self.digests.clear()

    def _write(self, name: str, stored: Mapping[str, Stored]) -> None:
        self.digests |= {key: digest(present(tensor)) for key, tensor in stored.items()}
        shards.write(self.partial / name, split(stored, self.experts))
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
        if name == CONFIG:
            self.about = config_checksums(self.partial)

    @timed("write")
    def copy_rest(self, source: Path) -> None:
        """Tokenizer, generation config, licence, code: every file of the model that is not weights or config."""
        beside.copy(source, self.partial)

    def finish(self) -> None:
        """Writes the index: now the folder can be opened."""
        self.wait()
        assert self._written == self.shards, f"{self._written} of {self.shards} shards were written"
        in_files = {one: file for name, file in self.weight_map.items() for one in stored_names(name, self.experts)}
        self.write_json(INDEX, {"metadata": {"total_size": self.nbytes, **self.about}, "weight_map": in_files})


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
def output_folder(
    path: Path, shards: int, needed: int, overwrite: bool = False, about: About | None = None, restart: bool = False
) -> Iterator[Output]:
    """A folder that appears at `path` only if the `with` block ends without error.

    The block calls `finish` when all is written. After a VerificationError the `.partial` stays. `needed` bytes must be
    free. about, restart: as `partial_folder` has them. A folder at `path` at the end is replaced only with `overwrite`,
    and put back if the new one cannot take the name. Raises OutputError.
    """
    output = Output(path, shards)
    try:
        with partial_folder(path, about, restart) as partial:
            output.journal = joined_journal(partial, about) if about is not None else NO_JOURNAL
            processes.of_first(lambda: _check_room(path, partial, needed))
            try:
                yield output
            except BaseException:
                with suppress(Exception):  # the first error counts
                    output.wait()
                    output.journal.wait()
                raise
            output.journal.wait()
            if processes.first():
                assert (partial / INDEX).exists(), "finish was called"
                publish(partial, path, overwrite)
    except (OSError, SafetensorError) as error:
        raise OutputError("; ".join([f"cannot write {path}: {error}", *getattr(error, "__notes__", [])])) from error


def joined_journal(partial: Path, about: About) -> Journal:
    """The journal of this process, with the steps that all processes of the run have noted."""
    journal = journals.begin(journals.folder_of(partial, processes.rank()), about)
    journal.keep_common()
    return journal


def _check_room(path: Path, partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free + sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if free < needed:
        raise OutputError(
            f"{path} needs {needed / 1e9:.2f} GB during the run (activations included; fewer or shorter samples need "
            f"less), and {free / 1e9:.2f} GB are free on that disk"
        )


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
    experts: StoredAs = NO_EXPERTS,
) -> int:
    """Writes the checkpoint's folder again as `out`, file by file with other tensors; returns the bytes of its tensors.
    experts: how the new files call experts' tensors.

    `shard_of`: names of the tensors in a file -> tensors of the new file. `sidecar`: bytes of all tensors -> the record
    of the run. `inspect` sees the finished folder before it gets its name. `needed` bytes must be free on the disk.
    """
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    needed += sum(beside.files_beside(checkpoint.path).values())
    with output_folder(out, len(files), needed, overwrite) as output:
        output.experts = experts
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
    """Gives a finished folder its final name. A folder at `path` is replaced only with `overwrite`; what llmsqueeze did
    not write of it goes into the new one."""
    check_writable(path, overwrite)
    for name in (OWNER, RUN_LOG):
        (folder / name).unlink(missing_ok=True)
    if record := read_json_if_there(folder / SIDECAR):
        write_json(folder / SIDECAR, record | {FILES: [str(name) for name in files_of(folder)]})
    take_name(folder, path)
    remove_journals(behind(path))
