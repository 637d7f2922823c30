"""Scores for people: changed answers, scores of a part of the data, how a model was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hub_folder import COMPARISON, EVALUATION, front_matter, write_json

from llmsqueeze.publish.card import model_card
from llmsqueeze.publish.numbers import chance
from llmsqueeze.publish.page.comparison import comparison_page
from llmsqueeze.publish.report import write_report
from llmsqueeze.publish.scores import flips, made, made_and_stored, score_rows

PAIRED = {"acc": 0.7, "acc_stderr": 0.02, "acc_difference": -0.01, "acc_difference_stderr": 0.003}
CHANGED = {"acc_right_to_wrong": 12, "acc_wrong_to_right": 2, "acc_mcnemar_p": 0.01294}
BEFORE = {"acc": 0.71, "acc_stderr": 0.02}


def evaluation(after: dict[str, Any], before: dict[str, Any], name: str = "arc") -> dict[str, Any]:
    return {"tasks": {name: after}, "baseline": {"tasks": {name: before}}}


def page_of(folder: Path) -> str:
    """The text of the report."""
    html = Path(write_report(folder)["out"]).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_the_error_of_a_difference_is_that_of_the_pairs() -> None:
    (row,) = score_rows(evaluation(PAIRED | CHANGED, BEFORE))
    assert (row.name, row.difference, row.flips) == ("arc acc", "−0.0100 ± 0.0030", "12 lost, 2 won, p 0.013")
    (apart,) = score_rows(evaluation({"acc": 0.7, "acc_stderr": 0.02}, BEFORE))
    assert (apart.difference, apart.flips) == ("−0.0100 ± 0.0283", "")


def test_an_error_that_nobody_gave_is_a_dash() -> None:
    (row,) = score_rows(evaluation({"acc": 0.7, "acc_difference": -0.01}, {"acc": 0.71}))
    assert (row.before, row.after, row.difference) == ("0.7100 ± –", "0.7000 ± –", "−0.0100 ± –")


def test_small_chances() -> None:
    assert [chance(p) for p in (1.0, 0.0625, 0.00101, 0.0009, 0.0)] == [
        "p 1.0",
        "p 0.062",
        "p 0.0010",
        *2 * ["p < 0.001"],
    ]
    assert flips({"acc": 1.0}, "acc") == ""


def test_changed_answers_are_in_card_and_report(folder: Path) -> None:
    write_json(folder / "evaluation.json", evaluation(PAIRED | CHANGED, BEFORE, "arc (5-shot)"))
    card = model_card(folder)
    assert (
        "| arc (5-shot) acc | 0.7100 ± 0.0200 | 0.7000 ± 0.0200 | −0.0100 ± 0.0030 | 12 lost, 2 won, p 0.013 |" in card
    )
    assert "McNemar's exact test" in card
    assert "Measured only on arc." in card
    results = front_matter(card)["model-index"][0]["results"]
    assert [(one["dataset"]["name"], one["dataset"]["type"]) for one in results] == [("arc (5-shot)", "arc")]
    page = page_of(folder)
    assert "−0.0100 ± 0.0030 12 lost, 2 won, p 0.013" in page
    assert "McNemar" in page
    write_json(folder / "evaluation.json", EVALUATION)
    assert "Changed answers" not in model_card(folder)
    assert "McNemar" not in page_of(folder)


def test_scores_of_a_part_are_shown_as_such(folder: Path) -> None:
    part = EVALUATION | {"perplexity": 9.5, "limit": 10, "tasks": EVALUATION["tasks"] | {"arc": BEFORE}}
    write_json(folder / "evaluation.json", {"limited": {"10": part}})
    card, page = model_card(folder), page_of(folder)
    assert "| Perplexity (limit 10) | 6.244 | 9.500 | +52.15 % |" in card
    assert "| piqa acc (limit 10) |" in card
    assert "A limit is the number of windows or documents" in card
    assert "Its quality was not measured but on a part of the data." in card
    assert "llmsqueeze eval" not in card, "the original was measured"
    assert "model-index" not in front_matter(card), "not for tables of the Hub"
    assert "Perplexity (limit 10) lower is better 6.244 9.500" in page
    assert "perplexity +52.15 % (limit 10)." in page
    assert "was 6.244 (limit 10)" in page
    assert "A limit is the number" in page
    assert "12,345 tokens" in page
    write_json(folder / "evaluation.json", EVALUATION | {"limited": {"10": part}})
    names = [row.name for row in score_rows(EVALUATION | {"limited": {"10": part}})]
    assert "Perplexity" in names
    assert "piqa acc" in names
    assert [name for name in names if "limit" in name] == ["arc acc (limit 10)"], "only what was not measured whole"
    assert "9.500" not in model_card(folder)
    assert "(limit 10)." not in page_of(folder)


def test_of_several_parts_the_newest_is_shown() -> None:
    parts = {str(limit): {"limit": limit, "tasks": {"arc": {"acc": limit}}} for limit in (0.5, 0.25)}
    parts["0.5"]["tasks"]["piqa"] = {"acc": 0.75}
    rows = score_rows({"limited": parts})
    assert [(row.name, row.after) for row in rows] == [
        ("arc acc (limit 0.25)", "0.2500 ± –"),
        ("piqa acc (limit 0.5)", "0.7500 ± –"),
    ]


def test_a_comparison_of_a_part_is_shown_as_such(folder: Path) -> None:
    write_json(folder / "comparison.json", COMPARISON | {"limit": 0.25})
    card = model_card(folder)
    assert "Measured on a part of the data, limit 0.25." in card
    assert "model-index" not in front_matter(card)
    assert "Measured on a part of the data only (limit 0.25)." in page_of(folder)
    assert "part of the data" not in comparison_page(COMPARISON)


def test_how_the_text_was_read_is_said(folder: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION | {"window": 2048, "stride": 512})
    read = "12,345 tokens in windows of 2,048, which begin 512 tokens apart."
    assert read in model_card(folder)
    assert read in page_of(folder)
    write_json(folder / "comparison.json", COMPARISON | {"protocol": "papers"})
    assert "67,890 tokens, protocol papers: no BOS, the rest dropped." in model_card(folder)
    assert "in windows of 2,048, protocol papers: no BOS, the rest dropped." in page_of(folder)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"kind": "original"}, "original"),
        ({"kind": "llmsqueeze", "method": "coded", "bits": 2.6}, "coded, 2.6 bits, llmsqueeze"),
        ({"kind": "compressed-tensors", "method": "gptq", "bits": 3.0}, "gptq, 3 bits, compressed-tensors"),
        ({"kind": "gptq", "method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"kind": "dense", "method": None, "bits": None}, "dense"),
    ],
)
def test_how_a_model_was_made(model: dict[str, Any], text: str) -> None:
    assert made_and_stored(model) == text
    assert text.startswith(made(model))


def test_changed_answers_are_on_the_page_of_a_comparison() -> None:
    original, this, *others = COMPARISON["models"]
    tasks = {"arc (5-shot)": PAIRED | CHANGED}
    models = [
        original | {"tasks": {"arc (5-shot)": BEFORE}},
        this | {"tasks": tasks, "method": "gwq", "bits": 3},
        *others,
    ]
    html = comparison_page(COMPARISON | {"models": models})
    assert "arc (5-shot) acc" in html
    assert '<span class="sub">12 lost, 2 won, p 0.013</span>' in html
    assert "gwq, 3 bits: " in html
