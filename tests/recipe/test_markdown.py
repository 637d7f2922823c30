"""The tables of recipes/README.md are those that the code makes, and its commands parse."""

from __future__ import annotations

from pathlib import Path

from llmsqueeze.recipe.markdown import filled, methods_table, options_table
from llmsqueeze.recipe.methods import METHODS
from llmsqueeze.recipe.options import Asked

PAGE = Path(__file__).parents[2] / "recipes" / "README.md"


def test_the_page_holds_the_tables_as_the_code_makes_them() -> None:
    """`make docs` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text
    assert options_table() in text


def test_every_method_and_option_has_a_line() -> None:
    methods, options = methods_table(), options_table()
    assert all(f"| `{name}` |" in methods for name in METHODS)
    assert len(options.splitlines()) == 2 + len(Asked.model_fields)
    assert "| `--per-row` `--per-linear` `--per-group` |" in options
