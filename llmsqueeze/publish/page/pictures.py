"""Plots as pictures in an HTML page, each with its content in a sentence. None if there is nothing to draw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsqueeze.publish.plots.draw import quality
from llmsqueeze.publish.plots.figure import available, data_uri
from llmsqueeze.publish.plots.heat_map import Scale, heat_map, heat_map_text
from llmsqueeze.publish.plots.points import about_equal, in_words, original_nbytes, points_of
from llmsqueeze.publish.plots.sizes import Bar, size_bars, sizes_text

MOST_BLOCKS = 1000  # no model has more; a file can claim any number
ONE_SIZE = (
    "All models have about the same size; they stand in the order of their loss, the best on top. Blue ones are on the "
    "frontier: no other model here is both smaller and better."
)
SEVERAL_SIZES = (
    "Up is worse, left is smaller. The line is the frontier: no other model here is both smaller and better than a "
    "model on it."
)
NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")  # the name of a linear with the number of its block


@dataclass(frozen=True)
class Picture:
    """The source of an image, None without matplotlib, its alternative text, and how to read it."""

    source: str | None
    text: str
    reading: str = ""


def blocks_of(names: Sequence[str], count: int) -> list[list[str]]:
    """The linears of each decoder block, by the first number in their names. `count`: the least number of blocks."""
    numbered = [(int(match[2]), name) for name in names if (match := NUMBERED.match(name))]
    total = max([count, *(1 + block for block, _ in numbered)])
    if not numbered or total > MOST_BLOCKS:
        return []
    blocks: list[list[str]] = [[] for _ in range(total)]
    for block, name in numbered:
        blocks[block].append(name)
    return blocks


def heat_map_picture(values: Mapping[str, float], blocks: Sequence[Sequence[str]], scale: Scale) -> Picture | None:
    """A heat map of the linears in blocks."""
    if not any(name in values for block in blocks for name in block):
        return None
    source = data_uri(heat_map(values, blocks, scale=scale)) if available() else None
    return Picture(source, heat_map_text(values, blocks, scale))


def quality_picture(models: Sequence[Mapping[str, Any]]) -> Picture | None:
    """The plot of quality and size for the models of a comparison, the original first."""
    points = points_of(models)
    if not points:
        return None
    figure = quality(points, original_nbytes(models), "") if available() else None
    reading = ONE_SIZE if len(about_equal(points)) == 1 else SEVERAL_SIZES
    return Picture(data_uri(figure) if figure else None, in_words(points), reading)


def sizes_picture(bars: Sequence[Bar]) -> Picture:
    """The bars of the sizes of original and result."""
    return Picture(data_uri(size_bars(bars)) if available() else None, sizes_text(bars))
