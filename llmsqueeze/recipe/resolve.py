"""From the options that were asked for to a recipe, by what the method implies and by the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.conflicts import conflicts, unfollowed
from llmsqueeze.recipe.methods import BUDGETS, DEFAULT, DEFAULTS, METHODS, Method, methods_of
from llmsqueeze.recipe.options import Asked
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.targets import against_target, with_target

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
OPEN = {"group_size_open", "low_bits_open"}  # fields of a recipe that are no options
GROUP_SIZES = (128, 64, 32)  # that a default may take


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from YAML keys or options; None stands for the default. Raises RecipeError with all that is wrong."""
    return resolve(Asked.of(settings))


def resolve(asked: Asked) -> Recipe:
    """`asked` with every open setting decided. Raises RecipeError for options that cannot be followed together."""
    refuse(against_target(asked.asked))
    given = with_target(asked.asked)
    entry = METHODS[chosen_method(given)]
    refuse(conflicts(given, entry))
    recipe = filled(given, entry)
    refuse(unfollowed(given, recipe))
    return recipe


def refuse(wrong: Iterator[str]) -> None:
    """Raises RecipeError with all sentences, if there are any."""
    if sentences := list(dict.fromkeys(wrong)):
        raise RecipeError("\n       ".join(sentences))


def chosen_method(given: Mapping[str, Any]) -> str:
    """The method: the one asked for; else the default, or `auto` if a budget is asked for. `auto` is decided."""
    method: str = given.get("method") or (DEFAULT if not wants_budget(given) else "auto")
    if method != "auto":
        return method
    on_grids = (name for name in given if name not in ("method", "bits"))
    needs_grids = any(name in METHODS["budget"].allows and name not in METHODS["coded"].allows for name in on_grids)
    return "budget" if needs_grids or given.get("portable") or given.get("lorc_rank") == "auto" else "coded"


def wants_budget(given: Mapping[str, Any]) -> bool:
    """Whether an option asks for a budget, or belongs to nothing but the methods that `auto` may become."""
    if any(name in given for name in BUDGETS[1:]) or isinstance(given.get("bits"), float):
        return True
    of_budgets = (name for name in given if methods_of(name) and set(methods_of(name)) <= {"coded", "budget"})
    return given.get("lorc_rank") == "auto" or next(of_budgets, None) is not None


def fitted(recipe: Recipe, columns: Mapping[str, int]) -> tuple[Recipe, str | None]:
    """The recipe with a default group size that divides the columns of the linears, and a note if it is another one.

    columns: linear -> number of its columns. If no size divides all of them, the default stays.
    """
    uneven = next((name for name, cols in columns.items() if cols % min(recipe.group_size, cols)), None)
    if not recipe.group_size_open or uneven is None:
        return recipe, None
    smaller = (size for size in GROUP_SIZES if size < recipe.group_size)
    size = next((size for size in smaller if not any(cols % min(size, cols) for cols in columns.values())), None)
    if size is None:
        return recipe, None
    note = f"groups of {size} columns: {recipe.group_size} does not divide the {columns[uneven]} columns of {uneven}"
    return dataclasses.replace(recipe, group_size=size), note


# ------------------------------------------------------------------------------------------------- what is implied


def filled(given: Mapping[str, Any], entry: Method) -> Recipe:
    """The recipe of the options that were asked for, of those that the method implies, and of the defaults."""
    quantizer = entry.name if entry.rounds else given.get("quantizer") or entry.implies.get("quantizer", "descent")
    of_rounding = METHODS[quantizer].implies if METHODS[quantizer].rounds else {}
    values = {**DEFAULTS, **of_rounding, **entry.implies, **given, "method": entry.name, "quantizer": quantizer}
    if any(name in given for name in BUDGETS[1:]):
        values["bits"] = None
    if not entry.on_grids:
        values |= {"levels": "", "search": False}
    values["importance"] = given.get("importance") or next(iter(entry.importance), "")
    values |= _two_widths(values, given, entry) if "high_bits" in entry.allows else {}
    values |= _many_widths(values, given) if "widths" in entry.allows else {}
    names = {field.name for field in dataclasses.fields(Recipe)}
    neutral: dict[str, Any] = {"high_bits": 0, "low_bits": 0, "mix": (), "granularity": "", "widths": ()}
    neutral |= {"group_sizes": (), "row_outliers": (), "dual": False, "portable": None, "code_embeddings": False}
    neutral |= {"embeddings": 0}
    neutral |= {"all_experts": False, "vision": "dense", "pack_documents": True}
    neutral |= {"calibration": None, "size": None, "max_ppl_increase": None, "max_kl": None}
    settings: dict[str, Any] = {name: values.get(name, neutral.get(name)) for name in names - OPEN}
    return Recipe(
        **settings,
        group_size_open="group_size" not in given,
        low_bits_open=not {"low_bits", "mix"} & given.keys() and not isinstance(given.get("bits"), int),
    )


def _two_widths(values: Mapping[str, Any], given: Mapping[str, Any], entry: Method) -> dict[str, Any]:
    """High and low width, of blocks or of rows, and the shares of the rows."""
    bits = values["bits"] if entry.budget or "bits" in given else None
    if "mix" in entry.allows:
        return _rows_on_two_widths(bits, given)
    # the paper's two widths, unless more than four bits are wanted
    low, high = (4, 8) if bits is not None and bits > 4.3 else (2, 4)
    return {
        "high_bits": given.get("high_bits") or max(high, given.get("low_bits", 0)),
        "low_bits": given.get("low_bits") or min(low, given.get("high_bits", low)),
    }


def _rows_on_two_widths(bits: float | None, given: Mapping[str, Any]) -> dict[str, Any]:
    by_bytes = "size" in given or isinstance(bits, float)
    mix = given.get("mix") or ()
    low = given.get("low_bits") or int(bits or (max(1, min(width for width, _ in mix) - 1) if mix else 4))
    high = given.get("high_bits") or 8
    mix = mix or ((high, given.get("high_fraction", 0.10)),)
    return {
        "bits": bits if by_bytes else None,
        "low_bits": low,
        "high_bits": high if by_bytes else mix[0][0],
        "mix": () if by_bytes else mix,
    }


def _many_widths(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    # a grid that outliers are pinned to needs a level 0, and so does what compressed-tensors represents
    integer = given.get("portable") or given.get("outliers") or not values["symmetric"]
    levels = given.get("levels") or ("integer" if integer else "by-width")
    widths = tuple(width for width in given.get("widths", WIDTHS) if width > 1 or levels != "integer")
    granularity = given.get("granularity") or ("group" if given.get("portable") else "row")
    if given.get("importance") == "uniform":
        granularity = ""  # every linear has the same two widths
    return {"levels": levels, "widths": widths, "granularity": granularity}
