"""The journal of a run: what it has done, on disk, so that the same command goes on after the run was killed.

    about.json      the fingerprint of the run: what must be the same if its steps are to be used again
    journal.jsonl   a line for each step that is done: its name, its value, and the digests of its files
    <step>.*        the files: activations, measurements

A step is noted when its files, and the shards that were written before it, have reached the disk. That happens behind
the run, by the thread that writes shards, in the order of the steps. A file that a later step makes useless is removed
when that step is noted. When a run goes on, every file is compared with its digest first.

Of several processes each has a journal of its own (`folder_of`), with the same steps. A killed run may leave them a
step apart, so what a step makes useless is removed only when all processes have noted it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from llmsqueeze.errors import CheckpointError, OutputError, first_line
from llmsqueeze.files import MOST_JSON, STRICT, conform, read_json, whole_file
from llmsqueeze.parallel import processes

FOLDER = ".journal"
ABOUT, LINES = "about.json", "journal.jsonl"


@dataclass(frozen=True)
class Step:
    """A step that is done: its value, of JSON, and the digests of its files that are still of use, by name."""

    value: dict[str, Any]
    files: dict[str, str | None]


class Journal:
    """The journal in a folder; without one it notes nothing and knows of no step."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._steps: dict[str, Step] = {}
        self._noting: Future[None] | None = None
        self._useless: list[str] = []  # for a process that has noted the last step
        if folder is not None and (folder / LINES).exists():
            self._steps = _read(folder / LINES)

    @property
    def active(self) -> bool:
        return self.folder is not None

    @property
    def steps(self) -> list[str]:
        """The steps that are done, in their order."""
        return list(self._steps)

    def file(self, name: str) -> Path:
        """Where a step writes its file. Raises CheckpointError for a name that leads elsewhere."""
        assert self.folder is not None, "a journal that notes nothing has no files"
        if Path(name).name != name:
            raise CheckpointError(f"{self.folder} names {name!r}, which is not in it")
        return self.folder / name

    def value(self, step: str) -> dict[str, Any] | None:
        """The value of a step; None if it is not done."""
        return self._steps[step].value if step in self._steps else None

    def holds(self, name: str) -> bool:
        """Whether a file of a step that is done is still there."""
        return any(name in step.files for step in self._steps.values())

    def files(self) -> list[str]:
        """The files of all steps that are done or being noted."""
        self.wait()
        assert self.folder is not None, "a journal that notes nothing has no files"
        return [file.name for file in self.folder.iterdir() if file.name not in (ABOUT, LINES)]

    def note(
        self,
        step: str,
        value: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        files: Iterable[str] = (),
        without: Iterable[str] = (),
    ) -> None:
        """Notes a step behind the run. value: of JSON; a function is called when all that was written before is on the
        disk. files: of this step, which must not change any more; without: files of no use from then on. Raises what
        the noting of an earlier step raised."""
        if self.folder is None:
            return
        self.wait()
        if processes.count() > 1:
            processes.meet()
            _remove(self.folder, self._useless)
            self._useless, lasting = list(without), True
        else:
            lasting = False
        self._noting = write_behind().submit(_note, self.folder, step, value, list(files), list(without), lasting)

    def keep(self, steps: Iterable[str] = ()) -> None:
        """Forgets all steps but these."""
        if self.folder is None:
            return
        self.wait()
        self._steps = {name: step for name, step in self._steps.items() if name in set(steps)}
        kept = {ABOUT, LINES} | {name for step in self._steps.values() for name in step.files}
        with whole_file(self.folder / LINES) as half:
            half.write_text("".join(_line(name, step, []) for name, step in self._steps.items()), encoding="utf-8")
            _to_disk(half)
        for file in self.folder.iterdir():
            if file.name not in kept:
                file.unlink()

    def keep_common(self) -> None:
        """Forgets the steps that another process of this run has not noted."""
        if self.folder is None or processes.count() == 1:
            return
        common = min(processes.gathered(len(self._steps)))
        if len(self._steps) > common:
            self._steps = _read(self.folder / LINES, common)
            self.keep(self._steps)

    def damaged(self) -> list[str]:
        """The steps with a file that is not what was written."""
        if self.folder is None:
            return []
        return [name for name, step in self._steps.items() if not _intact(self.folder, step.files)]

    def wait(self) -> None:
        """Until all steps are on the disk. Raises what the noting raised."""
        noting, self._noting = self._noting, None
        if noting is not None:
            noting.result()


NO_JOURNAL = Journal()


@cache
def write_behind() -> ThreadPoolExecutor:
    """The one thread of the process that writes behind a run."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind")


@contextmanager
def restoring(where: Path | None) -> Iterator[None]:
    """Errors in using what a journal says are those of the journal: raises CheckpointError, which says what to do."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; start over with --restart") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{where} is damaged ({said}); start over with --restart") from error


def folder_of(partial: Path, rank: int) -> Path:
    """The journal of a process of a run that writes into `partial`."""
    return partial / (f"{FOLDER}-{rank}" if rank else FOLDER)


def begin(folder: Path, about: Mapping[str, Any]) -> Journal:
    """The journal in `folder` of a run with the fingerprint `about`, of JSON values. Raises OutputError if the folder
    holds that of another run."""
    about = json.loads(json.dumps(about))
    if (folder / ABOUT).exists():
        before = read_json(folder / ABOUT)
        if differing := differences(before, about):
            raise OutputError(
                f"{folder.parent} is of a run with {differing[0]}; repeat that run to go on with it, or start over "
                "with --restart"
            )
        return Journal(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / ABOUT) as half:
        half.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _to_disk(half)
    return Journal(folder)


def differences(before: Mapping[str, Any], about: Mapping[str, Any], inside: str = "") -> list[str]:
    """What is not the same in two fingerprints, in words."""
    told = []
    for key in dict.fromkeys([*about, *before]):
        old, new = before.get(key), about.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            told += differences(old, new, f"{key} ")
        elif old != new:
            told.append(f"{inside}{key.replace('_', ' ')} {_short(old)}, not {_short(new)}")
    return told


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _note(
    folder: Path,
    name: str,
    value: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    files: list[str],
    without: list[str],
    lasting: bool = False,
) -> None:
    for file in files:
        _to_disk(folder / file)
    digests = {file: _digest(folder / file) for file in files}
    step = Step(dict(value() if callable(value) else value), digests)
    with (folder / LINES).open("a", encoding="utf-8") as stream:
        stream.write(_line(name, step, without))
        stream.flush()
        os.fsync(stream.fileno())
    if not lasting:
        _remove(folder, without)


def _remove(folder: Path, files: Iterable[str]) -> None:
    for file in files:
        (folder / file).unlink(missing_ok=True)


def _line(name: str, step: Step, without: Sequence[str]) -> str:
    return json.dumps({"step": name, "value": step.value, "files": step.files, "without": without}) + "\n"


def _to_disk(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _intact(folder: Path, files: Mapping[str, str | None]) -> bool:
    return all(digest is not None and _digest(folder / name) == digest for name, digest in files.items())


def _digest(file: Path) -> str | None:
    """Of a file's bytes; None if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


class Line(BaseModel):
    """A line of a journal. Files are in its folder, and in no other."""

    model_config = STRICT
    step: str
    value: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")], str | None]
    without: list[str]


def _read(file: Path, count: int | None = None) -> dict[str, Step]:
    """The steps of a journal, or the first `count`. The last line of a run that was killed may be cut off: then it is
    removed. Raises CheckpointError."""
    steps: dict[str, Step] = {}
    with restoring(file):
        if (size := file.stat().st_size) > MOST_JSON:
            raise CheckpointError(f"{file} has {size} bytes, far too many")
    *lines, last = file.read_bytes().split(b"\n")
    for line in lines[:count]:
        with restoring(file):
            noted = json.loads(line)
            conform(file, noted, Line)
            for name in noted["without"]:
                for step in steps.values():
                    step.files.pop(name, None)
            steps[noted["step"]] = Step(noted["value"], noted["files"])
    if last:
        with file.open("r+b") as stream:
            stream.truncate(sum(len(line) + 1 for line in lines))
    return steps
