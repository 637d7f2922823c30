"""Several methods with one budget: the settings of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llmsqueeze.errors import RecipeError, SqueezeError, nearest
from llmsqueeze.recipe.methods import DEFAULT, method_names
from llmsqueeze.recipe.recipe import TEXT
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.recipe.values import bits as check_bits
from llmsqueeze.recipe.values import nbytes as check_nbytes

LORC = "lorc"  # the default method with low-rank factors of the rank that fits


def settings_of_each(
    names: Sequence[str], bits: Any, size: Any, common: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Method -> the settings of its run: `common`, and the budget, whose bits are an average for all of them.

    Raises RecipeError for names that are no methods, for a budget that is not one, and for settings that a method does
    not take.
    """
    known = (*(name for name in method_names() if name != "auto"), LORC)
    if unknown := next((name for name in names if name not in known), None):
        raise RecipeError(f"unknown method {unknown!r}{nearest(unknown, known) or ';'} choose from {', '.join(known)}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"--methods names {twice} twice")
    if (bits is None) == (size is None):
        raise RecipeError(
            "--methods needs one budget for all: --bits 2.6, the average with everything counted, or --size"
        )
    decided = ("method", "bits", "size", *(["lorc_rank"] if LORC in names else []))
    if wrong := next((name for name in decided if name in common), None):
        raise RecipeError(f"the recipe names {wrong}, which --methods, --bits and --size decide here")
    budget = {"size": check_nbytes("size", size)} if bits is None else {"bits": float(check_bits("bits", bits))}
    settings = {name: {**common, **budget, **_of_method(name)} for name in names}
    for name, own in settings.items():
        with told_of(name):
            if make_recipe({key: value for key, value in own.items() if key not in TEXT}).needs_text:
                make_recipe(own)
            else:
                settings[name] = {key: value for key, value in own.items() if key not in TEXT}
    return settings


def _of_method(name: str) -> dict[str, Any]:
    return {"method": DEFAULT, "lorc_rank": "auto"} if name == LORC else {"method": name}


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Errors in the context say of which method they are."""
    try:
        yield
    except SqueezeError as error:
        raise type(error)(f"{name}: {error}") from error
