"""The folder `<name>.partial`, in which a result grows: whose it is, and what is left of it.

It has a mark of the process that writes it. A run with a journal that was killed or interrupted leaves it, and the same
command goes on from there. All others that fail remove it; the next run removes that of a run that was killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from llmsqueeze import journal as journals
from llmsqueeze.errors import OutputError, ProcessError, SqueezeError, VerificationError
from llmsqueeze.files import (
    COMPARISON,
    EVALUATION,
    FRONTIER,
    REPORT,
    SIDECAR,
    SPILL,
    read_json_if_there,
    refuse_links,
    text_within,
)
from llmsqueeze.parallel import processes

OWNER = ".owner"  # in a .partial: the process that writes it
LONGEST_OWNER = 1000  # bytes
FILES = "files"  # in a record: what the run has written
LATER = (EVALUATION, COMPARISON, FRONTIER, REPORT)  # what other verbs write into a result, which is of its weights
About = Mapping[str, Any]  # the fingerprint of a run


def partial_of(path: Path) -> Path:
    """Where the folder `path` grows."""
    final = behind(path)
    return final.with_name(final.name + ".partial")


def behind(path: Path) -> Path:
    """The folder that a link leads to, which stays a link; or `path` itself."""
    return path.resolve() if path.is_symlink() else path


@contextmanager
def partial_folder(path: Path, about: About | None = None, restart: bool = False) -> Iterator[Path]:
    """`<path>.partial` with a mark of this process, removed at the end unless it was renamed or failed verification.

    about: the fingerprint of a run with a journal. Such a run goes on with what one with the same fingerprint has left,
    unless it is to `restart`, and leaves its own if it is stopped by anything but an error of ours. All others replace
    what was left. Raises OutputError if it belongs to a living run, to one with another fingerprint, or to the user.
    """
    partial = partial_of(path)
    journal = partial / journals.FOLDER
    processes.of_first(lambda: _begin_partial(partial, about, restart))
    if not (partial / OWNER).exists():
        raise OutputError(f"{partial} is not there for process {processes.rank()}: all processes need the same folder")
    try:
        yield partial
    except VerificationError:
        remove_journals(partial)  # the rest stays for inspection
        raise
    except BaseException as error:
        ours = isinstance(error, SqueezeError) and not isinstance(error, OutputError | ProcessError)
        if not ours and (journal / journals.LINES).exists():
            error.add_note(f"what was done is kept in {partial}: the same command goes on from there")
        elif processes.first():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if processes.first():
        shutil.rmtree(partial, ignore_errors=True)


def _begin_partial(partial: Path, about: About | None, restart: bool) -> None:
    """Makes a `.partial`, with the mark of this process, from what another run has left, if it may."""
    journal = partial / journals.FOLDER
    _check_leftover(partial)
    if about is not None and not restart and (journal / journals.ABOUT).exists():
        refuse_links(partial)
        journals.begin(journal, about)
        for folder in partial.glob(f"{SPILL}*"):
            shutil.rmtree(folder)
    elif partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write_owner(partial)


def remove_journals(folder: Path) -> None:
    for journal in folder.glob(f"{journals.FOLDER}*"):
        shutil.rmtree(journal, ignore_errors=True)


def _check_leftover(partial: Path) -> None:
    """Raises OutputError if there is a `.partial` of a living run or of the user."""
    if not partial.exists():
        return
    owner, alive = owner_of(partial)
    if owner != os.getpid() and alive:
        raise OutputError(f"another run (process {owner}) is writing {partial}; wait for it, or choose another --out")


def owner_of(partial: Path) -> tuple[int, bool]:
    """The process that writes a `.partial`, and whether it still runs. Raises OutputError if llmsqueeze did not write
    it."""
    try:
        pid, _, start = text_within(partial / OWNER, LONGEST_OWNER).partition(" ")
        owner = int(pid)
    except (OSError, ValueError) as error:
        raise OutputError(f"{partial} exists, and llmsqueeze did not write it; remove or rename it") from error
    return owner, _alive(owner, start)


def _write_owner(partial: Path) -> None:
    (partial / OWNER).write_text(f"{os.getpid()} {_started(os.getpid())}")


def _alive(pid: int, start: str) -> bool:
    """Whether the process that started then still runs: after a restart of the machine another may have its number."""
    try:
        with suppress(PermissionError):  # it is there, and another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not start or _started(pid) in ("", start)


def _started(pid: int) -> str:
    """When a process started, as Linux counts, and in which run of the machine; empty if the system does not tell."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{ticks}"
    except (OSError, IndexError):
        return ""


def files_of(folder: Path) -> list[PurePath]:
    """The files in a folder, and links, relative to it; not those of journals."""
    names: list[PurePath] = []
    for directory, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(directory) / name).is_symlink()]
        names += [(Path(directory) / name).relative_to(folder) for name in (*files, *links)]
    return sorted(name for name in names if not name.parts[0].startswith(journals.FOLDER))


def take_name(partial: Path, path: Path) -> None:
    """Renames a finished `.partial`. What somebody else has put into a folder of that name moves into the new one."""
    path = behind(path)
    if not path.exists():
        partial.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.replaced-", dir=path.parent))
    old = aside / path.name
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        aside.rmdir()
        raise
    for name in of_others(old):
        if not os.path.lexists(path / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(path / name)
    shutil.rmtree(aside, ignore_errors=True)


def of_others(folder: Path) -> list[PurePath]:
    """The files of a result that llmsqueeze did not write, by its record; none if the record does not say."""
    written = read_json_if_there(folder / SIDECAR).get(FILES)
    if not isinstance(written, list):
        return []
    return [name for name in files_of(folder) if str(name) not in {*written, *LATER}]
