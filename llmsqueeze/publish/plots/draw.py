"""The plots that `llmsqueeze plan` and `llmsqueeze compare` write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.publish.plots.cost import cost_curve
from llmsqueeze.publish.plots.figure import available, write
from llmsqueeze.publish.plots.frontier import frontier
from llmsqueeze.publish.plots.heat_map import heat_map
from llmsqueeze.publish.plots.points import Point, about_equal, original_nbytes, points_of
from llmsqueeze.publish.plots.ranking import ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plan(plan: Mapping[str, Any], folder: Path) -> None:
    """Writes the heat map of a plan from `llmsqueeze plan`, and its place on the curve of cost against size."""
    title = f"{plan['model']}: {plan['bits_per_weight']:.3f} bits per weight"
    write(heat_map(plan["weights"], plan["blocks"], title), folder / "plan")
    if plan["predicted_loss_increase"] is not None and plan["curve"]:
        chosen = (plan["bits_per_weight"], plan["predicted_loss_increase"])
        write(cost_curve(plan["curve"], chosen, title), folder / "cost")


def draw_frontier(comparison: Mapping[str, Any], path: Path) -> bool:
    """Writes the plot of quality and size. False if there is no measured model or no matplotlib."""
    models = comparison["models"]
    points = points_of(models)
    if not points or not available():
        return False
    title = f"{models[0]['model']}: quality against size"
    write(quality(points, original_nbytes(models), title), path.with_suffix(""), ("png",))
    return True


def quality(points: Sequence[Point], original: float | None, title: str) -> Figure:
    """The losses of models of one size in order, or quality against size if there are several sizes."""
    draw = ranking if len(about_equal(points)) == 1 else frontier
    return draw(points, original, title)
