"""Where the labels of points go: beside their points, so that they cover no point, no line and no other label.

All lengths are in points, y upwards. A label that finds no free place near its point is farther away, at the end of a
thin line; one that finds none at all is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Place = tuple[float, float]  # x, y
Box = tuple[float, float, float, float]  # left, bottom, right, top
Segment = tuple[Place, Place]

DISTANCES = (8.0, 12.0, 18.0, 26.0, 36.0, 48.0, 62.0)  # of a label's centre from its point
NEAR = 12.0  # a label this near needs no line
DIRECTIONS = tuple(math.radians(degrees) for degrees in (0, 180, 90, 270, *range(30, 360, 30), *range(15, 360, 30)))


@dataclass(frozen=True)
class Label:
    """The centre of a label, and the line that leads to it from its point, if it is far away."""

    centre: Place
    line: Segment | None


def place_labels(
    points: Sequence[Place], sizes: Sequence[Place], taken: Sequence[Box], lines: Sequence[Segment], inside: Box
) -> list[Label | None]:
    """A label for each point, in this order; None if there is no free place. sizes: width and height of each label.
    taken, lines: what labels must not cover, such as the points; inside: where they must be."""
    boxes, segments = list(taken), list(lines)
    labels: list[Label | None] = []
    for point, size in zip(points, sizes, strict=True):
        free = (label for label in candidates(point, size) if _is_free(label, size, boxes, segments, inside))
        label = next(free, None)
        labels.append(label)
        if label is not None:
            boxes.append(around(label.centre, size))
            segments += [label.line] if label.line else []
    return labels


def candidates(point: Place, size: Place) -> Iterator[Label]:
    """The places for a label, the best first: near the point, and right or left of it."""
    for distance in DISTANCES:
        for direction in DIRECTIONS:
            along = math.cos(direction), math.sin(direction)
            # beside the point a wide label is as near as a narrow one
            centre = point[0] + along[0] * (distance + size[0] / 2 - size[1] / 2), point[1] + along[1] * distance
            start = point[0] + 6.5 * along[0], point[1] + 6.5 * along[1]  # outside the mark
            yield Label(centre, None if distance <= NEAR else (start, _edge(centre, size, point)))


def around(centre: Place, size: Place) -> Box:
    """The box of this width and height around a centre."""
    (x, y), (wide, tall) = centre, size
    return x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def crosses(segment: Segment, box: Box) -> bool:
    """Whether a part of the segment is inside the box (the algorithm of Liang and Barsky)."""
    (x, y), (to_x, to_y) = segment
    first, last = 0.0, 1.0  # the part of the segment that is inside
    for start, change, low, high in ((x, to_x - x, box[0], box[2]), (y, to_y - y, box[1], box[3])):
        if change == 0:
            if not low < start < high:
                return False
            continue
        enter, leave = sorted(((low - start) / change, (high - start) / change))
        first, last = max(first, enter), min(last, leave)
    return first < last


def cross(one: Segment, other: Segment) -> bool:
    """Whether two segments cross; touching is no crossing."""

    def side(segment: Segment, place: Place) -> float:
        (x, y), (to_x, to_y) = segment
        return (to_x - x) * (place[1] - y) - (to_y - y) * (place[0] - x)

    return side(one, other[0]) * side(one, other[1]) < 0 and side(other, one[0]) * side(other, one[1]) < 0


def _edge(centre: Place, size: Place, point: Place) -> Place:
    """Where the line from the point to the centre meets the label."""
    x, y = point[0] - centre[0], point[1] - centre[1]
    reach = min(size[0] / 2 / abs(x) if x else math.inf, size[1] / 2 / abs(y) if y else math.inf)
    return centre[0] + x * reach, centre[1] + y * reach


def _is_free(label: Label, size: Place, boxes: Sequence[Box], segments: Sequence[Segment], inside: Box) -> bool:
    box = around(label.centre, size)
    if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
        return False
    if any(overlap(box, other) for other in boxes) or any(crosses(segment, box) for segment in segments):
        return False
    line = label.line
    return line is None or not (
        any(crosses(line, other) for other in boxes) or any(cross(line, segment) for segment in segments)
    )
