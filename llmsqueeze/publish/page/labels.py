"""Names beside the points of a plot, where they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER, ASCENT, LINE = 6.6, 12.0, 16.0  # about the size of a letter
DOT = 6.0

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """A text, its anchor point as SVG has it, and what it covers."""

    text: str
    x: float
    y: float
    anchor: str
    box: Box


def shortened(name: str) -> str:
    """A name that fits into a plot; its middle goes first, for names of results differ at their ends."""
    return name if len(name) <= 30 else f"{name[:14]}…{name[-14:]}"


def place_labels(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    numbers: Sequence[str],
    inside: Box,
    floor: float | None,
) -> list[Label]:
    """A label for each point: its text where there is room, else its number. Those on the `floor` are on a line, and
    their labels above it."""
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in points]
    made = []
    for (x, y), text, number in zip(points, texts, numbers, strict=True):
        options = [label for written in (text, number) for label in around(x, y, written, above=y == floor)]
        free = (o for o in options if within(o.box, inside) and not any(meet(o.box, other) for other in taken))
        label = next(free, options[0])
        taken.append(label.box)
        made.append(label)
    return made


def around(x: float, y: float, text: str, above: bool) -> list[Label]:
    """Places for a label around a point, the best first."""
    width = LETTER * len(text)
    starts = {"start": 0.0, "middle": width / 2, "end": width}
    spots = [(9, 4, "start"), (-9, 4, "end"), (0, -11, "middle"), (0, 20, "middle")]
    spots += [(7, -9, "start"), (-7, -9, "end"), (7, 18, "start"), (-7, 18, "end")]
    if above:
        spots.sort(key=lambda spot: spot[1])
    return [
        Label(text, x + dx, y + dy, anchor, (left, y + dy - ASCENT, left + width, y + dy - ASCENT + LINE))
        for dx, dy, anchor in spots
        for left in [x + dx - starts[anchor]]
    ]


def within(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
