"""The terminal: progress and errors on stderr, results on stdout, at most 100 columns wide, colour only on a terminal.

If stderr is not a terminal, progress is a line a minute. What every step did is in the run's log (progress/log.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from llmsqueeze.cli.whole import CONTROL, Whole
from llmsqueeze.progress import Progress
from llmsqueeze.publish.numbers import shortened

WIDTH = 100
STAGES = {
    "forward": "forward, block by block",
    "loss": "loss gradient, by sample",
    "weights": "weights, block by block",
    "trial": "trial of two blocks",
    "gradients": "weight gradients, block by block",
    "compress": "compress, block by block",
    "teacher": "teacher, block by block",
    "answers": "teacher's answers, by sample",
    "distill": "distillation, by step",
    "blockwise": "distillation, block by block",
    "sample": "sampling text, by token",
    "rewrite": "writing, by file",
    "verify": "verification, block by block",
    "open": "opening, by program",
    "text": "perplexity, by batch",
    "tasks": "tasks, by lm-eval",
}


class PlainConsole(Console):
    """A console for which all text is plain: names and notes from a file can hold anything."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(CONTROL.sub("�", text), **options)


def console(stderr: bool = False) -> Console:
    """A console at most 100 columns wide, without colour if it is not a terminal."""
    terminal = PlainConsole(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)
    terminal.width = min(terminal.width, WIDTH) if terminal.is_terminal else WIDTH
    return terminal


MINUTE = 60.0
BESIDE_NAME = 33  # columns of a weight's bits and error
LARGE, SHOWN = 0.5, 4  # a relative error that is told at once; how many of the largest are shown
Weight = tuple[str, float, float]  # name, bits per weight, relative error


def duration(seconds: float) -> str:
    """Such as `48 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Bars(RichProgress):
    """The bars, and below them the weights with the largest errors so far."""

    worst: tuple[Weight, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.worst:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(no_wrap=True)
            for name, bits, error in self.worst:
                short = shortened(name, self.console.width - BESIDE_NAME)
                table.add_row(f"  {short}", f"{bits:.2f} bit", f"error {error:.2e}")
            yield Text("largest errors so far")
            yield table


class TerminalProgress(Progress):
    """Bars with the remaining time on a terminal, with the weights of the largest errors; a line a minute elsewhere.
    verbose: a line for every weight; else weights with a very large error have one."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self._said = time.monotonic()
        self._verbose = verbose
        self._console = console(stderr=True)
        self._quiet = quiet
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._stage, self._total, self._done, self._start = "", 0, 0, time.monotonic()
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description:32}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = Bars(*columns, console=self._console)

    def __enter__(self) -> TerminalProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        if not self._bars:
            with super().foreign(name):
                yield
            return
        self._bars.stop()
        self._console.print(STAGES.get(name, name))
        with redirect_stdout(sys.stderr):  # stdout is for results
            yield
        self._bars.start()

    def stage(self, name: str, total: int) -> None:
        self._stage, self._total, self._done, self._start = STAGES.get(name, name), total, 0, time.monotonic()
        if self._bars:
            self._task = self._bars.add_task(self._stage, total=total)

    def advance(self) -> None:
        self._done += 1
        if self._bars and self._task is not None:
            self._bars.advance(self._task)
        elif self._total:
            seconds = time.monotonic() - self._start
            left = duration(seconds / self._done * (self._total - self._done))
            self._in_a_minute(f"{self._stage}: {self._done} of {self._total}, {duration(seconds)}, about {left} left")

    def sample(self, done: int, total: int) -> None:
        if not self._bars:
            step = f"{self._done + 1} of {self._total}" if self._total else "begins"
            self._in_a_minute(f"{self._stage}: {step}, sample {done} of {total}")

    def _in_a_minute(self, line: str) -> None:
        """Prints the line if the last such line is a minute old."""
        if time.monotonic() - self._said >= MINUTE:
            self._said = time.monotonic()
            self._print(line)

    def weight(self, name: str, bits_per_weight: float, error: float) -> None:
        mark = "  <-- large" if error > LARGE else ""
        if self._bars:
            every = [*self._bars.worst, (name, bits_per_weight, error)]
            self._bars.worst = tuple(sorted(every, key=lambda one: -one[2])[:SHOWN])
        if self._verbose or mark:
            width = self._console.width - BESIDE_NAME - len("  <-- large")
            name = f"{shortened(name, width):<{width}}"
            self._print(f"  {name} {bits_per_weight:5.2f} bit   error {error:9.2e}{mark}", "red" if mark else None)

    def note(self, text: str) -> None:
        self._print(f"note: {text}", "yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        if not self._quiet:
            with suppress(OSError, ValueError):  # a closed terminal, or one without these letters
                self._console.print(Whole(text), style=style)


def print_error(message: str) -> None:
    text = f"error: {message}"
    if sys.stderr.isatty():
        console(stderr=True).print(Whole(text), style="red")
    else:
        console(stderr=True).print(text, soft_wrap=True)
