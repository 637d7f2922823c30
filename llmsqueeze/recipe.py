"""What the user asks for. A recipe's YAML keys are the command's options, with underscores; options win over the file.

Everything is checked here, before any file of the model is read: unknown keys and choices name the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsqueeze.errors import RecipeError, nearest

METHODS = ("descent", "gwq", "gptq", "rtn")
QUANTIZERS = ("descent", "gptq", "rtn")
RANKINGS = ("gradient", "gradient-weight", "gradient-error", "magnitude", "random")
SCOPES = ("layer", "global")
INPUTS = ("original", "sequential", "corrected")

CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "quantizer": QUANTIZERS,
    "outlier_ranking": RANKINGS,
    "outlier_scope": SCOPES,
    "inputs": INPUTS,
}
NEEDS_MOMENTS = ("gptq", "descent")
NEEDS_GRADIENTS = ("gradient", "gradient-weight", "gradient-error")


@dataclass(frozen=True)
class Recipe:
    """How to compress a model.

    bits: width of a code, 2 to 8. group_size: columns that share a scale, -1 for whole rows. outliers: fraction of
    the weights that `gwq` keeps as they are (1 %). inputs: whose inputs a linear is fitted to: the original model's,
    those behind the compressed blocks before it, or the latter with the target corrected for the drift. search:
    whether scales are searched. skip: patterns (`*.o_proj`) of linears that stay as they are.
    """

    method: str = "descent"
    bits: int = 3
    group_size: int = 128
    symmetric: bool = True
    quantizer: str | None = None
    outliers: float | None = None
    outlier_ranking: str = "gradient"
    outlier_scope: str = "layer"
    inputs: str | None = None
    search: bool | None = None
    calibration: str | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    skip: tuple[str, ...] = ()

    def resolved(self) -> Recipe:
        """The same recipe with everything that the method implies filled in; two equal ones do the same."""
        quantizer = self.quantizer or (self.method if self.method != "gwq" else "descent")
        if self.method != "gwq" and quantizer != self.method:
            raise RecipeError(
                f"quantizer {quantizer!r} goes with method gwq; method {self.method} is its own quantizer"
            )
        if self.method != "gwq" and self.outliers:
            raise RecipeError(f"outliers go with method gwq, not with {self.method}")
        inputs = {"rtn": "original", "gptq": "sequential", "descent": "corrected"}[quantizer]
        return dataclasses.replace(
            self,
            quantizer=quantizer,
            inputs=self.inputs or inputs,
            search=quantizer == "descent" if self.search is None else self.search,
            outliers=(0.01 if self.outliers is None else self.outliers) if self.method == "gwq" else 0.0,
        )

    @property
    def outlier_fraction(self) -> float:
        return self.outliers or 0.0

    @property
    def needs_moments(self) -> bool:
        return self.quantizer in NEEDS_MOMENTS

    @property
    def needs_gradients(self) -> bool:
        return self.outlier_fraction > 0 and self.outlier_ranking in NEEDS_GRADIENTS

    @property
    def needs_text(self) -> bool:
        return self.needs_moments or self.needs_gradients

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "skip": list(self.skip)}


KEYS = {field.name: field for field in dataclasses.fields(Recipe)}


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A checked, resolved recipe from YAML keys or options; None stands for the default. Raises RecipeError."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in KEYS:
            raise RecipeError(f"unknown recipe key {key!r}{nearest(key, KEYS)} Known keys: {', '.join(KEYS)}")
        if value is not None:
            values[key] = _checked(key, value)
    return Recipe(**values).resolved()


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises RecipeError if it is missing or no mapping of keys to values."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe file {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RecipeError(f"{path} is no recipe: it must map keys to values, such as `bits: 3`")
    return settings


def _checked(key: str, value: Any) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            hint = nearest(str(value), CHOICES[key])
            raise RecipeError(f"unknown {_spoken(key)} {value!r}{hint or ';'} choose from {', '.join(CHOICES[key])}")
        return value
    return _CHECKS[key](key, value)


def _spoken(key: str) -> str:
    return key.replace("_", " ")


def _whole(low: int, high: int | None = None) -> Any:
    def check(key: str, value: Any) -> int:
        allowed = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecipeError(f"{_spoken(key)} must be {allowed}, not {value!r}")
        if value < low or (high is not None and value > high):
            raise RecipeError(f"{_spoken(key)} is {value}; it must be {allowed}")
        return value

    return check


def _group_size(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise RecipeError(f"group size is {value!r}; it must be a positive number of columns, or -1 for whole rows")
    return value


def _fraction(key: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not 0 <= value <= 0.5
    ):
        raise RecipeError(f"{_spoken(key)} is {value!r}; it must be a fraction from 0 to 0.5, such as 0.01 for 1 %")
    return float(value)


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{_spoken(key)} must be true or false, not {value!r}")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{_spoken(key)} must be the name of a file or data set, not {value!r}")
    return value


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise RecipeError(f"skip must be a list of name patterns such as '*.o_proj', not {value!r}")
    return tuple(items)


_CHECKS = {
    "bits": _whole(2, 8),
    "group_size": _group_size,
    "symmetric": _boolean,
    "outliers": _fraction,
    "search": _boolean,
    "calibration": _text,
    "samples": _whole(1),
    "seq_len": _whole(2),
    "seed": _whole(0, 2**63 - 1),
    "skip": _patterns,
}
