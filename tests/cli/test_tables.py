"""Tables on a terminal of 80 columns: they fit, no name is broken within a word, and none loses a letter."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from llmsqueeze.cli import console as consoles
from llmsqueeze.cli.tables.plans import print_plan, widths
from llmsqueeze.cli.tables.results import print_comparison, print_contents
from llmsqueeze.cli.whole import Facts, Whole, broken
from llmsqueeze.publish import numbers

NAME = "model.language_model.layers.29.feed_forward.experts.127.gate_up_proj"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "WIDTH", 80)


@pytest.mark.parametrize("width", [80, 40, 20, 12, 5, 1])
@pytest.mark.parametrize("text", [NAME, "/home/me/runs/demo-3bit", "a few plain words", "gptq, 3 bits: runs/6", ""])
def test_a_text_is_broken_without_loss(text: str, width: int) -> None:
    lines = broken(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) <= width for line in lines)
    for line in lines[:-1]:
        whole = line[-1] in "./-_" or f"{line} " in text
        assert whole or len(line) == width < max(map(len, re.split(r"[./_\- ]", text))), (line, lines)


def test_words_stay_whole_if_they_fit() -> None:
    assert broken("opens in llmsqueeze.load", 16) == ["opens in", "llmsqueeze.load"]
    assert broken("model.layers.0.mlp.up_proj", 20) == ["model.layers.0.mlp.", "up_proj"]


def test_a_cell_is_plain_text_and_as_narrow_as_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None)
    table.add_row(Whole("\x1b[31m[bold]a.name"), "x" * 70)
    consoles.console().print(table)
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "[bold]" in "".join(told.split())
    assert max(map(len, told.splitlines())) <= 80


def test_a_long_path_in_a_summary_keeps_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    facts, path = Facts(), "/work/" + "a-rather-long-folder/" * 8 + "the-result-3bit"
    facts.add("written to", path)
    consoles.console().print(facts)
    told = capsys.readouterr().out
    assert path in "".join(told.split())
    assert "…" not in told


def test_a_note_breaks_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    note = f"the weights of model.layers.0.mlp.up_proj and of {NAME} are\n   not in it"
    consoles.TerminalProgress().note(note)
    told = capsys.readouterr().err
    assert max(map(len, told.splitlines())) <= 80
    assert "model.layers.0.mlp.up_proj" in told
    assert NAME in "".join(told.split())
    assert "\n   not in it" in told, "lines of its own keep their beginning"


def words_in_column(told: str, head: str, after: str) -> str:
    """What stands below `head` and left of the numbers below `after`, without spaces."""
    lines = told.splitlines()
    (top,) = [line for line in lines if head in line and after in line]
    first, last = top.index(head), top.index(after) - (3 if after == "bytes" else 0)
    return "".join("".join(line[first:last].split()) for line in lines[lines.index(top) :])


def comparison_of(*names: str) -> dict[str, Any]:
    rows = [
        {"model": name, "kind": "llmsqueeze" if at else "original", "method": "layerwise" if at else None, "bits": 2.63}
        | {"nbytes": 45_000_000 - 1000 * at, "bits_per_weight": 2.6, "perplexity": 17.1234, "perplexity_stderr": 0.1234}
        | {"nll_difference": 0.1 * at, "nll_difference_stderr": 0.01, "kl_mean": 0.1, "kl_p99": 0.9}
        | {"top1_changed": 0.2, "on_frontier": at < 2, "tasks": {}, "computed_in": "bfloat16"}
        for at, name in enumerate(names)
    ]
    about = {"text": "wikitext", "tokens": 100, "window": 256, "limit": None, "left_out": [], "kept_in": []}
    return about | {"models": rows}


def test_a_comparison_fits_and_names_method_bits_and_folder(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(comparison_of("owner/llama", "/home/me/experiments/runs/demo-layerwise-out", "6"))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "…" not in told.replace("…/", ""), "no cell is cut"
    column = words_in_column(told, "model", "bytes")
    assert "layerwise,2.63bits:…/runs/demo-layerwise-out" in column
    assert "layerwise,2.63bits:6" in column
    flat = " ".join(told.split())
    assert (
        "Least loss of 2 models at 45.0 MB: layerwise, 2.63 bits: …/runs/demo-layerwise-out, +0.1000 ± 0.0100;" in flat
    )


def plan_of(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(
        ("towers", "embeddings", "predicted_loss_increase", "predicted_seconds", "time", "why_native")
    )
    about = {
        "bits_per_weight": 2.6,
        "bits": 2.5,
        "nbytes": 100,
        "nbytes_original": 1000,
        "format": "compressed-tensors",
    }
    return nothing | about | {"block_scores": {}, "rows": rows, "given": "demo", "options": [], "out": "plan"} | more


def plan_row(name: str, rows: dict[str, float], blocks: dict[str, list[int]], count: int = 30) -> dict[str, Any]:
    zero = {"dual": 0, "rank": 0, "outliers": 0, "predicted_loss_increase": None, "high_share": 0}
    return zero | {"pattern": name, "count": count, "rows": rows, "blocks": blocks, "bits_per_weight": 2.5, "nbytes": 9}


def test_a_plan_names_the_blocks_and_their_scores(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {"4": [*range(8), 29], "2": list(range(8, 29))}
    row = plan_row("model.layers.*.self_attn.q_proj", {"2": 0.75, "4": 0.25}, blocks)
    print_plan(plan_of([row], block_scores={"lim": [-0.9, -0.4, -0.7], "zd": [0.16, 0.2, 0.1]}))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    flat = " ".join(told.split())
    assert "4bits:0-7,292bits:8-28" in words_in_column(told, "bits of which blocks", "bits/weight")
    assert "blocks by LIM, the most important first: 1 (−0.4000), 2 (−0.7000), 0 (−0.9000)" in flat
    assert "blocks by ZD, the most important first: 2 (0.1000), 0 (0.1600), 1 (0.2000)" in flat


@pytest.mark.parametrize(
    ("rows", "blocks", "text"),
    [
        ({"4": 1.0}, {"4": [0, 1, 2]}, "4 bits"),
        ({"4": 1.0}, {}, "4 bits"),
        ({}, {"coded": [0, 1]}, "coded"),
        ({"2": 0.75, "4": 0.25}, {"2+4": [0, 1]}, "2+4 bits (rows: 75% on 2, 25% on 4)"),
        ({"2": 0.9, "4": 0.1}, {"2+4": [0], "2": [1, 2]}, "2+4 bits: 0\n2 bits: 1-2 (rows: 90% on 2, 10% on 4)"),
    ],
)
def test_widths_in_words(rows: dict[str, float], blocks: dict[str, list[int]], text: str) -> None:
    assert widths({"rows": rows, "blocks": blocks}) == text


def test_the_contents_of_a_folder_name_blocks_and_whole_linears(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"pattern": NAME, "count": 9, "blocks": [0, 1, 2, 7], "parts": "12 % 4 bit, 88 % 3 bit, g128 + rank 4 to 8"}
    nothing = {"plane_zeros": None, "nbytes_original": None, "model": None, "distillation": [], "recipe": {}}
    about = {"bits_per_weight": 2.6, "bits": 2.5, "kept_nbytes": 9, "nbytes": 99}
    print_contents(nothing | about | {"rows": [row | {"bits_per_weight": 3.1, "nbytes": 123_456}]})
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert NAME in words_in_column(told, "linear", "blocks")
    assert "0-2, 7" in told


@pytest.mark.parametrize(
    ("found", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), ([2, 1, 1], "1-2")]
)
def test_ranges(found: list[int], text: str) -> None:
    assert numbers.ranges(found) == text


@pytest.mark.parametrize("most", [12, 20, 40, 80])
def test_a_shortened_name_keeps_its_end(most: int) -> None:
    short = numbers.shortened(NAME, most)
    assert len(short) == min(most, len(NAME))
    assert short.endswith("gate_up_proj"[-(most - 1) :])
    assert most < len(NAME) or short == NAME


def test_a_terminal_keeps_the_end_of_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(consoles, "console", lambda stderr=False: terminal)
    with consoles.TerminalProgress(verbose=True) as progress:
        progress.stage("compress", 1)
        progress.weight(NAME, 3.13, 0.9)
        progress.advance()
    lines = [line for line in shown.getvalue().splitlines() if "gate_up_proj" in line]
    assert len(lines) >= 2
    assert all("0.9" in line.replace("9.00e-01", "0.9") for line in lines), "all of a weight is on one line"
