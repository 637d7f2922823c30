"""The curve of predicted cost against size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsqueeze.publish.plots.figure import BLUE, RED, finish, key, log_axis, only_ticks_within, plain_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cost_curve(curve: Sequence[tuple[float, float]], chosen: tuple[float, float] | None, title: str) -> Figure:
    """Predicted loss increase against bits per weight, with the chosen point and its numbers.

    Points are (bits per weight, nats per token) in any order; a point that is not finite is left out. The loss axis is
    logarithmic, and increases of zero or less are triangles on its lower edge. It is linear if no increase is positive.
    """
    from matplotlib.figure import Figure

    points = sorted(point for point in curve if all(map(math.isfinite, point)))
    mark = chosen if chosen and all(map(math.isfinite, chosen)) else None
    positive = [loss for _, loss in [*points, *([mark] if mark else [])] if loss > 0]
    with style():
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        axes = plain_axes(figure, "bits per weight (all data counted)", "predicted loss increase (nats per token)")
        if positive:
            log_axis(axes, min(positive), max(positive))
        _draw_curve(axes, points, logarithmic=bool(positive))
        if mark:
            _draw_chosen(axes, mark, logarithmic=bool(positive))
        if not points and not mark:
            axes.text(0.5, 0.5, "no points", transform=axes.transAxes, ha="center")
        key(figure, *axes.get_legend_handles_labels())
        finish(figure, title)
        only_ticks_within(axes)
    return figure


def _draw_curve(axes: Axes, points: Sequence[tuple[float, float]], logarithmic: bool) -> None:
    """The line. On a logarithmic axis it has gaps at points of zero or less."""
    if not points:
        return
    sizes = [size for size, _ in points]
    losses = [loss if loss > 0 or not logarithmic else math.nan for _, loss in points]
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(points) <= 60 else {}
    axes.plot(sizes, losses, color=BLUE, linewidth=1.6, label="smallest at each size", **dots)
    low = [size for size, loss in points if loss <= 0]
    if low and logarithmic:
        edge = axes.get_xaxis_transform()
        marker: dict[str, Any] = {"linestyle": "none", "marker": "v", "markersize": 4, "markerfacecolor": "white"}
        axes.plot(low, [0.0] * len(low), transform=edge, clip_on=False, color=BLUE, label="zero or less", **marker)


def _draw_chosen(axes: Axes, chosen: tuple[float, float], logarithmic: bool) -> None:
    """The chosen point with lines to both axes. Its numbers are in the key below the axes."""
    size, loss = chosen
    at_edge = logarithmic and loss <= 0
    transform: dict[str, Any] = {"transform": axes.get_xaxis_transform()} if at_edge else {}
    label = f"chosen: {size:.3f} bits per weight, {loss:+.3g} nats per token"
    marker: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 7, "markeredgecolor": "white"}
    axes.axvline(size, color=RED, linewidth=0.8, linestyle=":")
    if not at_edge:
        axes.axhline(loss, color=RED, linewidth=0.8, linestyle=":")
    y = 0.0 if at_edge else loss
    axes.plot([size], [y], color=RED, clip_on=False, zorder=5, label=label, **marker, **transform)
