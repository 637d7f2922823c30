"""What the user asks for. A recipe's YAML keys are the command's options, with underscores; options win over the file.

recipes.py makes one of settings, defaults.py fills in what the method implies.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

QUANTIZERS = ("descent", "gptq", "rtn")
METHODS = ("descent", "coded", "budget", "auto", "gwq", "layerwise", "mixllm", "dbllm", "gptq", "rtn")
RANKINGS = ("gradient", "gradient-weight", "gradient-error", "magnitude", "random")
BLOCK_ORDERS = ("lim", "zd", "random", "reverse", "first", "last", "both-ends")
ROW_ORDERS = ("salience", "cost", "random", "reverse")
IMPORTANCE = {"layerwise": BLOCK_ORDERS, "mixllm": ROW_ORDERS, "budget": ("cost", "uniform")}

CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "quantizer": (*QUANTIZERS, "coded"),
    "outlier_ranking": RANKINGS,
    "outlier_scope": ("layer", "global"),
    "inputs": ("original", "sequential", "corrected"),
    "importance": tuple(dict.fromkeys(name for names in IMPORTANCE.values() for name in names)),
    "granularity": ("row", "linear", "group"),
    "levels": ("integer", "half", "by-width", "dual"),
    "labels": ("model", "text"),
    "lorc": ("input-weighted", "plain"),
    "pack": ("rans", "none"),
    "distill_loss": ("kd", "dad"),
}
NEEDS_MOMENTS = ("gptq", "descent", "coded")
NEEDS_GRADIENTS = ("gradient", "gradient-weight", "gradient-error")


@dataclass(frozen=True)
class TextSettings:
    """Which text to calibrate on, and how much of it. calibration: a file, a Hub data set, `self`, or None for the
    default; samples: how many rows; seq_len: tokens in each; seed: of their order."""

    calibration: str | None
    samples: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """How to compress a model.

    method: `auto` becomes `coded`, or `budget` where a setting is only that one's (defaults.py). bits: width of a
    code, 2 to 8; for `coded`, `budget` and `layerwise`, and for `mixllm` where it is fractional, the average over the
    linears with everything counted. size: bytes of the whole folder's weights. group_size: columns that
    share a scale, -1 for whole rows. levels: integer ones, or half-integer ones without a zero, or by width: half
    up to two bits, or dual-binary ones (`dbllm`). outliers: fraction of the weights that stay as they are (1 % for
    `gwq`). importance: what ranks blocks (`layerwise`) or rows (`mixllm`, `budget`). mix: width -> fraction of the
    rows, for `mixllm`; high_bits with high_fraction is the short form. granularity: what gets a width of its own in
    `budget`. widths, group_sizes, row_outliers: what it may give (shares of a row's weights that stay as they are,
    beside none); dual: whether dual-binary rows as well. labels: of the loss whose gradient is measured, sampled
    from the model or the text itself. portable: whether the result is in compressed-tensors, which others open, where
    open if its parts have a place there. pack: `rans` stores codes on grids entropy-coded.
    code_embeddings: whether embeddings and head are coded too. inputs: whose inputs a linear is fitted to: the original
    model's, those behind the compressed blocks before it, or the latter with the target corrected for the drift.
    lorc_rank: rank of the low-rank compensation of the rounding error, 0 for none; lorc: what it is weighted by.
    search: whether scales are searched. skip: patterns (`*.o_proj`) of linears that stay as they are.
    """

    method: str = "descent"
    bits: float | None = None
    size: int | None = None
    group_size: int = 128
    symmetric: bool | None = None
    levels: str | None = None
    quantizer: str | None = None
    outliers: float | None = None
    outlier_ranking: str = "gradient"
    outlier_scope: str = "layer"
    importance: str | None = None
    high_bits: int | None = None
    low_bits: int | None = None
    high_fraction: float | None = None
    mix: tuple[tuple[int, float], ...] | None = None
    granularity: str | None = None
    widths: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    row_outliers: tuple[float, ...] | None = None
    dual: bool | None = None
    portable: bool | None = None
    pack: str | None = None
    code_embeddings: bool | None = None
    labels: str | None = None
    lorc_rank: int | str = 0
    lorc: str = "input-weighted"
    distill_steps: int = 0
    distill_loss: str = "kd"
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    inputs: str | None = None
    search: bool | None = None
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    skip: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of every linear's compensation, before the allocator buys any."""
        return self.lorc_rank if isinstance(self.lorc_rank, int) else 0

    @property
    def buys_ranks(self) -> bool:
        return self.lorc_rank == "auto"

    @property
    def outlier_fraction(self) -> float:
        return self.outliers or 0.0

    @property
    def code_bits(self) -> int:
        """Width of the codes where there is but one, and of the low rows of `mixllm`."""
        if self.low_bits is not None:
            return self.low_bits
        return int(self.bits or 3)

    @property
    def average_bits(self) -> float | None:
        """The budget in bits per weight, everything counted; None where the budget is another, or the widths say."""
        if self.method in ("coded", "budget", "layerwise") or (self.method == "mixllm" and self.mix is None):
            return self.bits
        return None

    @property
    def bounded(self) -> bool:
        """Whether the smallest result within a bound on quality is wanted."""
        return self.max_ppl_increase is not None or self.max_kl is not None

    @property
    def needs_moments(self) -> bool:
        return self.quantizer in NEEDS_MOMENTS or (bool(self.lorc_rank) and self.lorc == "input-weighted")

    @property
    def needs_costs(self) -> bool:
        return self.importance == "cost" or self.packs_to_size

    @property
    def packs(self) -> bool:
        """Whether codes on grids are stored entropy-coded."""
        return self.pack == "rans"

    @property
    def packs_to_size(self) -> bool:
        """Whether a budget is for codes of two widths that are stored entropy-coded."""
        budget = self.size is not None or self.average_bits is not None
        return self.packs and self.method in ("layerwise", "mixllm") and budget

    @property
    def needs_steps(self) -> bool:
        return self.method == "coded"

    @property
    def needs_salience(self) -> bool:
        return self.method == "mixllm" and self.importance in ("salience", "reverse")

    @property
    def needs_outlier_gradients(self) -> bool:
        return self.outlier_fraction > 0 and self.outlier_ranking in NEEDS_GRADIENTS

    @property
    def needs_gradients(self) -> bool:
        return self.needs_outlier_gradients or self.needs_costs or self.needs_steps or self.needs_salience

    @property
    def needs_lim(self) -> bool:
        return self.method == "layerwise" and self.importance in ("lim", "reverse")

    @property
    def needs_text(self) -> bool:
        return self.needs_moments or self.needs_gradients or self.needs_lim

    @property
    def text(self) -> TextSettings:
        """The settings of the calibration text."""
        return TextSettings(self.calibration, self.samples, self.seq_len, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """YAML keys and values; what `make_recipe` makes the same recipe of."""
        values = dataclasses.asdict(self)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return plain | {"mix": dict(self.mix) if self.mix else None}
