"""The models of a comparison as points: their sizes and their losses, for the plots and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsqueeze.publish import numbers
from llmsqueeze.publish.numbers import finite, significant
from llmsqueeze.publish.scores import full_name

ALIKE = 1.02  # sizes within this factor are about equal


@dataclass(frozen=True)
class Point:
    """A compressed model: its place in the comparison (the original is 1), its name, its bytes, its loss above the
    original's in nats per token, the standard error of that."""

    place: int
    name: str
    nbytes: float
    loss: float
    error: float
    on_frontier: bool
    this: bool

    @property
    def title(self) -> str:
        """'3  gptq, 3 bits: demo-3bit'."""
        return f"{self.place}  {self.name}{' (this folder)' if self.this else ''}"


def points_of(models: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The models of a comparison, without the original and without those whose size or loss is unknown."""
    points = []
    for place, model in enumerate(models[1:], 2):
        nbytes, loss = finite(model.get("nbytes")), finite(model.get("nll_difference"))
        if nbytes is not None and nbytes > 0 and loss is not None:
            error = finite(model.get("nll_difference_stderr")) or 0.0
            best, this = model.get("on_frontier") is True, model.get("this") is True
            points.append(Point(place, full_name(model), nbytes, loss, error, best, this))
    return points


def original_nbytes(models: Sequence[Mapping[str, Any]]) -> float | None:
    """The bytes of the original, the first model of a comparison."""
    nbytes = finite(models[0].get("nbytes"))
    return nbytes if nbytes and nbytes > 0 else None


def about_equal(points: Sequence[Point]) -> list[list[Point]]:
    """The models by size: each group within `ALIKE` of its smallest, the smallest first."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.nbytes):
        if groups and point.nbytes <= ALIKE * groups[-1][0].nbytes:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def in_words(points: Sequence[Point]) -> str:
    """The plot in a sentence, for readers who do not see it."""
    return "; ".join(map(_summary, points)) + "."


def _summary(point: Point) -> str:
    sign = "+" if point.loss > 0 else ""
    error = f" ± {significant(point.error, 2)}" if point.error else ""
    best = ", on the frontier" if point.on_frontier else ""
    loss = f"loss {sign}{significant(point.loss)}{error} nats per token"
    return f"{point.name}: {numbers.size(point.nbytes)}, {loss}{best}"
