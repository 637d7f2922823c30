"""The plot of models that all have about the same size: their losses, the least on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsqueeze.publish import numbers
from llmsqueeze.publish.numbers import shortened
from llmsqueeze.publish.plots.figure import (
    BLUE,
    GREY,
    RED,
    finish,
    log_ticks,
    only_ticks_within,
    plain_axes,
    style,
)
from llmsqueeze.publish.plots.points import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_LOSSES = 5.0  # the loss axis is logarithmic if the losses differ by this factor
MARGIN = 0.1  # of the loss axis, on each side
LONGEST = 48  # letters of a name


def ranking(points: Sequence[Point], original: float | None, title: str) -> Figure:
    """A row for each model with its name, its loss and the error bar of that. `original`: the bytes of the original,
    which the label of the axis tells. There must be a point."""
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda point: point.loss)
    with style():
        figure = Figure(figsize=(7.5, min(1.3 + 0.3 * len(points), 40.0)), layout="constrained")
        axes = plain_axes(figure, f"loss increase (nats per token), at {_sizes(points, original)}", "")
        for row, point in enumerate(ordered):
            axes.errorbar(
                [point.loss],
                [row],
                xerr=[[point.error], [point.error]],
                fmt="o",
                color=BLUE if point.on_frontier else GREY,
                markeredgecolor=RED if point.this else None,
                markeredgewidth=1.8 if point.this else None,
                capsize=2,
                elinewidth=0.8,
            )
        axes.set_yticks(range(len(ordered)), labels=[shortened(point.title, LONGEST) for point in ordered])
        for label, point in zip(axes.get_yticklabels(), ordered, strict=True):
            label.set_parse_math(False)
            label.set_fontweight("bold" if point.this else "normal")
        axes.set_ylim(len(ordered) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _loss_axis(axes, points)
        finish(figure, title)
        only_ticks_within(axes)
    return figure


def _sizes(points: Sequence[Point], original: float | None) -> str:
    """'45.0 MB (the original: 269 MB)', or the least and the largest size."""
    nbytes = sorted(point.nbytes for point in points)
    ends = dict.fromkeys(numbers.size(one) for one in (nbytes[0], nbytes[-1]))
    return " to ".join(ends) + (f" (the original: {numbers.size(original)})" if original else "")


def _loss_axis(axes: Axes, points: Sequence[Point]) -> None:
    """From the lowest to the highest end of a bar with room on both sides."""
    low, high = min(point.loss - point.error for point in points), max(point.loss + point.error for point in points)
    if low > 0 and high / low >= LOG_LOSSES:
        spare = (high / low) ** MARGIN
        axes.set_xscale("log")
        axes.set_xlim(low / spare, high * spare)
        log_ticks(axes.xaxis, decades=2.0)
        return
    spare = MARGIN * (high - low) or 0.1 * abs(high) or 1e-3
    axes.set_xlim(low - spare, high + spare)
    if low - spare < 0 < high + spare:
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
