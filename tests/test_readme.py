"""The README's commands run, in the order in which it gives them, and the files that it names are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from support import command

from llmsqueeze.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "recipes/README.md")}
TARGETS = [line.split()[1] for line in README.splitlines() if line.startswith("    make ")]
# what keeps a run short: enough text for the facts, none for the quality
TEXT = ["--samples", "2", "--seq-len", "32"]
SHORT = {
    "quantize": TEXT,
    "plan": [*TEXT, "--no-trial"],
    "distill": [*TEXT, "--held-back", "2"],
    "eval": ["--limit", "2"],
    "compare": ["--limit", "2"],
}


def commands(page: str) -> list[list[str]]:
    """The commands of a page, without their comments, as lists of words."""
    lines = [line.split(" # ")[0].strip() for line in page.splitlines() if line.startswith("    llmsqueeze ")]
    return [shlex.split(line) for line in lines]


@pytest.mark.thorough
def test_every_command_of_the_readme_runs(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsqueeze.demo.MODEL_DIR", demo_of(1))
    monkeypatch.chdir(tmp_path)
    verbs = set()
    for _, verb, *arguments in commands(README):
        code, stdout, stderr = command(verb, *arguments, *SHORT.get(verb, []))
        assert code == 0, f"{verb} {arguments}: {stderr}"
        assert stdout
        verbs.add(verb)
    assert verbs == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    """Names of verbs and options, and types of values."""
    for program, verb, *arguments in commands(PAGES[page]):
        assert program == "llmsqueeze"
        subcommand = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        with subcommand.make_context(verb, arguments) as context:
            assert context.params


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "llmsqueeze/README.md", "recipes/README.md", "evals/README.md"])
def test_every_named_file_exists(page: str) -> None:
    """Links, and paths in backquotes, from the root or from where the page lies."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http)([\w./-]+)\)", text)
    named += re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|json|yaml|txt|svg)|[\w-]+\.(?:py|md))`", text)
    assert named
    named = [path for path in named if "NAME" not in path]
    lost = [
        path
        for path in named
        if not any((base / path).exists() for base in (ROOT, (ROOT / page).parent, ROOT / "llmsqueeze"))
    ]
    assert lost == []


def test_the_readme_is_short_and_whole() -> None:
    assert len(README.split()) <= 1000
    assert "@@" not in README
