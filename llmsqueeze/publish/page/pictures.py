"""Plots as pictures in an HTML page, each with its content in a sentence. None if there is nothing to draw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsqueeze.publish.plots.figure import available, data_uri
from llmsqueeze.publish.plots.frontier import frontier, frontier_text, original_nbytes, points_of
from llmsqueeze.publish.plots.heat_map import Scale, heat_map, heat_map_text

MOST_BLOCKS = 1000  # no model has more; a file can claim any number
NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")  # the name of a linear with the number of its block


@dataclass(frozen=True)
class Picture:
    """The source of an image, None without matplotlib, and its alternative text."""

    source: str | None
    text: str


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


def frontier_picture(models: Sequence[Mapping[str, Any]]) -> Picture | None:
    """The plot of quality against size for the models of a comparison, the original first."""
    points = points_of(models)
    if not points:
        return None
    figure = frontier(points, original_nbytes(models), "") if available() else None
    return Picture(data_uri(figure) if figure else None, frontier_text(points))
