"""Progress of a long run. This base class shows nothing; cli/console.py draws it on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """A listener; a subclass overrides the methods that it needs."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins, and the stage before it has ended."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def weight(self, name: str, bits_per_weight: float, error: float) -> None:
        """A weight was compressed: its bits per weight and its relative output error."""

    def sample(self, done: int, total: int) -> None:
        """So many of the samples have gone through what the step measures."""

    def note(self, text: str) -> None:
        """A message to the user."""

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        """A stage in which another library reports its own progress; this class keeps it quiet."""
        self.stage(name, 1)
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
        self.advance()

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """In the context something is done beside a result, which it must not cost: what goes wrong is a note."""
        try:
            yield
        except Exception as error:
            self.note(f"{what}: {' '.join(str(error).split()) or type(error).__name__}")

    def over(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """`items` as a stage of `total` steps; a step is done when the next item is taken."""
        self.stage(name, total)
        for item in items:
            yield item
            self.advance()
