"""Progress on a terminal: bars, and the weights with the largest errors."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from llmsqueeze.cli import console as consoles
from llmsqueeze.cli.console import TerminalProgress


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_shows_the_worst_weights_and_breaks_no_name(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(consoles, "console", lambda stderr=False: terminal)
    with TerminalProgress() as progress:
        progress.stage("compress", 3)
        for number in range(9):
            progress.weight(f"model.layers.{number}.mlp.down_proj", 3.13, number / 100)
        progress.advance()
    last = shown.getvalue().rpartition("largest errors so far")[2]
    worst = [line.split() for line in last.splitlines() if "down_proj" in line]
    assert [words[0] for words in worst] == [f"model.layers.{number}.mlp.down_proj" for number in (8, 7, 6, 5)]
    assert all("error" in words for words in worst)


@pytest.mark.parametrize(("verbose", "lines"), [(False, 1), (True, 2)])
def test_a_line_for_every_weight_only_on_request(verbose: bool, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere than on a terminal too; a very large error is always told."""
    with TerminalProgress(verbose=verbose) as progress:
        progress.weight("fine", 3.13, 0.01)
        progress.weight("bad", 3.13, 0.9)
    told = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(told) == lines
    assert "<-- large" in told[-1]
