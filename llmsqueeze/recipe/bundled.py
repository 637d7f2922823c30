"""Recipes as the user writes them: options and YAML files, and the ones that come along.

Everything is checked here, before any file of the model is read: unknown keys and choices name the nearest valid one,
contradicting settings name each other, and all that is wrong is said at once. checks.py has the single values' checks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.files import read_yaml
from llmsqueeze.recipe.recipe import CHOICES, Recipe
from llmsqueeze.recipe.resolve import fill_in
from llmsqueeze.recipe.values import (
    boolean,
    budget,
    choice,
    fraction,
    group_size,
    group_sizes,
    mix,
    nbytes,
    number,
    patterns,
    rank,
    shares,
    text,
    whole,
    widths,
)

KEYS = {field.name: field for field in dataclasses.fields(Recipe)}


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A checked, resolved recipe from YAML keys or options; None stands for the default. Raises RecipeError."""
    values: dict[str, Any] = {}
    wrong = []
    for key, value in settings.items():
        try:
            if key not in KEYS:
                raise RecipeError(f"unknown recipe key {key!r}{nearest(key, KEYS)} Known keys: {', '.join(KEYS)}")
            if value is not None:
                values[key] = _checked(key, value)
        except RecipeError as error:
            wrong.append(str(error))
    if wrong:
        raise RecipeError("\n       ".join(wrong))
    if "method" not in values:
        values["method"] = _implied_method(values)
    if values["method"] == "dbllm":
        values.setdefault("group_size", 64)
    return fill_in(Recipe(**values))


def _implied_method(values: Mapping[str, Any]) -> str:
    """The method that goes without saying: a budget wants the allocator."""
    bits = values.get("bits")
    budgeted = ("size", "max_ppl_increase", "max_kl", "granularity", "widths")
    fractional = bits is not None and bits != int(bits)
    bought = values.get("lorc_rank") == "auto" or values.get("dual")
    if any(key in values for key in budgeted) or values.get("portable") or fractional or bought:
        return "auto"
    return "descent"


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises RecipeError if it is missing or no mapping of keys to values."""
    settings = read_yaml(path, "recipe file")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise RecipeError(f"{path} is no recipe: it must map keys to values, such as `bits: 3`")
    return settings


def find_recipe(name: str) -> Path:
    """The file `name`, or the recipe of that name among those that come along. Raises RecipeError."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = {recipe_name(file): file for file in own_recipes()}
    if name in known:
        return known[name]
    raise RecipeError(f"there is no recipe file {name}{nearest(name, known) or ';'} own ones: {', '.join(known)}")


def own_recipes() -> list[Path]:
    """The recipes that come along: beside the package in a checkout, under the prefix where it was installed."""
    for folder in (Path(__file__).parents[2] / "recipes", Path(sys.prefix) / "share" / "llmsqueeze" / "recipes"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml")) + sorted(folder.glob("papers/*.yaml"))
    return []


def recipe_name(path: Path) -> str:
    """'gwq-3bit', 'papers/gwq'."""
    return f"papers/{path.stem}" if path.parent.name == "papers" else path.stem


def describe_recipes() -> list[dict[str, str]]:
    """Name and purpose of every recipe that comes along; the purpose is the first sentence of its comment."""
    found = []
    for path in own_recipes():
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        found.append({"name": recipe_name(path), "purpose": comment.split(". ")[0].rstrip(".")})
    return found


def _checked(key: str, value: Any) -> Any:
    if key in CHOICES:
        return choice(CHOICES[key])(key, value)
    return _CHECKS[key](key, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "bits": budget,
    "size": nbytes,
    "group_size": group_size,
    "symmetric": boolean,
    "outliers": fraction(0.5),
    "high_bits": whole(2, 8),
    "low_bits": whole(1, 8),
    "high_fraction": fraction(1.0),
    "mix": mix,
    "widths": widths,
    "group_sizes": group_sizes,
    "row_outliers": shares,
    "dual": boolean,
    "portable": boolean,
    "code_embeddings": boolean,
    "lorc_rank": rank,
    "distill_steps": whole(0),
    "max_ppl_increase": number(1e-6, 10.0),
    "max_kl": number(1e-6, 10.0),
    "search": boolean,
    "calibration": text,
    "samples": whole(1),
    "seq_len": whole(2),
    "seed": whole(0, 2**63 - 1),
    "skip": patterns,
}
