"""Which options cannot be followed together, and which settings compressed-tensors cannot represent.

Whatever was asked for and cannot be followed is an error that names both options; all errors are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmsqueeze.errors import nearest
from llmsqueeze.recipe.methods import BUDGETS, Method, methods_of
from llmsqueeze.recipe.options import Asked
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.values import flag


def conflicts(given: Mapping[str, Any], entry: Method) -> Iterator[str]:
    """One sentence for every option that the method does not have, and for every two that exclude each other."""
    yield from foreign(given, entry)
    yield from _about_budget(given, entry)
    importance = given.get("importance")
    if importance and entry.importance and importance not in entry.importance:
        hint = nearest(importance, entry.importance)
        yield (
            f"--importance {importance} does not apply to --method {entry.name}{hint or ';'} it takes "
            f"{', '.join(entry.importance)}"
        )
    yield from _about_grids(given, entry)
    if "group_size" in given and "group_sizes" in given:
        yield f"{phrase(given, 'group_size')} contradicts {phrase(given, 'group_sizes')}: name the sizes once"
    if given.get("code_embeddings") and given.get("embeddings"):
        yield f"--code-embeddings contradicts {phrase(given, 'embeddings')}: one of them decides what they become"
    if given.get("row_outliers") and given.get("outliers"):
        yield f"{phrase(given, 'row_outliers')} contradicts {phrase(given, 'outliers')}: one of them chooses outliers"
    if importance == "uniform":
        for name in ("granularity", "group_sizes", "row_outliers"):
            if name in given:
                yield f"--importance uniform contradicts {phrase(given, name)}: it mixes two widths in every linear"


def foreign(given: Mapping[str, Any], entry: Method) -> Iterator[str]:
    """Options that belong to other methods."""
    for name in given:
        owners = methods_of(name)
        if not owners or name in entry.allows:
            continue
        if name == "quantizer" and entry.rounds:
            if given[name] != entry.name:
                yield f"{phrase(given, name)} contradicts --method {entry.name}, which is a rounding method itself"
        else:
            yield f"{phrase(given, name)} does not apply to --method {entry.name}; it belongs to {', '.join(owners)}"


def _about_budget(given: Mapping[str, Any], entry: Method) -> Iterator[str]:
    named, bits = [phrase(given, name) for name in BUDGETS if name in given], given.get("bits")
    if len(named) > 1:
        yield f"{named[0]} contradicts {named[1]}: name one budget"
    elif not named and entry.budget and "bits" not in entry.implies:
        yield (
            f"--method {entry.name} needs a budget: --bits 2.7, --size 4GB, --max-ppl-increase 0.02 or --max-kl 0.05"
        )
    bends = entry.bends if _averaged(given) else ""
    if given.get("lorc_rank") == "auto" and not bends:
        barred = f"--method {entry.name}" if entry.name != "budget" else ""
        barred = barred or ("--lorc plain" if given.get("lorc") == "plain" else "")
        barred = barred or ("--importance uniform" if given.get("importance") == "uniform" else "")
        if barred:
            else_ = f"; with --method {entry.name} it needs --size or fractional --bits" if entry.bends else ""
            yield f"--lorc-rank auto contradicts {barred}: --method budget buys input-weighted ranks by cost{else_}"
    elif bends in given and given.get("lorc_rank") != "auto":
        yield f"{phrase(given, bends)} contradicts {named[0]}: the budget decides it for --method {entry.name}"
    if given.get("distill_steps") and len({"max_ppl_increase", "max_kl"} & given.keys()):
        yield f"{phrase(given, 'distill_steps')} contradicts a bound on quality, which is measured before distillation"
    if bits is not None and "mix" in entry.allows:
        yield from _about_rows(given)
    elif bits is not None and not entry.budget and bits < 2:
        yield f"--bits {bits:g} is too narrow for --method {entry.name}: its codes have 2 to 8 bits"


def _averaged(given: Mapping[str, Any]) -> bool:
    """Whether the bytes of the result are asked for, not the width of its codes."""
    return isinstance(given.get("bits"), float) or "size" in given


def _about_rows(given: Mapping[str, Any]) -> Iterator[str]:
    """The budget of rows on two widths is one of: shares of the rows, an average, a size."""
    bits = given["bits"]
    if isinstance(bits, float):
        for name in (name for name in ("mix", "high_fraction") if name in given):
            yield f"{phrase(given, name)} contradicts {phrase(given, 'bits')}: shares of the rows are a budget too"
    elif given.get("low_bits") not in (None, bits):
        yield f"{phrase(given, 'bits')} contradicts {phrase(given, 'low_bits')}: both name the width of the low rows"


def _about_grids(given: Mapping[str, Any], entry: Method) -> Iterator[str]:
    levels, asymmetric = given.get("levels"), given.get("symmetric") is False
    if levels in ("half", "by-width") and asymmetric:
        yield f"--levels {levels} contradicts --asymmetric: half-integer levels are symmetric"
    if levels in ("half", "by-width", "dual") and "mix" in entry.allows:
        yield f"--levels {levels} does not apply to --method {entry.name}, whose grids are those of the paper"
    if 1 in given.get("widths", ()):
        barred = {"levels": levels == "integer", "symmetric": asymmetric, "outliers": bool(given.get("outliers"))}
        barred |= {"portable": given.get("portable") is True}
        for name in (name for name, there in barred.items() if there):
            yield f"{phrase(given, name)} contradicts width 1 of --widths: one bit has half-integer levels only"
    if entry.implies.get("levels") == "dual":
        if levels not in (None, "dual"):
            yield f"--levels {levels} does not apply to --method {entry.name}, whose levels are dual"
        if given.get("bits") not in (None, 2) and not isinstance(given["bits"], float):
            yield f"{phrase(given, 'bits')} does not apply to --method {entry.name}: two planes of one bit are 2 bits"
    elif levels == "dual" and entry.budget:
        yield f"--levels dual does not apply to --method {entry.name}; --method budget takes --dual"
    elif levels == "dual" and given.get("bits") != 2 and "mix" not in entry.allows and not _averaged(given):
        yield f"--levels dual needs --bits 2, not {given.get('bits', 3):g}"
    if asymmetric and (levels == "dual" or entry.implies.get("levels") == "dual"):
        yield "--asymmetric contradicts dual levels: each group has two scales and no zero"


def unfollowed(given: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    """Options that cannot be followed, once everything is decided."""
    unused = recipe.unused()
    yield from (f"{phrase(given, name)} {unused[name]}" for name in given if name in unused)
    yield from _about_two_widths(given, recipe)
    halves = recipe.levels in ("half", "by-width")
    if recipe.outliers and (halves or recipe.low_bits == 1):
        what = f"--levels {recipe.levels}" if halves else "--low-bits 1"
        yield f"{what} contradicts --outliers {recipe.outliers:g}: outliers are pinned to level 0, which it lacks"
    if recipe.portable:
        yield from (f"--portable contradicts {what}: {why}" for what, why in unportable(recipe))


def _about_two_widths(given: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    low, high = recipe.low_bits, recipe.high_bits
    if not high:
        return
    narrowest = min((width for width, _ in recipe.mix), default=high)
    if len(recipe.mix) > 1 and narrowest <= low:
        yield f"--mix gives rows {narrowest} bits, no more than the --low-bits {low} of the others"
    elif low >= high:
        yield f"--low-bits {low} is not below --high-bits {high}"
    if "mix" in given:
        width, share = given["mix"][0]
        if "size" in given:
            yield f"{phrase(given, 'mix')} contradicts {phrase(given, 'size')}: shares of the rows are a budget too"
        if given.get("high_bits", width) != width:
            yield f"{phrase(given, 'high_bits')} contradicts --mix, whose widest is {width}"
        if given.get("high_fraction", share) != share:
            yield f"{phrase(given, 'high_fraction')} contradicts --mix, whose widest takes {share:g}"
    elif "high_fraction" in given and "size" in given:
        yield f"{phrase(given, 'high_fraction')} contradicts {phrase(given, 'size')}: one of them is the budget"


def phrase(given: Mapping[str, Any], name: str) -> str:
    """An asked option with its value, as the command line has it: '--bits 3', '--asymmetric', '--per-row'."""
    option, value = Asked.option(name), given[name]
    if option.choice_flags:
        return option.choice_flags[value][0]
    if isinstance(value, bool):
        on, _, off = (option.flag or flag(name)).partition("/")
        return on if value or not off else off
    if isinstance(value, tuple):
        value = ",".join(f"{one[0]}:{one[1]:g}" if isinstance(one, tuple) else str(one) for one in value)
    return f"{flag(name)} {value}"


def _beside_unportable(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Of what is rounded beside the linears, the same."""
    if recipe.embeddings:
        yield f"--embeddings {recipe.embeddings}", "transformers does not open rounded embeddings"
    if recipe.rounds_towers:
        yield "--vision rtn8", "whether other programs read compressed towers is not known"


def unportable(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The settings that compressed-tensors cannot represent, and why."""
    if recipe.entry.native:
        yield f"--method {recipe.method}", recipe.entry.native
    if recipe.granularity in ("row", "linear"):
        yield f"--per-{recipe.granularity}", "runtimes need one width per fusion group"
    if recipe.importance == "uniform":
        yield "--importance uniform", "it puts the rows of a linear on two widths"
    if (recipe.outliers or recipe.row_outliers) and not recipe.entry.native:
        yield "outliers", "no other runtime opens outliers"
    if recipe.packs:
        yield "--pack rans", "no other runtime decodes its streams"
    yield from _beside_unportable(recipe)
    if recipe.lorc_rank:
        yield f"--lorc-rank {recipe.lorc_rank}", "the low-rank factors need an adapter beside the model"
    if recipe.dual or (recipe.levels == "dual" and not recipe.entry.native):
        yield ("--dual" if recipe.dual else "--levels dual"), "no other runtime opens two planes"
    elif recipe.levels in ("half", "by-width"):
        yield f"--levels {recipe.levels}", "compressed-tensors has integer levels"
    if not recipe.symmetric and not recipe.entry.native:
        yield "--asymmetric", "transformers does not open zeros"
    if recipe.low_bits == 1:
        yield "--low-bits 1", "compressed-tensors has 2 to 8"
