"""The README's commands exist as it writes them, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from llmsqueeze.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    llmsqueeze ")]
TARGETS = [line.split()[1] for line in README.splitlines() if line.startswith("    make ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    """Names of verbs and options, and types of values; nothing is run."""
    program, verb, *arguments = shlex.split(command)
    assert program == "llmsqueeze"
    group = typer.main.get_command(app)
    known = group.commands[verb]  # type: ignore[attr-defined]
    with known.make_context(verb, arguments) as context:
        assert context.params


def test_the_commands_are_found() -> None:
    verbs = {command.split()[1] for command in COMMANDS}
    assert verbs == {"quantize", "plan", "distill", "export", "eval", "compare", "show", "report", "check", "push"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:recipes|evals|llmsqueeze|\.ci)/[\w./-]+)`", README))))
def test_every_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
