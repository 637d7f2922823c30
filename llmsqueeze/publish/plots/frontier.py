"""The plot of quality against size: the loss of each compared model, and the line of those that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from llmsqueeze.publish import numbers
from llmsqueeze.publish.numbers import shortened
from llmsqueeze.publish.plots.figure import (
    BLUE,
    GREY,
    RED,
    finish,
    key,
    log_axis,
    log_ticks,
    only_ticks_within,
    plain_axes,
    round_size,
    style,
)
from llmsqueeze.publish.plots.labels import Box, Label, Place, Segment, place_labels
from llmsqueeze.publish.plots.points import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LOG_SIZES = 4.0  # the size axis is logarithmic if the sizes differ by this factor
LEAST_SPAN = 0.1  # of the size axis, of the sizes: less would show differences that mean nothing
MARGIN = 0.08  # of the size axis, on each side
LONGEST = 90  # letters of a name in the key
MOST_NAMED = 12  # with more models, only those on the frontier and this one have a number and a name
LEAST_BAR = 1 / 3  # of its loss: the lowest end of an error bar for which the axis is extended
NEGLIGIBLE = 0.02  # of the largest loss: a negative one beyond that wants a linear axis
DIGIT, LINE = 5.6, 9.6  # the width of a digit and the height of a number in points
MARK = 4.0  # half the size of a mark in points


def frontier(points: Sequence[Point], original: float | None, title: str) -> Figure:
    """The loss of each model against its bytes, with error bars, and a line through those on the frontier. Numbers
    beside the points are their places in the comparison; the key below has the names.

    `original`: the bytes of the original, which the label of the axis tells. The loss axis is logarithmic if losses are
    positive, and small ones of zero or less are triangles on its lower edge; else a dotted line is at zero. There must
    be a point.
    """
    from matplotlib.figure import Figure

    sizes = [point.nbytes for point in points]
    named = [p for p in points if len(points) <= MOST_NAMED or p.on_frontier or p.this]
    before = f" (the original: {numbers.size(original)})" if original else ""
    with style():
        figure = Figure(figsize=(7.5, 4.4 + 0.17 * len(named)), layout="constrained")
        axes = plain_axes(figure, f"size of all weights{before}", "loss increase (nats per token)")
        _size_axis(axes, min(sizes), max(sizes))
        floor = _loss_axis(axes, points)
        best = sorted((point.nbytes, max(point.loss, floor)) for point in points if point.on_frontier)
        lines = axes.plot(*zip(*best, strict=True), color=BLUE, linewidth=1.4) if best else []
        marks = {point.place: _draw_point(axes, point, floor) for point in points}
        names = [shortened(point.title, LONGEST) for point in named]
        key(figure, [*lines, *(marks[p.place] for p in named)], [*(["frontier"] if lines else []), *names])
        finish(figure, title)
        only_ticks_within(axes)
        _number_points(figure, axes, points, named, floor)
    return figure


def _size_axis(axes: Axes, least: float, most: float) -> None:
    """From the smallest to the largest model with room on both sides; equal sizes stand in the middle."""
    from matplotlib.ticker import MaxNLocator

    if most / least >= LOG_SIZES:
        spare = (most / least) ** MARGIN
        axes.set_xscale("log")
        axes.set_xlim(least / spare, most * spare)
        log_ticks(axes.xaxis, decades=math.log10(most / least))
    else:
        middle = (least + most) / 2
        half = max((0.5 + MARGIN) * (most - least), LEAST_SPAN / 2 * middle)
        axes.set_xlim(middle - half, middle + half)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda nbytes, _: round_size(nbytes))


def _loss_axis(axes: Axes, points: Sequence[Point]) -> float:
    """Makes the axis logarithmic if losses are positive, but for small ones. Returns its lower edge, or minus
    infinity."""
    lows = [max(point.loss - point.error, LEAST_BAR * point.loss) for point in points if point.loss > 0]
    most = max(point.loss for point in points)
    if not lows or min(point.loss for point in points) < -NEGLIGIBLE * most:
        axes.margins(y=0.12)
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        return -math.inf
    log_axis(axes, min(lows), max(point.loss + point.error for point in points))
    return float(axes.get_ylim()[0])


def _bar(point: Point, floor: float) -> tuple[float, float, float]:
    """The lower end, the middle and the upper end of a point's error bar, cut at `floor`."""
    return max(point.loss - point.error, floor), max(point.loss, floor), max(point.loss + point.error, floor)


def _draw_point(axes: Axes, point: Point, floor: float) -> Line2D:
    """The point and its error bar; returns the mark."""
    low, y, high = _bar(point, floor)
    mark, _, _ = axes.errorbar(
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
    ).lines
    assert mark is not None
    return mark


def _number_points(figure: Figure, axes: Axes, points: Sequence[Point], named: Sequence[Point], floor: float) -> None:
    """Writes the numbers of the named points, where they cover no point, no error bar and no line."""
    scale = 72 / figure.dpi

    def at(nbytes: float, loss: float) -> Place:
        x, y = axes.transData.transform((nbytes, loss))
        return float(x) * scale, float(y) * scale

    spots = {point.place: at(point.nbytes, max(point.loss, floor)) for point in points}
    marks: list[Box] = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in spots.values()]
    bars: list[Segment] = []
    for point in points:
        low, _, high = _bar(point, floor)
        bars += [(at(point.nbytes, low), at(point.nbytes, high))] if low < high else []
    best = sorted(spots[point.place] for point in points if point.on_frontier)
    (left, right), zero = axes.get_xlim(), 0.0
    lines = [*bars, *pairwise(best), *([(at(left, zero), at(right, zero))] if floor == -math.inf else [])]
    edges = axes.get_window_extent()
    inside = (edges.x0 * scale, edges.y0 * scale, edges.x1 * scale, edges.y1 * scale)
    texts = {str(point.place): spots[point.place] for point in named}
    sizes = [(DIGIT * len(text), LINE) for text in texts]
    labels = place_labels(list(texts.values()), sizes, marks, lines, inside)
    for (text, spot), label in zip(texts.items(), labels, strict=True):
        if label is not None:
            _write_number(axes, text, spot, label)


def _write_number(axes: Axes, text: str, spot: Place, label: Label) -> None:
    """The number at its place, with the thin line from its point at `spot` if it is far away; places in points."""
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 6.5}
    axes.annotate(
        text,
        spot,
        (label.centre[0] - spot[0], label.centre[1] - spot[1]),
        xycoords="figure points",
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        annotation_clip=False,
        arrowprops=line if label.line else None,
    )
