"""The bars of a report: the bytes of the original and of the result, compressed linears apart from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsqueeze.publish import numbers
from llmsqueeze.publish.plots.figure import BLUE, GREY, finish, key, only_ticks_within, plain_axes, round_size, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bar:
    """All bytes of a model, and those of the tensors that the compression leaves as they are; None if not known."""

    name: str
    nbytes: float
    kept: float | None

    @property
    def text(self) -> str:
        """'This model: 428 kB, of which 341 kB compressed linears and 87.0 kB unchanged'."""
        total = f"{self.name}: {numbers.size(self.nbytes)}"
        if self.kept is None:
            return total
        linears = numbers.size(max(self.nbytes - self.kept, 0))
        return f"{total}, of which {linears} compressed linears and {numbers.size(self.kept)} unchanged"


def size_bars(bars: Sequence[Bar]) -> Figure:
    """A bar for each model, the first on top, from zero."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    with style():
        figure = Figure(figsize=(7.5, 1.1 + 0.5 * len(bars)), layout="constrained")
        axes = plain_axes(figure, "", "")
        axes.grid(visible=False, axis="y")
        for row, bar in enumerate(bars):
            linears = bar.nbytes - (bar.kept or 0)
            axes.barh(row, linears, height=0.6, color=BLUE)
            axes.barh(row, bar.kept or 0, left=linears, height=0.6, color=GREY)
        axes.set_yticks(range(len(bars)), labels=[f"{bar.name}\n{numbers.size(bar.nbytes)}" for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda nbytes, _: round_size(nbytes))
        if any(bar.kept is not None for bar in bars):
            names = ["compressed linears", "all other tensors"]
            key(figure, [Patch(color=BLUE), Patch(color=GREY)], names)
        finish(figure, "")
        only_ticks_within(axes)
    return figure


def sizes_text(bars: Sequence[Bar]) -> str:
    """The bars in a sentence, for readers who do not see them."""
    return f"{'; '.join(bar.text for bar in bars)}."
