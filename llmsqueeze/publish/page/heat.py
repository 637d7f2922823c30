"""The heat map: decoder blocks as columns, kinds of linear as rows, a number as the colour; where everything goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STEPS = 10  # colours, s0 to s9 in page.css
ROW = 26
TOP = 22  # the numbers of the blocks
WIDTH = 940  # that the cells share, where there are many
WIDEST, NARROWEST = 64.0, 7.4
ROOMY, TIGHT = 40.0, 23.0  # cells wide enough for a number with two decimals, and for one with one
LETTER = 7.3  # about the width of one in the name of a kind
MARGIN = 10  # for half of the last block's number
NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")

Write = Callable[[float, int], str]  # a value, with so many decimals


@dataclass(frozen=True)
class Cell:
    x: float
    y: float
    step: int
    text: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """A laid out map: its size in pixels, its cells, and the words along its edges."""

    width: float
    height: float
    label_width: float
    cell_width: float
    cell_height: float
    cells_width: float
    gap: float
    cells: list[Cell]
    kinds: list[tuple[str, float]]
    blocks: list[tuple[int, float]]
    low: str
    high: str
    summary: str


def place(name: str) -> tuple[int, str] | None:
    """The block of a linear and what it is called there, by the first number in its name."""
    match = NUMBERED.match(name)
    return (int(match[2]), match[3]) if match else None


def heat_map(
    values: Mapping[str, float], blocks: int, write: Write, unit: str, least_span: float = 0.0, log: bool = False
) -> HeatMap | None:
    """`values`: linear -> number; `blocks`: how many there are at least. None where no linear belongs to a block.

    Colours go from the least value to the largest, over `least_span` at least, by order of magnitude if `log`.
    """
    placed = {where: (name, value) for name, value in values.items() if (where := place(name))}
    if not placed:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in placed))
    columns = max(blocks, 1 + max(block for block, _ in placed))
    width = min(WIDEST, max(NARROWEST, WIDTH / columns))
    names = short_names(kinds)
    left = 12 + LETTER * max(map(len, names))
    numbers = [value for _, value in placed.values()]
    scale = scale_of(numbers, least_span, log)
    decimals = 2 if width >= ROOMY else 1
    cells = [
        Cell(
            left + block * width,
            TOP + kinds.index(kind) * ROW,
            scale.step(value),
            write(value, decimals) if width >= TIGHT else "",
            f"block {block}, {kind}: {write(value, 2)} {unit}",
        )
        for (block, kind), (_, value) in placed.items()
    ]
    worst, best = max(placed, key=lambda at: placed[at][1]), min(placed, key=lambda at: placed[at][1])
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * width >= 22)
    return HeatMap(
        width=left + columns * width + MARGIN,
        height=TOP + len(kinds) * ROW,
        label_width=left,
        cell_width=width,
        cell_height=ROW,
        cells_width=columns * width,
        gap=1.0 if width >= TIGHT else 0.0,
        cells=cells,
        kinds=[(name, TOP + (i + 0.5) * ROW) for i, name in enumerate(names)],
        blocks=[(i, left + (i + 0.5) * width) for i in range(0, columns, every)],
        low=write(scale.low, 2),
        high=write(scale.high, 2),
        summary=(
            f"{len(placed)} linears in {columns} blocks; from {write(min(numbers), 2)} {unit} "
            f"(block {best[0]}, {best[1]}) to {write(max(numbers), 2)} (block {worst[0]}, {worst[1]})."
        ),
    )


def short_names(kinds: list[str]) -> list[str]:
    """Kinds by their last component, where that tells them apart."""
    short = [kind.rpartition(".")[2] for kind in kinds]
    return short if len(set(short)) == len(kinds) else kinds


@dataclass(frozen=True)
class Scale:
    """The colours of values from `low` to `high`, which stand at the ends of the legend."""

    low: float
    high: float
    log: bool

    def step(self, value: float) -> int:
        low, high, at = (self._scaled(one) for one in (self.low, self.high, value))
        return min(STEPS - 1, max(0, int((at - low) / max(high - low, 1e-12) * STEPS)))

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def scale_of(values: Sequence[float], least_span: float, log: bool) -> Scale:
    """From the least value, of those above zero if `log`, to the largest; over `least_span` at least."""
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        return Scale(min(positive), max(positive), log)
    low, high = min(values), max(values)
    low = max(0.0, low - max(0.0, least_span - (high - low)) / 2)
    return Scale(low, max(high, low + least_span), log)
