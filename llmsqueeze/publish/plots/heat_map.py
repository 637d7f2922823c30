"""The heat map: a number for each linear, by decoder block and kind of linear."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from llmsqueeze.publish.numbers import fixed, significant
from llmsqueeze.publish.plots.figure import finish, log_ticks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.ma import MaskedArray

NUMBERED_BLOCKS, NUMBERED_KINDS = 40, 200  # with more, the numbers in the cells would be too small to read
PAGE = 12.0  # inches that a page shows at full size on a screen of 1280 pixels
MISSING = "#d4d4d4"
NOTE: dict[str, Any] = {"fontsize": 7, "color": "#666666"}


@dataclass(frozen=True)
class Scale:
    """The numbers of a map: their unit, the label of their colours, the colours, and their text in a cell.

    `logarithmic`: colours by order of magnitude. `least_span`: the colours span at least this, so that nearly equal
    numbers look equal: a difference, or a factor if the scale is logarithmic.
    """

    unit: str
    label: str
    colours: str  # perceptually uniform and without grey
    text: Callable[[float], str]
    least_span: float
    logarithmic: bool = False


def bits_text(bits: float) -> str:
    return fixed(bits, 2 if bits < 9.995 else 1)


def percent_text(percent: float) -> str:
    """At most four letters: '30', '1.3', '.13', '.02', '.003', and '≈0' below that."""
    if not 0 < percent < 0.995:
        return significant(percent, 2)
    return "≈0" if percent < 0.001 else significant(percent, 2 if percent >= 0.0995 else 1).removeprefix("0")


BITS = Scale("bits per weight", "bits per weight\n(all data counted)", "viridis", bits_text, least_span=1.0)
ERRORS = Scale("% error", "error, % of the\noutput's energy", "magma_r", percent_text, 10.0, logarithmic=True)


def heat_map(
    values: Mapping[str, float], blocks: Sequence[Sequence[str]], title: str = "", scale: Scale = BITS
) -> Figure:
    """Rows are kinds of linear, columns are decoder blocks, colours are the numbers.

    `values`: linear -> number. `blocks`: for each block the full names of its linears. Linears without a number and
    kinds that a block does not have are grey. A linear in no block is not shown. There must be a linear.
    """
    from matplotlib.figure import Figure

    kinds, table = _table(values, blocks)
    rows, columns = len(kinds), len(blocks)
    with style():
        beside = 1.4 + 0.08 * max(map(len, kinds))  # the names, what most cells of a row say, and the colours
        least, most = (0.27, 0.36) if columns <= NUMBERED_BLOCKS else (0.1, 0.2)
        cell = min(max(least, (PAGE - beside) / columns), most)
        width = max(6.0, beside + cell * columns)
        tall = min(0.34, 20 / rows)
        numbered = columns <= NUMBERED_BLOCKS and rows <= NUMBERED_KINDS
        common = [_common(row, scale) for row in table]
        figure = Figure(figsize=(min(width, 40.0), max(2.4, 1.3 + tall * rows)), layout="constrained")
        axes = figure.add_subplot()
        mesh = _mesh(axes, table, scale, lines=1.0 if numbered else 0.4)
        _label(axes, kinds, columns, min(9.0, 0.8 * 72 * tall))
        if numbered:
            _number(axes, mesh, table, scale, common, min(7.5, 0.7 * 72 * tall))
        if rows <= NUMBERED_KINDS:
            _number_rows(axes, table, scale, common, numbered, min(7.5, 0.7 * 72 * tall))
        bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=max(8, 2 * rows), fraction=0.05)
        bar.set_label(scale.label)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        if scale.logarithmic:
            low, high = mesh.get_clim()
            log_ticks(bar.ax.yaxis, decades=math.log10(high / low))
        if any(value is None for row in table for value in row):
            axes.text(1.0, 1.02, "grey: none, or not compressed", transform=axes.transAxes, ha="right", **NOTE)
        finish(figure, title)
    return figure


def heat_map_text(values: Mapping[str, float], blocks: Sequence[Sequence[str]], scale: Scale = BITS) -> str:
    """The map in a sentence, for readers who do not see it."""
    kinds, table = _table(values, blocks)
    cells = [
        (value, f"block {block}, {kind}")
        for kind, row in zip(kinds, table, strict=True)
        for block, value in enumerate(row)
        if value is not None
    ]
    if not cells:
        return "No numbers."
    (low, low_place), (high, high_place) = min(cells), max(cells)
    least, most = (re.sub(r"^\.", "0.", scale.text(number)) for number in (low, high))
    span = f"all {most}" if least == most else f"from {least} ({low_place}) to {most}"
    where = "" if least == most else f" ({high_place})"
    return f"{len(cells)} linears in {len(blocks)} blocks: {span} {scale.unit}{where}."


def _table(values: Mapping[str, float], blocks: Sequence[Sequence[str]]) -> tuple[list[str], list[list[float | None]]]:
    """The kinds of linear in the order of the blocks, and for each its number in every block."""
    depth = _depth(blocks)
    inside = [{name.split(".", depth)[-1]: name for name in names} for names in blocks]
    kinds: list[str] = []
    for block in inside:
        position = min((kinds.index(kind) for kind in block if kind in kinds), default=len(kinds))
        for kind in block:  # a new kind comes between its neighbours in the block
            if kind not in kinds:
                kinds.insert(position, kind)
            position = kinds.index(kind) + 1

    def value(block: Mapping[str, str], kind: str) -> float | None:
        number = values.get(block[kind]) if kind in block else None
        return number if number is not None and math.isfinite(number) else None

    return kinds, [[value(block, kind) for block in inside] for kind in kinds]


def _depth(blocks: Sequence[Sequence[str]]) -> int:
    """The number of leading components of a linear's name that are its block's.

    The names in a block share these components. They end at the block's number, because all linears of a block may be
    in one module.
    """
    components = [[name.split(".") for name in names] for names in blocks]
    levels = [zip(*(name[:-1] for name in names), strict=False) for names in components if names]
    depth = min((sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, one)) for one in levels), default=0)
    for at in range(depth):
        if all(name[at] == str(number) for number, names in enumerate(components) for name in names):
            return at + 1
    return depth


def _values(table: Sequence[Sequence[float | None]]) -> MaskedArray:
    """[rows, columns]: the table with its unknown numbers masked."""
    import numpy as np

    return np.ma.masked_invalid([[math.nan if value is None else value for value in row] for row in table])


def _mesh(axes: Axes, table: Sequence[Sequence[float | None]], scale: Scale, lines: float) -> QuadMesh:
    """The coloured cells, the first row at the top."""
    import matplotlib

    numbers = [value for row in table for value in row if value is not None] or [0.0]
    colours = matplotlib.colormaps[scale.colours].with_extremes(bad=MISSING)
    mesh = axes.pcolormesh(
        _values(table), cmap=colours, norm=colour_range(numbers, scale), edgecolors="white", linewidth=lines
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return mesh


def colour_range(numbers: Sequence[float], scale: Scale) -> Normalize:
    """From the least number to the largest, or from the least positive one if the scale is logarithmic; wider if that
    is less than the scale spans at least."""
    from matplotlib.colors import LogNorm, Normalize

    if scale.logarithmic:
        positive = [number for number in numbers if number > 0] or [1.0]
        spare = math.sqrt(max(1.0, scale.least_span * min(positive) / max(positive)))
        return LogNorm(min(positive) / spare, max(positive) * spare, clip=True)
    spare = max(0.0, scale.least_span - (max(numbers) - min(numbers))) / 2
    low = max(0.0, min(numbers) - spare)
    return Normalize(low, max(max(numbers), low + scale.least_span))


def _common(row: Sequence[float | None], scale: Scale) -> str:
    """The text of most cells of a row, if half of them have the same: it is told once, and only the others have a
    number."""
    texts = Counter(scale.text(value) for value in row if value is not None)
    text, count = texts.most_common(1)[0] if texts else ("", 0)
    return text if count >= texts.total() / 2 and texts.total() > 1 else ""


def _number_rows(
    axes: Axes,
    table: Sequence[Sequence[float | None]],
    scale: Scale,
    common: Sequence[str],
    numbered: bool,
    size: float,
) -> None:
    """What all cells of a row say, or all without a number, at the end of the row."""
    for y, (row, text) in enumerate(zip(table, common, strict=True)):
        same = all(scale.text(value) == text for value in row if value is not None)
        if text and (same or numbered):
            place = len(row) + 0.2, y + 0.5
            axes.text(*place, f"{'all' if same else 'else'} {text}", va="center", **NOTE | {"fontsize": size})


def _label(axes: Axes, kinds: Sequence[str], columns: int, size: float) -> None:
    """Names of the rows and numbers of the blocks, as many as can be read."""
    step = 1 if columns <= NUMBERED_BLOCKS else 5 if columns <= 150 else 20
    numbered = range(0, columns, step)
    axes.set_xticks([i + 0.5 for i in numbered], labels=[str(i) for i in numbered])
    axes.set_xlabel("decoder block")
    every = max(1, math.ceil(5 / size))  # of hundreds of rows only some have a name
    axes.set_yticks(
        [i + 0.5 for i in range(0, len(kinds), every)], labels=list(kinds[::every]), fontsize=max(size, 5.0)
    )
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.tick_params(length=2 if columns > NUMBERED_BLOCKS else 0)


def _number(
    axes: Axes,
    mesh: QuadMesh,
    table: Sequence[Sequence[float | None]],
    scale: Scale,
    common: Sequence[str],
    size: float,
) -> None:
    """The number in each cell that does not say what most of its row do, in black or in white, whichever has the higher
    contrast with the cell's colour."""
    colours = mesh.to_rgba(_values(table))
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None and (text := scale.text(value)) != common[y]:
                red, green, blue = (_linear(float(channel)) for channel in colours[y, x, :3])
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179  # equal contrast at this value (WCAG 2)
                colour = "white" if dark else "black"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=colour)


def _linear(channel: float) -> float:
    """An sRGB channel in 0..1 as light."""
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)
