"""What a method implies for the settings that the user left open, and which settings contradict each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.recipe.recipe import IMPORTANCE, QUANTIZERS, Recipe

PLAIN = (*QUANTIZERS, "gwq", "dbllm")
BUDGETED = ("coded", "budget")  # what `auto` may become
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
INPUTS = {"rtn": "original", "gptq": "sequential", "descent": "corrected", "coded": "corrected"}


def fill_in(recipe: Recipe) -> Recipe:
    """`recipe` with every open setting decided by its method. Raises RecipeError for contradictions, all at once."""
    if recipe.method == "auto":
        recipe = dataclasses.replace(recipe, method=chosen_by_auto(recipe))
    refuse(contradictions(recipe))
    own_name = recipe.method in (*QUANTIZERS, "coded")
    quantizer = recipe.quantizer or (recipe.method if own_name else "descent")
    filled: dict[str, Any] = {
        "quantizer": quantizer,
        "inputs": recipe.inputs or INPUTS[quantizer],
        "search": recipe.search if recipe.search is not None or quantizer == "coded" else quantizer == "descent",
        "outliers": (0.01 if recipe.method == "gwq" else 0.0) if recipe.outliers is None else recipe.outliers,
        "labels": recipe.labels or ("model" if recipe.method in BUDGETED else "text"),
        "symmetric": recipe.method != "mixllm" if recipe.symmetric is None else recipe.symmetric,
    }
    own = {"coded": _coded, "budget": _budget, "layerwise": _layerwise, "mixllm": _mixllm, "dbllm": _dbllm}.get(
        recipe.method, _plain
    )
    made = dataclasses.replace(recipe, **filled, **own(dataclasses.replace(recipe, **filled)))
    refuse(impossible(made))
    return made


def chosen_by_auto(recipe: Recipe) -> str:
    """Coded weights, unless something is asked for that only weights on grids have."""
    return "budget" if recipe.portable or next(_only_on_grids(recipe), None) else "coded"


def _only_on_grids(recipe: Recipe) -> Iterator[str]:
    """The settings that say nothing of coded weights."""
    for key in ("importance", "granularity", "widths", "group_sizes", "row_outliers", "dual", "levels", "search"):
        if getattr(recipe, key) is not None:
            yield key.replace("_", " ")
    if recipe.quantizer not in (None, "coded"):
        yield f"quantizer {recipe.quantizer}"
    if recipe.symmetric is False:
        yield "asymmetric"
    if recipe.group_size != Recipe.group_size:
        yield f"group size {recipe.group_size}"
    if recipe.buys_ranks:
        yield "lorc rank auto"
    if recipe.packs:
        yield "pack rans"


def refuse(wrong: Iterator[str]) -> None:
    """Raises RecipeError with all sentences, if there are any."""
    if sentences := list(wrong):
        raise RecipeError("\n       ".join(sentences))


def impossible(recipe: Recipe) -> Iterator[str]:
    """What cannot be, once everything is filled in."""
    low, high = recipe.low_bits, recipe.high_bits
    if recipe.method in ("layerwise", "mixllm") and low is not None and high is not None and low >= high:
        yield f"low bits {low} is not below high bits {high}"
    elif recipe.mix and low is not None and min(width for width, _ in recipe.mix) <= low:
        yield f"mix gives rows {min(width for width, _ in recipe.mix)} bits, no more than the {low} of the others"
    halves = recipe.levels in ("half", "by-width")
    if recipe.outliers and (halves or low == 1):
        what = f"levels {recipe.levels}" if halves else "low bits 1"
        yield f"{what} contradicts outliers {recipe.outliers:g}: they are pinned to level 0, which it lacks"
    if recipe.method == "budget" and not recipe.widths:
        yield "no width is left: one bit has half-integer levels only"


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {"bits": recipe.bits or 3, "levels": recipe.levels or "integer"}


def _dbllm(_recipe: Recipe) -> dict[str, Any]:
    return {"bits": 2, "levels": "dual"}


def _coded(_recipe: Recipe) -> dict[str, Any]:
    return {}


def _layerwise(recipe: Recipe) -> dict[str, Any]:
    bits = None if recipe.size else recipe.bits or 3
    # the paper's two widths, unless more than four bits are wanted
    low, high = (4, 8) if bits is not None and bits > 4.3 else (2, 4)
    return {
        "bits": bits,
        "levels": recipe.levels or "integer",
        "importance": recipe.importance or "lim",
        "high_bits": recipe.high_bits or max(high, recipe.low_bits or 0),
        "low_bits": recipe.low_bits or min(low, recipe.high_bits or low),
    }


def _mixllm(recipe: Recipe) -> dict[str, Any]:
    by_bytes = recipe.size is not None or (recipe.bits is not None and recipe.bits != int(recipe.bits))
    rest = min(width for width, _ in recipe.mix) - 1 if recipe.mix else 4
    low = recipe.low_bits or int(recipe.bits or max(rest, 1))
    high = recipe.high_bits or 8
    rows = recipe.mix or ((high, 0.10 if recipe.high_fraction is None else recipe.high_fraction),)
    return {
        "bits": recipe.bits if by_bytes else None,
        "levels": "integer",
        "importance": recipe.importance or "salience",
        "low_bits": low,
        "high_bits": rows[0][0] if recipe.mix else high,
        "high_fraction": None if by_bytes else rows[0][1],
        "mix": None if by_bytes else rows,
    }


def _budget(recipe: Recipe) -> dict[str, Any]:
    # a grid that outliers are pinned to needs a level 0, and so does what compressed-tensors stores
    integer = recipe.portable or bool(recipe.outliers) or not recipe.symmetric
    levels = recipe.levels or ("integer" if integer else "by-width")
    granularity = recipe.granularity or ("group" if recipe.portable else "row")
    widths = recipe.widths or WIDTHS
    if levels == "integer":
        widths = tuple(width for width in widths if width > 1)
    return {
        "levels": levels,
        "granularity": granularity,
        "widths": widths,
        "importance": recipe.importance or "cost",
    }


def contradictions(recipe: Recipe) -> Iterator[str]:
    """One sentence for every pair of settings that cannot both hold."""
    method = recipe.method
    yield from _about_method(recipe)
    yield from _about_budget(recipe)
    if recipe.importance and method in IMPORTANCE and recipe.importance not in IMPORTANCE[method]:
        hint = nearest(recipe.importance, IMPORTANCE[method])
        known = ", ".join(IMPORTANCE[method])
        yield f"importance {recipe.importance!r} does not go with method {method}{hint or ';'} it knows {known}"
    halves = recipe.levels in ("half", "by-width")
    if halves and recipe.symmetric is False:
        yield f"levels {recipe.levels} contradicts asymmetric: half-integer levels are symmetric ones"
    if halves and method == "mixllm":
        yield f"levels {recipe.levels} contradicts method mixllm: its grids are those of the paper"
    if recipe.importance == "uniform" and (recipe.group_sizes or recipe.row_outliers):
        yield "importance uniform contradicts group sizes and row outliers: it mixes two widths and no more"
    if recipe.widths == (1,):
        barred = {
            "levels integer": recipe.levels == "integer",
            "asymmetric": recipe.symmetric is False,
            f"outliers {recipe.outliers or 0:g}": bool(recipe.outliers),
        }
        for what in [name for name, there in barred.items() if there]:
            yield f"{what} contradicts widths 1: one bit has half-integer levels only, without a 0"


def _about_method(recipe: Recipe) -> Iterator[str]:
    method = recipe.method
    if method in QUANTIZERS and recipe.quantizer not in (None, method):
        yield f"quantizer {recipe.quantizer!r} contradicts method {method}, which is its own quantizer"
    if method in QUANTIZERS and recipe.outliers:
        yield f"outliers {recipe.outliers:g} contradict method {method}; they go with gwq and what has a budget"
    belongs = {
        "importance": tuple(IMPORTANCE),
        "size": ("coded", *IMPORTANCE),
        "high_bits": ("layerwise", "mixllm"),
        "low_bits": ("layerwise", "mixllm"),
        "high_fraction": ("mixllm",),
        "mix": ("mixllm",),
        "granularity": ("budget",),
        "widths": ("budget",),
        "group_sizes": ("budget",),
        "row_outliers": ("budget",),
        "dual": ("budget",),
        "max_ppl_increase": BUDGETED,
        "max_kl": BUDGETED,
        "code_embeddings": ("coded",),
    }
    for key, methods in belongs.items():
        if method == "coded" and methods == ("budget",):
            continue  # said below
        if getattr(recipe, key) is not None and method not in methods:
            yield f"{key.replace('_', ' ')} goes with method {' or '.join(methods)}, not with {method}"
    if method == "coded":
        yield from (f"{what} says nothing of method coded: its weights have no grid" for what in _only_on_grids(recipe))
    elif recipe.quantizer == "coded":
        yield f"quantizer coded goes with method coded, not with {method}"
    yield from _about_dual(recipe)
    if recipe.row_outliers and recipe.outliers:
        yield f"row outliers contradict outliers {recipe.outliers:g}: the allocator chooses them, or a ranking does"
    if recipe.portable:
        yield from (f"portable contradicts {what}: {why}" for what, why in unportable(recipe))


def _about_dual(recipe: Recipe) -> Iterator[str]:
    """Dual binarization is two planes of one bit, and that is all that it is."""
    dual = recipe.levels == "dual"
    if recipe.method == "dbllm":
        if recipe.levels not in (None, "dual"):
            yield f"levels {recipe.levels} contradicts method dbllm, whose levels are dual"
        if recipe.bits not in (None, 2):
            yield f"bits {recipe.bits:g} contradicts method dbllm: two planes of one bit are 2 bits"
    elif dual and recipe.method not in (*QUANTIZERS, "gwq"):
        yield f"levels dual do not go with method {recipe.method}; with budget it is --dual"
    elif dual and recipe.bits != 2:
        yield f"levels dual want bits 2, not {recipe.bits or 3:g}"
    if recipe.symmetric is False and (dual or recipe.method == "dbllm"):
        yield "asymmetric contradicts dual levels: each group has two scales and no zero"


def unportable(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The settings that compressed-tensors has no place for, and why it has none."""
    if recipe.method == "coded":
        yield "method coded", "no other runtime decodes its streams"
    if recipe.method == "mixllm" or recipe.granularity in ("row", "linear"):
        what = "method mixllm" if recipe.method == "mixllm" else f"per {recipe.granularity}"
        yield what, "runtimes want one width per fusion group"
    if recipe.importance == "uniform":
        yield "importance uniform", "it puts the rows of a linear on two widths"
    if recipe.outliers or recipe.row_outliers or recipe.method == "gwq":
        yield ("method gwq" if recipe.method == "gwq" else "outliers"), "no other runtime opens outliers"
    if recipe.packs:
        yield "pack rans", "no other runtime decodes its streams"
    if recipe.lorc_rank:
        yield f"lorc rank {recipe.lorc_rank}", "the low-rank factors need an adapter beside the model"
    if recipe.dual or recipe.method == "dbllm" or recipe.levels == "dual":
        what = "dual" if recipe.dual else "method dbllm" if recipe.method == "dbllm" else "levels dual"
        yield what, "no other runtime opens two planes"
    elif recipe.levels in ("half", "by-width"):
        yield f"levels {recipe.levels}", "compressed-tensors has integer levels"
    if recipe.symmetric is False:
        yield "asymmetric", "transformers does not open zeros"
    if recipe.low_bits == 1:
        yield "low bits 1", "compressed-tensors has 2 to 8"
    if recipe.widths and recipe.widths[0] == 1 and recipe.levels != "integer":
        yield "width 1", "compressed-tensors has 2 to 8"


def _about_budget(recipe: Recipe) -> Iterator[str]:
    method, bits = recipe.method, recipe.bits
    named = [
        f"{key.replace('_', ' ')} {getattr(recipe, key):.10g}"
        for key in ("bits", "size", "max_ppl_increase", "max_kl")
        if getattr(recipe, key) is not None
    ]
    if method in BUDGETED:
        if len(named) > 1:
            yield f"{named[0]} contradicts {named[1]}: name one budget"
        if not named and not recipe.mix:
            yield f"method {method} wants a budget: bits 2.7, size 4GB, max ppl increase 0.02 or max kl 0.05"
    elif bits is not None and recipe.size is not None:
        yield f"{named[0]} contradicts {named[1]}: name one budget"
    if recipe.buys_ranks and (method != "budget" or recipe.lorc == "plain" or recipe.importance == "uniform"):
        what = f"method {method}" if method != "budget" else "importance uniform" if recipe.importance else "lorc plain"
        yield f"lorc rank auto contradicts {what}: method budget buys input-weighted ranks by their cost"
    if recipe.distill_steps and recipe.bounded:
        yield f"distill steps {recipe.distill_steps} contradict a bound on quality, which is measured before them"
    if method == "mixllm":
        yield from _about_rows(recipe)
    if bits is None:
        return
    fractional = bits != int(bits)
    if method in PLAIN and (fractional or bits < 2):
        yield f"bits {bits:g} is no width that method {method} has (2 to 8); fractional ones go with coded or budget"
    if method == "mixllm" and not fractional and recipe.low_bits not in (None, bits):
        yield f"bits {bits:g} contradicts low bits {recipe.low_bits}: both name the width of the low rows"


def _about_rows(recipe: Recipe) -> Iterator[str]:
    """MixLLM's budget is one of: a share of the rows, a mix of widths, bits with a fraction, a size."""
    budget = f"size {recipe.size}" if recipe.size is not None else None
    if recipe.bits is not None and recipe.bits != int(recipe.bits):
        budget = f"bits {recipe.bits:g}"
    if budget and recipe.mix:
        yield f"mix contradicts {budget}: the fractions of rows are the budget, or the bytes are"
    elif budget and recipe.high_fraction is not None:
        yield f"high fraction {recipe.high_fraction:g} contradicts {budget}: one of them is the budget"
    if recipe.mix:
        width, share = recipe.mix[0]
        if recipe.high_bits not in (None, width):
            yield f"high bits {recipe.high_bits} contradicts mix, whose widest is {width}"
        if recipe.high_fraction not in (None, share):
            yield f"high fraction {recipe.high_fraction:g} contradicts mix, whose widest takes {share:g}"
