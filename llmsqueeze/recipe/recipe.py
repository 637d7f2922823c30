"""A recipe: how to compress, with every setting decided. `resolve.py` makes it of what was asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmsqueeze.recipe.methods import METHODS, Method, methods_of

TEXT = ("calibration", "text_field", "samples", "seq_len", "pack_documents", "products")
NEEDS_GRADIENTS = ("gradient", "gradient-weight", "gradient-error")  # rankings of outliers


@dataclass(frozen=True)
class TextSettings:
    """Which text to calibrate on, and how much of it. calibration: a file, a Hub data set, `self`, or None for the
    default; samples: how many rows; seq_len: tokens in each; seed: of their order; text_field: the field of a data
    set's rows that has the text, None to find it; pack_documents: rows go on from document to document, else a row is
    the beginning of one."""

    calibration: str | None
    samples: int
    seq_len: int
    seed: int
    text_field: str | None = None
    pack_documents: bool = True


@dataclass(frozen=True)
class Recipe:
    """How to compress a model; the fields are the options of `options.Asked`.

    bits: an int is the width of the codes, a float the average over the compressed weights; None if the budget is a
    size, a bound or a share of rows. A method without grids has the neutral values of the grid's options. group_size:
    open if nobody asked for one (`group_size_open`): then it bends to the model (`fitted`). low_bits and high_bits:
    0 if the method has one width; the low one is open likewise (`low_bits_open`), to a budget. embeddings: width of
    rounded embeddings and head, 0 if they are not. Empty tuples and strings stand for options that the method does
    not use.
    """

    method: str
    quantizer: str
    bits: int | float | None
    size: int | None
    max_ppl_increase: float | None
    max_kl: float | None
    group_size: int
    symmetric: bool
    levels: str
    search: bool
    inputs: str
    outliers: float
    outlier_ranking: str
    outlier_scope: str
    importance: str
    high_bits: int
    low_bits: int
    mix: tuple[tuple[int, float], ...]
    granularity: str
    widths: tuple[int, ...]
    group_sizes: tuple[int, ...]
    row_outliers: tuple[float, ...]
    dual: bool
    portable: bool | None
    pack: str
    code_embeddings: bool
    embeddings: int
    all_experts: bool
    vision: str
    labels: str
    lorc_rank: int | str
    lorc: str
    distill_steps: int
    distill_loss: str
    calibration: str | None
    text_field: str | None
    samples: int
    seq_len: int
    pack_documents: bool
    seed: int
    products: str
    skip: tuple[str, ...]
    group_size_open: bool = dataclasses.field(default=False, compare=False)
    low_bits_open: bool = dataclasses.field(default=False, compare=False)

    @property
    def entry(self) -> Method:
        return METHODS[self.method]

    @property
    def decides(self) -> str:
        """What the method decides: blocks, rows, options or steps; "" if every linear gets the same grid."""
        return self.entry.decides

    @property
    def rank(self) -> int:
        """The rank of every linear's compensation, before the budget buys any."""
        return self.lorc_rank if isinstance(self.lorc_rank, int) else 0

    @property
    def buys_ranks(self) -> bool:
        return self.lorc_rank == "auto"

    @property
    def code_bits(self) -> int:
        """Width of the codes if there is but one, and of the low rows or blocks."""
        return self.low_bits or int(self.bits or 3)

    @property
    def average_bits(self) -> float | None:
        """The budget as an average over the compressed weights, everything counted; None if it is another."""
        return self.bits if isinstance(self.bits, float) else None

    @property
    def budget_width(self) -> int | None:
        """The budget as the bytes of codes of this width; None if it is another."""
        return self.bits if self.entry.budget and isinstance(self.bits, int) else None

    @property
    def bends(self) -> str:
        """The option that the budget decides, of a method that spends none on widths; "" if there is none."""
        if not self.entry.bends or (self.size is None and self.average_bits is None):
            return ""
        return "lorc_rank" if self.buys_ranks else self.entry.bends

    @property
    def has_budget(self) -> bool:
        """Whether the bytes of the result are given, not its widths."""
        return self.size is not None or self.average_bits is not None or self.budget_width is not None

    @property
    def bounded(self) -> bool:
        """Whether the smallest result within a bound on quality is searched."""
        return self.max_ppl_increase is not None or self.max_kl is not None

    @property
    def measures(self) -> frozenset[str]:
        """What the method needs to know of the model: costs, steps, salience, lim, zd."""
        measured = {*self.entry.measures, self.entry.importance.get(self.importance, "")}
        return frozenset(measured | ({"costs"} if self.packs_to_size else set())) - {""}

    @property
    def needs_moments(self) -> bool:
        rounding = METHODS[self.quantizer].moments
        return rounding or (bool(self.lorc_rank) and self.lorc == "input-weighted")

    @property
    def needs_costs(self) -> bool:
        return "costs" in self.measures

    @property
    def needs_steps(self) -> bool:
        return "steps" in self.measures

    @property
    def needs_salience(self) -> bool:
        return "salience" in self.measures

    @property
    def needs_lim(self) -> bool:
        return "lim" in self.measures

    @property
    def needs_zd(self) -> bool:
        return "zd" in self.measures

    @property
    def needs_outlier_gradients(self) -> bool:
        return self.outliers > 0 and self.outlier_ranking in NEEDS_GRADIENTS

    @property
    def needs_gradients(self) -> bool:
        return self.needs_outlier_gradients or self.needs_costs or self.needs_steps or self.needs_salience

    @property
    def needs_text(self) -> bool:
        return self.needs_moments or self.needs_gradients or self.needs_lim

    @property
    def packs(self) -> bool:
        """Whether codes on grids are stored entropy-coded."""
        return self.pack == "rans"

    @property
    def packs_to_size(self) -> bool:
        """Whether a budget is for codes of two widths that are stored entropy-coded."""
        return self.packs and bool(self.high_bits) and self.has_budget

    @property
    def rounds_towers(self) -> bool:
        """Whether the linears of other towers and projectors are rounded."""
        return self.vision == "rtn8"

    @property
    def text(self) -> TextSettings:
        """The settings of the calibration text."""
        drawn = self.samples, self.seq_len, self.seed
        return TextSettings(self.calibration, *drawn, self.text_field, self.pack_documents)

    def unused(self) -> dict[str, str]:
        """Options that say nothing of this recipe, and what each would need."""
        no_text = f"does not apply to --method {self.method}, which reads no text here"
        no_gradient = f"does not apply to --method {self.method}, which measures no gradient here"
        needs: dict[str, tuple[object, str]] = {
            "outlier_ranking": (self.outliers, "needs --outliers above 0"),
            "outlier_scope": (self.outliers, "needs --outliers above 0"),
            "lorc": (self.lorc_rank, "needs --lorc-rank above 0"),
            "distill_loss": (self.distill_steps, "needs --distill-steps above 0"),
            "labels": (self.needs_gradients, no_gradient),
            "inputs": (self.needs_moments, f"does not apply to --quantizer {self.quantizer}, which sees no inputs"),
        }
        needs["all_experts"] = needs["inputs"]
        needs |= dict.fromkeys(TEXT, (self.needs_text or self.distill_steps, no_text))
        if self.calibration in (None, "self", "demo"):
            needs["text_field"] = (False, "needs --calibration with a file, a folder or a data set")
        if self.calibration == "self":
            needs["pack_documents"] = (False, "does not apply to --calibration self, which has no documents")
        return {name: why for name, (used, why) in needs.items() if not used}

    def as_dict(self) -> dict[str, Any]:
        """YAML keys and values of the settings that apply; `make_recipe` makes the same recipe of it."""
        left_out = {"group_size_open", "low_bits_open", *self.unused(), *({"high_bits"} if self.mix else ())}
        left_out |= {"group_size"} if self.group_sizes else set()
        values = {name: value for name, value in vars(self).items() if name not in left_out and self._has(name)}
        kept = {name: value for name, value in values.items() if value not in (None, "", ())}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
        return plain | ({"mix": dict(self.mix)} if self.mix else {})

    def _has(self, option: str) -> bool:
        """Whether the option belongs to the method, and is not a flag at its default."""
        off = option in ("dual", "code_embeddings", "all_experts") and not getattr(self, option)
        off = off or (option == "embeddings" and not self.embeddings)
        off = off or (option == "vision" and not self.rounds_towers)
        off = off or (option == "pack_documents" and self.pack_documents)
        return not off and (option in self.entry.allows or not methods_of(option))
