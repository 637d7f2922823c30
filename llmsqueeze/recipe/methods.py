"""The methods: one entry each, with everything that the other rooms must know of it.

A new rounding method is one file, `llmsqueeze/quantizers/<name>.py` with a function of that name, and one entry here. A
new allocation is one file, `llmsqueeze/allocation/<name>.py`, and one entry here. The command line, the checks of
recipes, the prices, the pages and the tables of the documentation follow from the entry.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# options of every method that puts codes on a grid
ON_GRIDS = ("group_size", "symmetric", "levels", "search", "pack")
OUTLIERS = ("outliers", "outlier_ranking", "outlier_scope")
BOUNDS = ("max_ppl_increase", "max_kl")
BUDGETS = ("bits", "size", *BOUNDS)  # a recipe names one of them
DECIDED = {
    "blocks": "how many blocks have the high width",
    "rows": "how many rows have the high width",
    "options": "the width of each row",
    "steps": "the steps",
    "group_size": "the width of the codes, and the group size",
    "outliers": "the width of the codes, and the share of outliers",
}


@dataclass(frozen=True)
class Method:
    """One method.

    help: its sentence for `--help` and the documentation. report: the same as a clause of a report. source: the paper,
    or ours. rounds: whether it is a rounding method, usable as `--quantizer`. decides: what `allocation/<name>.py`
    decides: the widths of "blocks", the widths of "rows" by a ranking, the "options" of rows by their costs, or the
    "steps" of coded weights; "" if every linear gets the same grid. allows: the options that belong to it, beside those
    of every method. implies: its defaults. importance: choices of `--importance`, the default first, with the
    measurement that each needs ("" for none). measures: further measurements that it needs. budget: whether it spends a
    budget on widths; then a whole `--bits` is the size of codes of that width. native: why compressed-tensors cannot
    represent its results; "" if it can.

    Of a rounding method: moments: whether it needs the second moments of the inputs. priced_by: the rounding method
    whose errors are computed for all rows; if it is another one, they are scaled by the ratio of the two on some rows.
    """

    name: str
    help: str
    report: str
    source: str
    rounds: bool = False
    decides: str = ""
    allows: tuple[str, ...] = ()
    implies: Mapping[str, Any] = field(default_factory=dict)
    importance: Mapping[str, str] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    budget: bool = False
    native: str = ""
    moments: bool = False
    priced_by: str = ""

    @property
    def bends(self) -> str:
        """The option that a budget decides, of methods that spend none on widths (compress/decision/bend.py)."""
        if self.decides or not self.on_grids:
            return ""
        return "outliers" if "outliers" in self.implies else "group_size"

    @property
    def decided(self) -> str:
        """What a budget decides, in words."""
        return DECIDED.get(self.bends or self.decides, "")

    @property
    def on_grids(self) -> bool:
        """Whether its codes lie on grids."""
        return "group_size" in self.allows


ENTRIES = (
    Method(
        "descent",
        help="coordinate descent over codes and scales under the second moments of the inputs; starts from GPTQ",
        report="coordinate descent over codes and scales under the second moments of the inputs, from GPTQ's start",
        source="ours",
        rounds=True,
        allows=ON_GRIDS,
        implies={"inputs": "corrected", "search": True},
        moments=True,
        priced_by="gptq",
    ),
    Method(
        "coded",
        help="entropy-coded integers; one multiplier for the whole model gives each weight its step",
        report="entropy-coded integers whose steps come from one multiplier for the whole model",
        source="ours, after arXiv 2603.04956",
        decides="steps",
        allows=(*BOUNDS, *OUTLIERS, "labels", "code_embeddings"),
        implies={"quantizer": "coded", "inputs": "corrected", "labels": "model"},
        measures=("steps",),
        budget=True,
        moments=True,
        native="no other runtime decodes its streams",
    ),
    Method(
        "budget",
        help="one budget for the whole model: each row gets the width that lowers the predicted loss most per byte",
        report="one budget for the whole model: each row gets the width that lowers the loss most for its bytes",
        source="ours",
        decides="options",
        allows=(
            *(*ON_GRIDS, *OUTLIERS, *BOUNDS, "quantizer", "labels", "importance", "granularity", "widths"),
            *("group_sizes", "row_outliers", "dual"),
        ),
        implies={"labels": "model", "levels": "by-width"},
        importance={"cost": "costs", "trace": "costs", "uniform": ""},
        budget=True,
    ),
    Method(
        "auto",
        help="coded, or budget if an option needs grids",
        report="coded weights, or a budget on grids, by the options",
        source="ours",
    ),
    Method(
        "gwq",
        help="the weights with the largest loss gradients stay at 16 bits; the others are rounded",
        report="the weights with the largest loss gradients stay as they are, the others are rounded",
        source="arXiv 2411.00850",
        allows=(*ON_GRIDS, *OUTLIERS, "quantizer", "labels"),
        implies={"outliers": 0.01},
        native="no other runtime opens outliers",
    ),
    Method(
        "layerwise",
        help="important decoder blocks get the high width, the others the low width; the rest buys groups",
        report="important decoder blocks get more bits, the others fewer",
        source="arXiv 2406.17415",
        decides="blocks",
        allows=(*(*ON_GRIDS, *OUTLIERS, *BOUNDS, "quantizer", "labels", "importance", "high_bits", "low_bits"),),
        implies={"bits": 3},
        importance={
            "lim": "lim",
            "zd": "zd",
            "cost": "costs",
            "random": "",
            "reverse": "lim",
            "first": "",
            "last": "",
            "both-ends": "",
        },
        budget=True,
    ),
    Method(
        "mixllm",
        help="the most salient output rows of the whole model get the high width, the others the low width",
        report="the most salient output rows of the whole model get more bits",
        source="arXiv 2412.14590",
        decides="rows",
        allows=(
            *(*ON_GRIDS, *OUTLIERS, "quantizer", "labels", "importance", "high_bits", "low_bits"),
            *("high_fraction", "mix"),
        ),
        native="runtimes need one width per fusion group",
        implies={"symmetric": False},
        importance={"salience": "salience", "cost": "costs", "random": "", "reverse": "salience"},
    ),
    Method(
        "dbllm",
        help="dual binarization: two planes of bits and two scales for each group of 64 columns",
        report="dual binarization: two planes of bits and two scales for each group of columns",
        source="arXiv 2402.11960",
        allows=(*ON_GRIDS, *OUTLIERS, "quantizer", "labels"),
        implies={"bits": 2, "levels": "dual", "group_size": 64},
        native="no other runtime opens two planes",
    ),
    Method(
        "gptq",
        help="error feedback column by column, as published",
        report="error feedback column by column, as published",
        source="arXiv 2210.17323",
        rounds=True,
        allows=ON_GRIDS,
        implies={"inputs": "sequential"},
        moments=True,
        priced_by="gptq",
    ),
    Method(
        "rtn",
        help="round to nearest; reads no text",
        report="round to nearest",
        source="the baseline",
        rounds=True,
        allows=ON_GRIDS,
        implies={"inputs": "original"},
        priced_by="rtn",
    ),
)
METHODS = {entry.name: entry for entry in ENTRIES}
DEFAULT, DEFAULT_ROUNDING = "descent", "descent"
# what every option is if neither the user nor the method says
DEFAULTS: Mapping[str, Any] = {
    "bits": 3,
    "group_size": 128,
    "symmetric": True,
    "levels": "integer",
    "quantizer": DEFAULT_ROUNDING,
    "outliers": 0.0,
    "outlier_ranking": "gradient",
    "outlier_scope": "layer",
    "labels": "text",
    "lorc_rank": 0,
    "lorc": "input-weighted",
    "pack": "none",
    "distill_steps": 0,
    "distill_loss": "kd",
    "search": False,
    "samples": 128,
    "seq_len": 2048,
    "seed": 0,
    "products": "auto",
    "skip": (),
}


def in_room(package: str, name: str, fault: str) -> Any:
    """The function NAME in the file NAME.py of a room. Raises ValueError, `fault` first, if there is none."""
    path = f"{package}.{name}"
    module = importlib.import_module(path) if importlib.util.find_spec(path) else None
    if not hasattr(module, name):
        room = package.rpartition(".")[2]
        raise ValueError(f"{fault}: {room}/{name}.py with a function {name} is needed")
    return getattr(module, name)


def method_names() -> tuple[str, ...]:
    """The names that `--method` takes."""
    return tuple(METHODS)


def rounding_methods() -> tuple[str, ...]:
    """The names that `--quantizer` takes."""
    return tuple(name for name, entry in METHODS.items() if entry.rounds)


def methods_of(option: str) -> tuple[str, ...]:
    """The methods that an option belongs to; () if every method takes it."""
    return tuple(name for name, entry in METHODS.items() if option in entry.allows)


def importances() -> tuple[str, ...]:
    """Every choice of `--importance`."""
    return tuple(dict.fromkeys(name for entry in METHODS.values() for name in entry.importance))
