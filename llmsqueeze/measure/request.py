"""What to measure of a model, and how."""

from __future__ import annotations

from dataclasses import dataclass

from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Ranking
from llmsqueeze.parts import Grid


@dataclass(frozen=True)
class Request:
    """What to measure of a model, and how.

    options: to be priced with `quantizer`, scales searched or not (`search`); with them `gains` of a low-rank
    compensation and `rates` of entropy-coded codes; trace: by the average trace of the Hessian (costs.py). coded: bytes
    and loss of coded weights, with `ends` of embeddings and head too. salience: the grids whose rounding errors rank
    rows. outliers: the ranking of single weights. groups: the fusion groups, which a backward sweep gives anyway.
    labels: of the loss whose gradient is measured: `text`, or `model`, drawn by `seed`.
    """

    options: tuple[Option, ...] = ()
    gains: bool = False
    rates: bool = False
    trace: bool = False
    coded: bool = False
    ends: bool = False
    salience: tuple[Grid, ...] = ()
    outliers: Ranking | None = None
    lim: bool = False
    zd: bool = False
    groups: bool = False
    quantizer: str = "rtn"
    search: bool = False
    labels: str = "text"
    seed: int = 0

    @property
    def salience_widths(self) -> tuple[int, ...]:
        return tuple(grid.bits for grid in self.salience)

    @property
    def prices(self) -> bool:
        """Whether input moments and output gradients are needed."""
        return bool(self.options) or self.coded

    @property
    def weight_gradients(self) -> bool:
        """Whether gradients of whole weights are needed."""
        return bool(self.salience) or (self.outliers is not None and self.outliers.needs_gradients)

    @property
    def gradients(self) -> bool:
        """Whether there is a backward sweep."""
        return self.prices or self.weight_gradients

    @property
    def needs_text(self) -> bool:
        """Whether the samples run through the model."""
        return self.gradients or self.lim
