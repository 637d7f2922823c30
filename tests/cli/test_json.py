"""`--json`: what every verb prints is what the page llmsqueeze/cli/schema/README.md says, and the page is made from it.

`support.command` holds all that the other tests print against the same models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from support import FAST, command

from llmsqueeze.cli.app import app
from llmsqueeze.cli.schema import SCHEMA_VERSION
from llmsqueeze.cli.schema.markdown import MODELS, PAGE, faults, inner_models, kind_of, page, verb_of

VERBS: tuple[str, ...] = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def arguments(
    demo_of: Callable[[int], Path], compressed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """The shortest call of every verb on a tiny model."""
    there = tmp_path_factory.mktemp("json")
    folder = Path(shutil.copytree(compressed("portable"), there / "folder"))
    text = ["--text", "demo", "--limit", 2, "--device", "cpu"]
    return {
        "recipes": [],
        "quantize": [demo_of(1), "--method", "rtn", "--bits", 4, "--out", there / "out", "--profile-time"],
        "plan": [demo_of(1), "--bits", 3.5, "--calibration", "demo", "--no-trial", "--out", there / "plan", *FAST],
        "distill": [
            *(folder, "--teacher", demo_of(2), "--steps", 1, "--held-back", 2, "--calibration", "demo", *FAST),
            *("--out", there / "distilled"),
        ],
        "export": [folder, "--to", "dense", "--out", there / "dense"],
        "eval": [folder, "--baseline", demo_of(2), *text],
        "generate": [folder, "Once", "--max-tokens", 2, "--device", "cpu"],
        "compare": [demo_of(2), folder, *text],
        "show": [folder],
        "check": [folder],
        "report": [folder],
        "push": [folder, "me/name", "--dry-run"],
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_prints_what_the_page_says(verb: str, arguments: dict[str, list[Any]]) -> None:
    """An unknown field, one that lacks, and one of another type are faults: see `faults`."""
    code, stdout, stderr = command(verb, *arguments[verb], "--json")
    assert code == 0, stderr
    printed = json.loads(stdout)
    assert list(printed)[:2] == ["schema_version", "verb"]
    assert (printed["schema_version"], printed["verb"]) == (SCHEMA_VERSION, verb)
    assert faults(printed) == []


def test_faults_are_seen() -> None:
    line = {"name": "a", "purpose": "b"}
    printed = {"schema_version": 1, "verb": "recipes", "recipes": [line]}
    assert faults(printed) == []
    assert faults(printed | {"more": 1}) == ["more: Extra inputs are not permitted"]
    assert faults(printed | {"recipes": [line | {"more": 1}]}) == ["recipes.0.more: Extra inputs are not permitted"]
    assert faults(printed | {"recipes": [{"name": "a"}]}) == ["recipes.0.purpose: Field required"]
    assert faults(printed | {"schema_version": "1"}) == ["schema_version: Input should be a valid integer"]


def test_the_page_is_as_the_models_make_it() -> None:
    """`make docs` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_verb_and_every_field_is_described() -> None:
    assert {verb_of(model) for model in MODELS} == set(VERBS)
    fields = [(model, *field) for model in (*MODELS, *inner_models()) for field in model.model_fields.items()]
    assert [name for _, name, field in fields if not field.description or not kind_of(field.annotation)] == []
    assert all(f"`{name}`" in page() for _, name, _ in fields)
