"""The log of a run: `run.jsonl` in the folder that it writes, a line for each step, for all who ask how far it is.

    {"at": 1790000000.1, "stage": "compress", "done": 3, "total": 30, "weight": "...", "sample": 7, "samples": 32,
     "memory_mb": 612.0}

at: seconds since 1970; done: steps of the stage that are done, mostly blocks; weight: the last one that was compressed;
sample: how many samples have gone through what is being measured in this step. A run that goes on adds to the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llmsqueeze.memory import memory_mb
from llmsqueeze.progress import Progress

RUN_LOG = "run.jsonl"
APART = 1.0  # seconds: lines about samples are no closer
MOST = 1 << 26  # bytes of a log that are read
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Word = Annotated[str, Field(max_length=1000)]


class Logged(Progress):
    """Passes everything on to another listener, and writes it to a file. A log that cannot be written ends no run."""

    def __init__(self, listener: Progress, file: Path) -> None:
        self._listener, self._file = listener, file
        self._state: dict[str, Any] = {}
        self._written = 0.0

    def stage(self, name: str, total: int) -> None:
        self._state = {"stage": name, "done": 0, "total": total}
        self._write()
        self._listener.stage(name, total)

    def advance(self) -> None:
        self._state["done"] = self._state.get("done", 0) + 1
        for key in ("sample", "samples"):
            self._state.pop(key, None)
        self._write()
        self._listener.advance()

    def weight(self, name: str, bits_per_weight: float, error: float) -> None:
        self._state["weight"] = name
        self._write()
        self._listener.weight(name, bits_per_weight, error)

    def sample(self, done: int, total: int) -> None:
        self._state |= {"sample": done, "samples": total}
        if time.time() - self._written >= APART:
            self._write()
        self._listener.sample(done, total)

    def note(self, text: str) -> None:
        self._write(note=text)
        self._listener.note(text)

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        self._state = {"stage": name, "done": 0, "total": 1}
        self._write()
        with self._listener.foreign(name):
            yield

    def _write(self, **more: Any) -> None:
        self._written = time.time()
        line = {"at": round(self._written, 3)} | self._state | more | {"memory_mb": memory_mb()}
        with suppress(OSError), self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


class Line(BaseModel):
    """A line of a log."""

    model_config = ConfigDict(strict=True)
    at: Annotated[float, Field(ge=0, le=1e11)]
    stage: Word | None = None
    done: Count = 0
    total: Count = 0
    weight: Word | None = None
    sample: Count | None = None
    samples: Count | None = None
    memory_mb: Annotated[float, Field(ge=0, le=1e12)] = 0.0
    note: str | None = None


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log, of a large one the last; one that is cut off or is no line of a log is left out. Raises
    OSError."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - MOST))
        text = stream.read(MOST).decode("utf-8", errors="replace")
    lines = []
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            Line.model_validate(entry)
            lines.append(entry)
    return lines
