"""The tables of recipes/README.md, made from the table of options, the entries of the methods and the stages of a run.

`python -m llmsqueeze.recipe.markdown recipes/README.md` writes them between their markers (`make docs`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llmsqueeze.progress.stopwatch import STAGES
from llmsqueeze.recipe.methods import METHODS, methods_of
from llmsqueeze.recipe.options import Asked
from llmsqueeze.recipe.values import flag


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def methods_table() -> str:
    """Every method with its sentence and source."""
    return table(
        ("`--method`", "what it does", "source", "rounding", "what `--size` or fractional `--bits` decides"),
        [
            (f"`{entry.name}`", entry.help, entry.source, "yes" if entry.rounds else "", entry.decided)
            for entry in METHODS.values()
        ],
    )


def options_table() -> str:
    """Every option: flag, key, sentence, choices, default, and the methods that it belongs to."""
    rows = []
    for name in Asked.model_fields:
        option = Asked.option(name)
        flags = [one for one, _ in option.choice_flags.values()] or [option.flag or flag(name)]
        unnamed = [choice for choice in option.allowed if choice not in option.text]
        choices = f" ({', '.join(option.allowed)})" if unnamed else ""
        owners = methods_of(name)
        barred = [method for method in METHODS if method not in owners and method != "auto"]
        few = ", ".join(owners) if len(owners) <= len(barred) else f"all but {', '.join(barred)}"
        rows.append(
            (" ".join(f"`{one}`" for one in flags), option.text + choices, option.default, few if owners else "all")
        )
    return table(("option", "meaning", "default", "methods"), rows)


def stages_table() -> str:
    """Every stage of `--profile-time` and what happens in it."""
    return table(("stage", "what is timed"), [(f"`{name}`", meaning) for name, meaning in STAGES.items()])


TABLES: dict[str, Callable[[], str]] = {"methods": methods_table, "options": options_table, "stages": stages_table}


def filled(text: str) -> str:
    """The text with every table between its markers written again."""
    for name, make in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
