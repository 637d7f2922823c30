"""The plot of quality against size: the loss of each compared model, and the line of those that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsqueeze.publish import numbers
from llmsqueeze.publish.numbers import finite, significant
from llmsqueeze.publish.plots.figure import BLUE, GREY, RED, finish, legend, log_axis, log_ticks, plain_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SIZES = 4.0  # the size axis is logarithmic if the sizes differ by this factor
LONGEST = 30  # letters of a name
MOST_NAMED = 12  # with more models, only those on the frontier and this one have their name beside them
LEAST_BAR = 1 / 3  # of its loss: the lowest end of an error bar for which the axis is extended
LETTER, LINE = 4.6, 9.0  # the size of a letter in points

Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True)
class Point:
    """A compressed model: its bytes, its loss above the original's in nats per token, the standard error of that."""

    name: str
    nbytes: float
    loss: float
    error: float
    on_frontier: bool
    this: bool


def points_of(models: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The models of a comparison, without the original and without those whose size or loss is unknown."""
    points = []
    for model in models[1:]:
        nbytes, loss = finite(model.get("nbytes")), finite(model.get("nll_difference"))
        if nbytes is not None and nbytes > 0 and loss is not None:
            error = finite(model.get("nll_difference_stderr")) or 0.0
            name = shortened(str(model.get("model")).rstrip("/").rpartition("/")[2])
            points.append(Point(name, nbytes, loss, error, model.get("on_frontier") is True, model.get("this") is True))
    return points


def original_nbytes(models: Sequence[Mapping[str, Any]]) -> float | None:
    """The bytes of the original, the first model of a comparison."""
    nbytes = finite(models[0].get("nbytes"))
    return nbytes if nbytes and nbytes > 0 else None


def shortened(name: str) -> str:
    """A name of at most `LONGEST` letters. The middle is cut, because the ends tell names apart."""
    half = LONGEST // 2 - 1
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def frontier(points: Sequence[Point], original: float | None, title: str) -> Figure:
    """The loss of each model against its bytes, with error bars, and a line through those on the frontier.

    `original`: the bytes of the original, drawn as a vertical line. If a loss is positive, the loss axis is
    logarithmic, and losses of zero or less are triangles on its lower edge. There must be a point.
    """
    from matplotlib.figure import Figure

    sizes = [point.nbytes for point in points] + ([original] if original else [])
    with style():
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = plain_axes(figure, "size of all weights", "loss increase (nats per token)")
        _size_axis(axes, min(sizes), max(sizes))
        floor = _loss_axis(axes, points)
        best = sorted((point.nbytes, max(point.loss, floor)) for point in points if point.on_frontier)
        if best:
            axes.plot(*zip(*best, strict=True), color=BLUE, linewidth=1.4, label="frontier")
        for point in points:
            _draw_point(axes, point, floor)
        if original:
            axes.axvline(original, color=RED, linewidth=0.9, linestyle=":", label="size of the original")
        legend(axes)
        finish(figure, title)
        named = [p for p in points if len(points) <= MOST_NAMED or p.on_frontier or p.this]
        _name_points(figure, axes, points, named, floor)
    return figure


def frontier_text(points: Sequence[Point]) -> str:
    """The plot in a sentence, for readers who do not see it."""
    return "; ".join(map(_summary, points)) + "."


def _summary(point: Point) -> str:
    sign = "+" if point.loss > 0 else ""
    error = f" ± {significant(point.error, 2)}" if point.error else ""
    best = ", on the frontier" if point.on_frontier else ""
    loss = f"loss {sign}{significant(point.loss)}{error} nats per token"
    return f"{point.name}: {numbers.size(point.nbytes)}, {loss}{best}"


def _size_axis(axes: Axes, least: float, most: float) -> None:
    if most / least >= LOG_SIZES:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, decades=math.log10(most / least))
    axes.xaxis.set_major_formatter(lambda nbytes, _: _round_size(nbytes))
    axes.margins(x=0.12, y=0.12)


def _round_size(nbytes: float) -> str:
    """'500 kB', '1 MB': the numbers at ticks are round."""
    number, _, unit = numbers.size(max(nbytes, 0.0)).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def _loss_axis(axes: Axes, points: Sequence[Point]) -> float:
    """Makes the axis logarithmic if a loss is positive. Returns its lower edge, or minus infinity."""
    lows = [max(point.loss - point.error, LEAST_BAR * point.loss) for point in points if point.loss > 0]
    if not lows:
        return -math.inf
    log_axis(axes, min(lows), max(point.loss + point.error for point in points))
    return float(axes.get_ylim()[0])


def _draw_point(axes: Axes, point: Point, floor: float) -> None:
    """The point and its error bar, both cut at `floor`."""
    y = max(point.loss, floor)
    low, high = max(point.loss - point.error, floor), max(point.loss + point.error, floor)
    axes.errorbar(
        [point.nbytes],
        [y],
        yerr=[[y - low], [high - y]],
        fmt="o" if point.loss > floor else "v",
        color=BLUE if point.on_frontier else GREY,
        markeredgecolor=RED if point.this else None,
        markeredgewidth=1.8 if point.this else None,
        capsize=2,
        elinewidth=0.8,
        clip_on=False,
        zorder=3,
    )


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point], named: Sequence[Point], floor: float) -> None:
    """Writes names beside points, each where it covers the fewest points and names and is inside the axes."""
    scale = 72 / figure.dpi
    edges = axes.get_window_extent()
    inside = (edges.x0 * scale, edges.y0 * scale, edges.x1 * scale, edges.y1 * scale)

    def centre(point: Point) -> tuple[float, float]:
        x, y = axes.transData.transform((point.nbytes, max(point.loss, floor)))
        return float(x) * scale, float(y) * scale

    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in map(centre, points)]
    for point in named:
        offsets, boxes = _places(*centre(point), point.name)
        least = min(range(len(boxes)), key=lambda i: (_outside(boxes[i], inside), _covered(boxes[i], taken), i))
        taken.append(boxes[least])
        axes.annotate(
            point.name,
            (point.nbytes, max(point.loss, floor)),
            offsets[least],
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if point.this else "normal",
            parse_math=False,
            annotation_clip=False,
        )


def _places(x: float, y: float, name: str) -> tuple[list[tuple[float, float]], list[Box]]:
    """Offsets of a name from its point at (x, y), the best first, and the boxes that it would cover."""
    wide = LETTER * len(name)
    offsets = [(6.0, up) for up in (3.0, -11, 14, -22, 25)] + [(-6 - wide, up) for up in (3.0, -11, 14, -22, 25)]
    return offsets, [(x + dx, y + dy, x + dx + wide, y + dy + LINE) for dx, dy in offsets]


def _outside(box: Box, edges: Box) -> bool:
    return box[0] < edges[0] or box[1] < edges[1] or box[2] > edges[2] or box[3] > edges[3]


def _covered(box: Box, others: Sequence[Box]) -> int:
    """How many of the others the box covers in part."""
    return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
