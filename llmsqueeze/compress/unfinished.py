"""A run that is not done: how far it is, from the log in its `.partial` folder (progress/log.py)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import refuse_links
from llmsqueeze.journal.partial import owner_of
from llmsqueeze.progress.log import RUN_LOG, read


@dataclass(frozen=True)
class Unfinished:
    """A run, by the last line of its log. process: that writes the folder; runs: whether it is still there.

    stage, done, total, weight, sample, samples, memory_mb: as in the log; what it does not say is None. seconds: since
    the stage began; quiet_seconds: since the last line; left_seconds: of the stage, None before its first step is done.
    """

    path: str
    process: int
    runs: bool
    stage: str | None
    done: int
    total: int
    weight: str | None
    sample: int | None
    samples: int | None
    memory_mb: float
    seconds: float
    quiet_seconds: float
    left_seconds: float | None
    note: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def unfinished(folder: Path) -> Unfinished:
    """What the log of a `.partial` says. Raises OutputError if llmsqueeze does not write the folder, CheckpointError if
    there is no log. What stands in a folder is only text here: links in it are refused."""
    process, runs = owner_of(folder)
    refuse_links(folder)
    try:
        lines = read(folder / RUN_LOG)
    except OSError as error:
        raise CheckpointError(f"{folder} has no {RUN_LOG}: nothing is known of its run") from error
    if not lines:
        raise CheckpointError(f"{folder / RUN_LOG} is empty: its run has not begun to work")
    last = lines[-1]
    stage, done, total = last.get("stage"), int(last.get("done") or 0), int(last.get("total") or 0)
    of_stage: list[dict[str, Any]] = []
    for line in reversed(lines):
        if line.get("stage") != stage or (of_stage and line.get("done", 0) > of_stage[-1].get("done", 0)):
            break
        of_stage.append(line)
    first = of_stage[-1]
    steps, seconds = done - int(first.get("done") or 0), last["at"] - first["at"]
    now = time.time() if runs else last["at"]
    return Unfinished(
        path=str(folder),
        process=process,
        runs=runs,
        stage=stage,
        done=done,
        total=total,
        weight=last.get("weight"),
        sample=last.get("sample"),
        samples=last.get("samples"),
        memory_mb=float(last.get("memory_mb") or 0.0),
        seconds=round(now - first["at"], 3),
        quiet_seconds=round(now - last["at"], 3),
        left_seconds=round(seconds / steps * (total - done), 3) if steps > 0 else None,
        note=next((line["note"] for line in reversed(lines) if line.get("note")), None),
    )
