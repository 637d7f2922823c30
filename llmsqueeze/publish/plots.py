"""The plan as pictures: bits as a heat map of blocks and linears, and predicted cost against size.

matplotlib draws them, through its object API and Agg: no display is needed, pyplot is never loaded, and the settings
of the process and the user's matplotlibrc neither change nor matter. It is optional and slow to import, so only the
functions import it; `available` tells whether they can be called. The same input gives the same bytes.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

NUMBERED_BLOCKS, NUMBERED_KINDS = 40, 200  # with more, the numbers in the cells would be too small to read
LEAST_SPAN = 1.0  # bits that the colours span at least, so that a nearly uniform plan looks like one
MISSING = "#d4d4d4"
# dates and versions are left out of the files
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def available() -> bool:
    """Whether matplotlib is installed; without it nothing else here can be called."""
    return importlib.util.find_spec("matplotlib") is not None


def heat_map(bits: Mapping[str, float], blocks: Sequence[Sequence[str]], title: str) -> Figure:
    """Rows are kinds of linear, columns decoder blocks, colours bits per weight with everything counted.

    `bits`: linear -> bits per weight; `blocks`: for each block the full names of its linears. Linears without bits
    and kinds that a block does not have are grey; bits of linears in no block are not shown. There must be a linear.
    """
    from matplotlib.figure import Figure

    kinds, found = _table(bits, blocks)
    rows, columns = len(kinds), len(blocks)
    with _style():
        cell = 0.36 if columns <= NUMBERED_BLOCKS else max(0.1, 12.5 / columns)
        width = max(6.0, 1.2 + 0.08 * max(map(len, kinds)) + 0.9 + cell * columns)
        tall = min(0.34, 20 / rows)
        numbered = columns <= NUMBERED_BLOCKS and rows <= NUMBERED_KINDS
        figure = Figure(figsize=(min(width, 40.0), max(2.4, 1.3 + tall * rows)), layout="constrained")
        axes = figure.add_subplot()
        mesh = _mesh(axes, found, lines=1.0 if numbered else 0.4)
        _label(axes, kinds, columns, min(9.0, 0.8 * 72 * tall))
        if numbered:
            _number(axes, mesh, found, min(7.5, 0.7 * 72 * tall))
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=max(8, 2 * rows), fraction=0.05)
        bar.set_label("bits per weight\n(everything counted)")
        bar.outline.set_visible(False)
        if any(value is None for row in found for value in row):
            axes.text(
                1.0,
                1.02,
                "grey: none, or not compressed",
                transform=axes.transAxes,
                ha="right",
                fontsize=7,
                color="#666666",
            )
        _finish(figure, title)
    return figure


def cost_curve(curve: Sequence[tuple[float, float]], chosen: tuple[float, float] | None, title: str) -> Figure:
    """Predicted loss increase against bits per weight, with the chosen point and its numbers.

    Points are (bits per weight, nats per token), in any order; those that are not finite are left out. The loss axis
    is logarithmic; increases of zero or less stand as triangles on its lower edge, or make it linear if all are so.
    """
    from matplotlib.figure import Figure

    points = sorted(point for point in curve if all(map(math.isfinite, point)))
    known = chosen if chosen and all(map(math.isfinite, chosen)) else None
    positive = [loss for _, loss in [*points, *([known] if known else [])] if loss > 0]
    with _style():
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("bits per weight (everything counted)")
        axes.set_ylabel("predicted loss increase (nats per token)")
        axes.grid(which="major", color="#e2e2e2", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if positive:
            _log_axis(axes, min(positive), max(positive))
        _draw_curve(axes, points, logarithmic=bool(positive))
        if known:
            _draw_chosen(axes, known, logarithmic=bool(positive))
        if not points and not known:
            axes.text(0.5, 0.5, "no points", transform=axes.transAxes, ha="center")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
        _finish(figure, title)
    return figure


def frontier(models: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """What every model costs in loss against its bytes, and the line of those that none beats in both.

    `models`: as in `comparison.json`, the original first, all with their loss measured.
    """
    from matplotlib.figure import Figure

    unit, scale = ("GB", 1e9) if models[0]["nbytes"] >= 1e9 else ("MB", 1e6)
    points = [(m["nbytes"] / scale, m["nll_difference"], m) for m in models[1:]]
    with _style():
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=f"all weights, {unit}", ylabel="loss above the original's, nats per token")
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        logarithmic = min((loss for _, loss, _ in points), default=0.0) > 0
        if logarithmic:
            axes.set_yscale("log")
        axes.margins(x=0.12, y=0.12)
        best = sorted((size, loss) for size, loss, m in points if m["on_frontier"])
        axes.plot(*zip(*best, strict=True), color="#2a6f97", linewidth=1.4, label="frontier") if best else None
        for size, loss, model in points:
            on = model["on_frontier"]
            error = model["nll_difference_stderr"] or 0.0
            style: dict[str, Any] = {"color": "#2a6f97" if on else "#8a8a8a", "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(
                [size], [loss], yerr=[[min(error, 0.95 * loss) if logarithmic else error], [error]], fmt="o", **style
            )
        original = models[0]["nbytes"] / scale
        axes.axvline(original, color="#d1495b", linewidth=0.9, linestyle=":", label="size of the original")
        axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
        _finish(figure, title)
        names = [textwrap.shorten(str(m["model"]).rstrip("/").rpartition("/")[2], 34) for _, _, m in points]
        _name_points(figure, axes, [(size, loss) for size, loss, _ in points], names)
    return figure


def draw_plan(plan: Mapping[str, Any], folder: Path) -> None:
    """A plan, as `llmsqueeze plan` returns it: its heat map, and where it lies on the curve of cost against bytes."""
    title = f"{plan['model']}: {plan['bits_per_weight']:.3f} bits per weight"
    write(heat_map(plan["weights"], plan["blocks"], title), folder / "plan")
    if plan["predicted_loss_increase"] is not None and plan["curve"]:
        chosen = (plan["bits_per_weight"], plan["predicted_loss_increase"])
        write(cost_curve(plan["curve"], chosen, title), folder / "cost")


def draw_frontier(comparison: Mapping[str, Any], path: Path) -> bool:
    """Writes the plot of quality against bytes; False if there is nothing to draw, or no matplotlib to draw it."""
    points = [model for model in comparison["models"] if model["nll_difference"] is not None]
    if len(points) < 2 or not available():
        return False
    write(frontier(points, f"{points[0]['model']}: what bytes buy"), path.with_suffix(""), ("png",))
    return True


def write(figure: Figure, path: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Writes `figure` as PNG and SVG beside each other; `path` has no suffix. Returns the files."""
    files = []
    for kind, metadata in ((kind, METADATA[kind]) for kind in kinds):
        image = BytesIO()
        with _style():
            figure.savefig(image, format=kind, dpi=150, metadata=metadata)
        file = path.with_name(f"{path.name}.{kind}")
        try:
            file.write_bytes(image.getvalue())
        except OSError as error:
            raise OutputError(f"cannot write the picture {file}: {error}") from error
        files.append(file)
    return files


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults whatever the user has set, with ids in SVG that do not change from run to run."""
    import matplotlib.style

    ours = {"svg.hashsalt": "llmsqueeze", "font.size": 9, "axes.titlesize": 11, "figure.facecolor": "white"}
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a title in a script that the font lacks
        yield


def _table(bits: Mapping[str, float], blocks: Sequence[Sequence[str]]) -> tuple[list[str], list[list[float | None]]]:
    """The kinds of linear in the order the blocks have them, and for each its bits in every block."""
    depth = _depth(blocks)
    inside = [{name.split(".", depth)[-1]: name for name in names} for names in blocks]
    kinds: list[str] = []
    for block in inside:
        place = min((kinds.index(kind) for kind in block if kind in kinds), default=len(kinds))
        for kind in block:  # one that is new comes between its neighbours in the block
            if kind not in kinds:
                kinds.insert(place, kind)
            place = kinds.index(kind) + 1
    assert kinds, "there is a linear to draw"

    def value(block: Mapping[str, str], kind: str) -> float | None:
        found = bits.get(block[kind]) if kind in block else None
        return found if found is not None and math.isfinite(found) else None

    return kinds, [[value(block, kind) for block in inside] for kind in kinds]


def _depth(blocks: Sequence[Sequence[str]]) -> int:
    """How many leading parts of a linear's name are its block's.

    They are what the names in a block share, up to the block's number where there is one: a block may have all its
    linears in one module.
    """
    split = [[name.split(".") for name in names] for names in blocks]
    levels = [zip(*(name[:-1] for name in names), strict=False) for names in split if names]
    depth = min((sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, one)) for one in levels), default=0)
    for at in range(depth):
        if all(name[at] == str(number) for number, names in enumerate(split) for name in names):
            return at + 1
    return depth


def _mesh(axes: Axes, found: Sequence[Sequence[float | None]], lines: float) -> QuadMesh:
    """The coloured cells, the first row on top; viridis is perceptually uniform and holds no grey."""
    import matplotlib
    import numpy as np

    values = np.ma.masked_invalid([[math.nan if value is None else value for value in row] for row in found])
    known = [value for row in found for value in row if value is not None] or [0.0]
    spare = max(0.0, LEAST_SPAN - (max(known) - min(known))) / 2
    low = max(0.0, min(known) - spare)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=MISSING)
    high = max(max(known), low + LEAST_SPAN)
    mesh = axes.pcolormesh(values, cmap=colours, vmin=low, vmax=high, edgecolors="white", linewidth=lines)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh


def _label(axes: Axes, kinds: Sequence[str], columns: int, size: float) -> None:
    """Names of the rows, numbers of the blocks: as many of them as can be read."""
    step = 1 if columns <= NUMBERED_BLOCKS else 5 if columns <= 150 else 20
    shown = range(0, columns, step)
    axes.set_xticks([i + 0.5 for i in shown], labels=[str(i) for i in shown])
    axes.set_xlabel("decoder block")
    every = max(1, math.ceil(5 / size))  # hundreds of rows: some of the names
    axes.set_yticks(
        [i + 0.5 for i in range(0, len(kinds), every)], labels=list(kinds[::every]), fontsize=max(size, 5.0)
    )
    axes.tick_params(length=2 if columns > NUMBERED_BLOCKS else 0)


def _number(axes: Axes, mesh: QuadMesh, found: Sequence[Sequence[float | None]], size: float) -> None:
    """The bits in every cell, black or white, whichever the cell's colour contrasts with more."""
    values = mesh.get_array()
    assert values is not None, "the mesh has its cells"
    colours = mesh.to_rgba(values)
    for y, row in enumerate(found):
        for x, value in enumerate(row):
            if value is not None:
                red, green, blue = (_linear(float(channel)) for channel in colours[y, x, :3])
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179  # where both contrast equally (WCAG 2)
                text = f"{value:.2f}" if value < 9.995 else f"{value:.1f}"
                colour = "white" if dark else "black"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _linear(channel: float) -> float:
    """An sRGB channel in 0..1 as light."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


def _log_axis(axes: Axes, least: float, most: float) -> None:
    """A logarithmic loss axis over at least a decade, its marks as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    middle, half = math.sqrt(least) * math.sqrt(most), max(math.sqrt(most / least) * 1.3, math.sqrt(10))
    axes.set_yscale("log")
    axes.set_ylim(middle / half, middle * half)
    few = half * half < 1000
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=16))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator() if few else LogLocator(subs=range(2, 10), numticks=16))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curve(axes: Axes, points: Sequence[tuple[float, float]], logarithmic: bool) -> None:
    """The line; on a logarithmic axis it is broken where points are zero or less."""
    if not points:
        return
    sizes = [size for size, _ in points]
    losses = [loss if loss > 0 or not logarithmic else math.nan for _, loss in points]
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(points) <= 60 else {}
    axes.plot(sizes, losses, color="#31688e", linewidth=1.6, label="smallest found at each size", **dots)
    low = [size for size, loss in points if loss <= 0]
    if low and logarithmic:
        edge = axes.get_xaxis_transform()
        style: dict[str, Any] = {"linestyle": "none", "marker": "v", "markersize": 4, "markerfacecolor": "white"}
        axes.plot(low, [0.0] * len(low), transform=edge, clip_on=False, color="#31688e", label="zero or less", **style)


def _draw_chosen(axes: Axes, chosen: tuple[float, float], logarithmic: bool) -> None:
    """The chosen point with lines to both axes; its numbers are in the legend, where nothing can cover them."""
    size, loss = chosen
    at_edge = logarithmic and loss <= 0
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform()} if at_edge else {}
    label = f"chosen: {size:.3f} bits per weight,\n{loss:+.3g} nats per token"
    style: dict[str, Any] = {"linestyle": "none", "marker": "D", "markersize": 7, "markeredgecolor": "white"}
    axes.axvline(size, color="#d1495b", linewidth=0.8, linestyle=":")
    if not at_edge:
        axes.axhline(loss, color="#d1495b", linewidth=0.8, linestyle=":")
    y = 0.0 if at_edge else loss
    axes.plot([size], [y], color="#d1495b", clip_on=False, zorder=5, label=label, **style, **place)


def _name_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes every point's name beside it, where it hides none of the points and names before it."""
    placed: list[tuple[float, float, float, float]] = []  # left, bottom, right, top in points
    scale = 72 / figure.dpi
    spots = [tuple(float(v) * scale for v in axes.transData.transform(point)) for point in points]
    for (x, y), point, name in zip(spots, points, names, strict=True):
        wide, tall = 4.6 * len(name), 9.0
        places = [(6.0, up) for up in (3, -11, 14, -22, 25)] + [(-6 - wide, up) for up in (3.0, -11, 14, -22)]
        boxes = [(x + dx, y + dy, x + dx + wide, y + dy + tall) for dx, dy in places]

        def hides(box: tuple[float, float, float, float]) -> int:
            others = [*placed, *((u - 3, v - 3, u + 3, v + 3) for u, v in spots)]
            return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)

        least = min(range(len(boxes)), key=lambda i: (hides(boxes[i]), i))
        placed.append(boxes[least])
        axes.annotate(name, point, places[least], textcoords="offset points", fontsize=8, parse_math=False)


def _finish(figure: Figure, title: str) -> None:
    """Adds the title, broken to the figure's width, and fixes where everything is: each drawing would move it a bit."""
    lines = textwrap.fill(title, width=int(figure.get_figwidth() * 11))
    figure.suptitle(lines, fontsize=11, parse_math=False)  # a $ in a name starts no formula
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
