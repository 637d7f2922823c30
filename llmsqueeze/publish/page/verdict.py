"""The outcome of a comparison in words: which model loses least at its size, and which are on the frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmsqueeze.publish import numbers
from llmsqueeze.publish.numbers import fixed, with_error
from llmsqueeze.publish.plots.points import Point, about_equal, points_of

CLEAR = 2.0  # standard errors of a difference that is more than chance


def verdict(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about the models of a comparison, the original first; none if no text was scored."""
    points = points_of(models)
    groups = about_equal(points)
    sentences = [_best_of(group) for group in groups if len(group) > 1]
    if len(groups) > 1:
        sentences.append(f"Least loss of all: {_outcome(min(points, key=lambda point: point.loss))}.")
    best = sorted((point for point in points if point.on_frontier), key=lambda point: point.nbytes)
    if best:
        sentences.append(f"On the frontier, the smallest first: {'; '.join(map(_outcome, best))}.")
    return sentences


def _best_of(group: Sequence[Point]) -> str:
    """Which of some models of about the same size loses least, and whether that may be chance.

    The errors are those of the differences from the original, counted as independent: two models that err in the same
    places differ more clearly than that says.
    """
    first, second, *_ = sorted(group, key=lambda point: point.loss)
    size = " to ".join(dict.fromkeys(numbers.size(one.nbytes) for one in (group[0], group[-1])))
    chance = second.loss - first.loss < CLEAR * math.hypot(first.error, second.error)
    return (
        f"Least loss of {len(group)} models at {size}: {first.name}, {_loss(first)}; next {second.name}, "
        f"{_loss(second)}{', which may be chance' if chance else ''}."
    )


def _outcome(point: Point) -> str:
    return f"{point.name} ({numbers.size(point.nbytes)}, loss {_loss(point)})"


def _loss(point: Point) -> str:
    return with_error(fixed(point.loss, 4, sign=True), point.error or None)
