"""What a long run tells whoever watches it. The base class says nothing; report.py draws it on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """A listener; every method may be ignored."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins, and the one before it has ended."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def weight(self, name: str, bits_per_weight: float, error: float) -> None:
        """A weight was compressed: its bits per weight and its relative output error."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        """A stage in which another library reports on its own; without a terminal it is kept quiet."""
        self.stage(name, 1)
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
        self.advance()

    def over(self, items: Iterable[T], name: str, total: int) -> Iterator[T]:
        """`items`, announced as a stage of `total` steps, each step done when the next is asked for."""
        self.stage(name, total)
        for item in items:
            yield item
            self.advance()
