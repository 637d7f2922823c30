"""The plot of quality against size: where points, their names, the axes and the frontier go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmsqueeze.publish import numbers
from llmsqueeze.publish.page.labels import Label, place_labels, shortened

LOG_SIZES, LOG_LOSSES = 4.0, 10.0  # axes whose numbers span less are linear
LEAST_BAR = 1 / 3  # of the least loss: how far an error bar may stretch a logarithmic axis


@dataclass(frozen=True)
class Point:
    """A model: bytes, loss increase in nats per token with its standard error; `number` is its row in the table."""

    number: int
    name: str
    nbytes: float
    loss: float
    stderr: float | None
    on_frontier: bool
    role: str  # 'original', 'this' or 'other'


@dataclass(frozen=True)
class Mark:
    """A drawn point: centre, the ends of its error bar, its label and where that stands."""

    x: float
    y: float
    low: float | None
    high: float | None
    role: str
    on_frontier: bool
    title: str
    label: Label


@dataclass(frozen=True)
class Plot:
    """A laid out plot; `floor` is where points of zero or less stand when the loss axis is logarithmic."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    floor: float | None
    x_ticks: list[tuple[str, float]]
    y_ticks: list[tuple[str, float]]
    marks: list[Mark]
    line: list[tuple[float, float]]
    summary: str


@dataclass(frozen=True)
class Axis:
    """A scale between two pixels, and its ticks as (value, pixel)."""

    to_pixel: Callable[[float], float]
    ticks: list[tuple[float, float]]


def plot(points: Sequence[Point], width: float, height: float, named: bool) -> Plot | None:
    """The plot in a box of `width` x `height`; points are labelled by name if `named`, else by number.

    None where there is nothing beside the original.
    """
    if not any(point.role != "original" for point in points):
        return None
    left, right, top, bottom = 58.0, width - 18, 26.0, height - 44
    positive = [point.loss for point in points if point.loss > 0]
    log = len(positive) > 1 and max(positive) / min(positive) >= LOG_LOSSES
    floor = bottom - 12 if log else None
    sizes = [point.nbytes for point in points]
    x = axis(sizes, left + 14, right - 14, max(sizes) / max(min(sizes), 1) >= LOG_SIZES)
    reach = [value for p in points for value in (p.loss - (p.stderr or 0), p.loss + (p.stderr or 0))]
    if log:
        least = min(positive) * LEAST_BAR
        y = axis([*positive, *(value for value in reach if value > least)], bottom - 44, top + 10, True)
    else:
        y = axis([0.0, *reach], bottom - 10, top + 10, False)

    def height_of(loss: float) -> float:
        return floor if floor is not None and loss <= 0 else min(y.to_pixel(loss), floor or bottom)

    centres = [(x.to_pixel(point.nbytes), height_of(point.loss)) for point in points]
    texts = [shortened(point.name) if named else str(point.number) for point in points]
    labels = place_labels(centres, texts, [str(p.number) for p in points], (left, top - 8, right, bottom), floor)
    marks = [
        Mark(
            *centre,
            low=None if point.stderr is None or point.role == "original" else height_of(point.loss - point.stderr),
            high=None if point.stderr is None or point.role == "original" else height_of(point.loss + point.stderr),
            role=point.role,
            on_frontier=point.on_frontier,
            title=f"{point.number}. {point.name}: {numbers.size(point.nbytes)}, {told(point)}",
            label=label,
        )
        for point, centre, label in zip(points, centres, labels, strict=True)
    ]
    ticks = [("0 or less", floor)] if floor is not None else []
    return Plot(
        *(width, height, left, right, top, bottom, floor),
        x_ticks=[(round_size(value), at) for value, at in x.ticks],
        y_ticks=[*((plain(value), at) for value, at in y.ticks), *ticks],
        marks=marks,
        line=sorted(centre for point, centre in zip(points, centres, strict=True) if point.on_frontier),
        summary="; ".join(mark.title for mark in marks) + ".",
    )


def told(point: Point) -> str:
    """A point's loss in numbers."""
    if point.role == "original":
        return "the original"
    spread = "" if point.stderr is None else f" ± {numbers.significant(point.stderr, 2)}"
    sign = "+" if point.loss > 0 else ""
    return f"loss {sign}{numbers.significant(point.loss)}{spread} nats per token"


def round_size(nbytes: float) -> str:
    """'500 kB', '1 MB': ticks are round numbers."""
    digits, _, unit = numbers.size(nbytes).partition(" ")
    return f"{float(digits.replace(',', '')):g} {unit}"


def plain(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    """Spans `values` between the pixels `start` and `end`, with two to eight round ticks."""
    low, high = min(values), max(values)
    if high == low:
        low, high = (low / 1.5, high * 1.5) if log else (low - abs(low or 1) / 10, high + abs(high or 1) / 10)
    scale: Callable[[float], float] = math.log10 if log else float

    def to_pixel(value: float) -> float:
        return start + (end - start) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    return Axis(to_pixel, [(tick, to_pixel(tick)) for tick in ticks])


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every power of ten, or the powers alone where that would be many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [tick for e in exponents for s in steps if low * 0.999 <= (tick := float(f"{s}e{e}")) <= high * 1.001]
        if len(found) <= 8:
            return found
    return found


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return [float(f"{i * step:.9g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
