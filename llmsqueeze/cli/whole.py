"""Text for a terminal that loses no letter: it is broken at spaces, and a long name behind a dot, a slash, a hyphen or
an underscore."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PIECES = re.compile(r"[^./\\_\- ]*[./\\_\- ]*")  # of a text, each with what follows it


@dataclass(frozen=True)
class Whole:
    """A plain text; in a narrow column it takes several lines."""

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lines = self.text.split("\n")
        longest = max(cell_len(piece.rstrip()) for line in lines for piece in pieces(line) or [""])
        return Measurement(min(longest, options.max_width), min(max(map(cell_len, lines)), options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = CONTROL.sub("�", self.text)
        lines = [part for line in plain.split("\n") for part in broken(line, options.max_width)]
        yield Text("\n".join(lines), no_wrap=True)


def pieces(text: str) -> list[str]:
    return [piece for piece in PIECES.findall(text) if piece]


def broken(text: str, width: int) -> list[str]:
    """The lines of at most `width` columns that the text takes: words stay whole if they fit, the pieces of longer
    ones if those do, and only a longer piece is cut. The lines joined are the text, but for spaces at their ends."""
    lines = [""]
    for word in re.findall(r"\s*\S+\s*", text):
        if cell_len(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word
            continue
        if cell_len(word.rstrip()) <= width:
            lines.append(word)
            continue
        for piece in pieces(word):
            if cell_len(lines[-1] + piece.rstrip()) <= width:
                lines[-1] += piece
                continue
            cuts = [*range(0, len(piece), max(1, width)), len(piece)]
            lines += [piece[start:end] for start, end in pairwise(cuts)]
    return [line.rstrip() for line in lines if line.strip()] or [""]


class Facts(Table):
    """Labels, and a text beside each."""

    def __init__(self) -> None:
        super().__init__(show_header=False, box=None, pad_edge=False)
        self.add_column(no_wrap=True)
        self.add_column()

    def add(self, label: str, text: str) -> None:
        self.add_row(label, Whole(text))
