"""The common parts of all plots: style, axes, title, files, and SVG for HTML pages.

matplotlib is used through its object API and Agg. So no display is necessary, pyplot is not imported, and the settings
of the process and of the user have no effect. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import importlib.util
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.files import whole_file
from llmsqueeze.publish import numbers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, RED, GREY, RULE = "#2a6f97", "#d1495b", "#8a8a8a", "#e2e2e2"
# no dates and no versions in the files
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


def available() -> bool:
    """Whether matplotlib is installed. Without it, no other function of this package can be called."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults, whatever the user has set, and ids in SVG that are the same in each run."""
    import matplotlib.style

    ours = {"svg.hashsalt": "llmsqueeze", "font.size": 9, "axes.titlesize": 11, "figure.facecolor": "white"}
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        yield


def plain_axes(figure: Figure, x: str, y: str) -> Axes:
    """Axes with these labels, a light grid, and no frame at the top and on the right."""
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(which="major", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def log_axis(axes: Axes, least: float, most: float) -> None:
    """A logarithmic y axis over at least a decade."""
    middle, half = math.sqrt(least) * math.sqrt(most), max(math.sqrt(most / least) * 1.3, math.sqrt(10))
    axes.set_yscale("log")
    axes.set_ylim(middle / half, middle * half)
    log_ticks(axes.yaxis, decades=2 * math.log10(half))


def log_ticks(axis: Axis, decades: float) -> None:
    """Ticks with plain numbers: 1, 2 and 5 of each power of ten, or the powers only if the axis is long."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    few = decades < 3
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=16))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator() if few else LogLocator(subs=range(2, 10), numticks=16))
    axis.set_minor_formatter(NullFormatter())


def round_size(nbytes: float) -> str:
    """'500 kB', '1 MB': the numbers at ticks are round."""
    number, _, unit = numbers.size(max(nbytes, 0.0)).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def only_ticks_within(axes: Axes) -> None:
    """Leaves out the ticks beyond the ends of both axes; call it when their lengths are fixed."""
    from matplotlib.ticker import FixedLocator

    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(FixedLocator([tick for tick in axis.get_majorticklocs() if low <= tick <= high]))


def key(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """What the marks mean, below the axes, where it covers nothing; call it before `finish`."""
    if handles:
        legend = figure.legend(
            handles, labels, loc="outside lower left", frameon=False, fontsize=8, borderaxespad=0.2, labelspacing=0.3
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def finish(figure: Figure, title: str) -> None:
    """Adds the title, broken to the figure's width, and fixes the layout, because each drawing would move it."""
    if title:
        lines = textwrap.fill(title, width=int(figure.get_figwidth() * 11))
        figure.suptitle(lines, fontsize=11, parse_math=False)  # a $ in a name is not a formula
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def render(figure: Figure, kind: str) -> bytes:
    """`figure` as a file of this kind, png or svg."""
    image = BytesIO()
    with style():
        figure.savefig(image, format=kind, dpi=150, metadata=METADATA[kind])
    return image.getvalue()


def write(figure: Figure, path: Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Writes `figure` beside `path`, which has no suffix. Returns the files. Raises OutputError."""
    files = []
    for kind in kinds:
        file = path.with_name(f"{path.name}.{kind}")
        with whole_file(file) as half:
            half.write_bytes(render(figure, kind))
        files.append(file)
    return files


def data_uri(figure: Figure) -> str:
    """`figure` as the source of an HTML image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(render(figure, 'svg')).decode()}"
