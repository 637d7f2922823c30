"""The page of `llmsqueeze compare`: several models measured on the same text, and which of them are worth their bytes.

`report` shows the same tables where its folder has been compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError, OutputError
from llmsqueeze.formats.public import shown
from llmsqueeze.publish.page import words
from llmsqueeze.publish.page.frontier import Point, plot
from llmsqueeze.publish.page.render import render
from llmsqueeze.publish.page.words import fixed, number, plus_minus, significant

NUMBERS = (
    *("nbytes", "bits_per_weight", "perplexity", "perplexity_stderr", "nll_difference", "nll_difference_stderr"),
    *("kl_mean", "kl_p99", "top1_changed"),
)
BEYOND = 2.0  # standard errors, after which a difference is printed bold


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The HTML of what `comparison.json` holds. Raises CheckpointError if it holds no models."""
    view = view_of(comparison)
    return render("comparison.html", title=f"{view['original']} compared", **view)


def view_of(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates say of a comparison."""
    public = shown(dict(comparison))
    models = public.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise CheckpointError("the comparison names no models; run `llmsqueeze compare` again to write it")
    rows = [model_row(i, model) for i, model in enumerate(models, 1)]
    points = [point for row in rows if (point := point_of(row))]
    return {
        "original": rows[0]["name"],
        "models": rows,
        "tasks": task_table(models),
        "text": public.get("text"),
        "window": public.get("window"),
        "tokens": public.get("tokens"),
        "plots": [
            (kind, made)
            for kind, made in (("wide", plot(points, 760, 400, True)), ("narrow", plot(points, 350, 330, False)))
            if made
        ],
        "frontier": [row["name"] for row in rows if row["on_frontier"] and row["role"] != "original"],
    }


def model_row(place: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's numbers as they are, for sorting, and as they are read."""
    row: dict[str, Any] = {key: number(model.get(key)) for key in NUMBERS}
    original = model.get("kind") == "original"
    loss, spread = row["nll_difference"], row["nll_difference_stderr"]
    said = {
        "perplexity": plus_minus(words.perplexity(row["perplexity"]), row["perplexity_stderr"], 3),
        "loss": words.UNKNOWN if original else plus_minus(fixed(loss, 4, sign=True), spread, 4),
        "kl_mean": words.UNKNOWN if original else significant(row["kl_mean"]),
        "kl_p99": words.UNKNOWN if original else significant(row["kl_p99"]),
        "top1_changed": words.UNKNOWN if original else words.percent(row["top1_changed"]),
    }
    return row | {
        "place": place,
        "name": model_name(model),
        "kind": str(model.get("kind")),
        "role": "original" if original else "this" if model.get("this") is True else "other",
        "on_frontier": model.get("on_frontier") is True,
        "said": said,
    }


def model_name(model: Mapping[str, Any]) -> str:
    return str(model.get("model"))


def point_of(row: Mapping[str, Any]) -> Point | None:
    """Where a model stands in the plot; None if its size or its loss is not known."""
    loss = 0.0 if row["role"] == "original" else row["nll_difference"]
    if loss is None or not row["nbytes"] or row["nbytes"] < 0:
        return None
    spread = row["nll_difference_stderr"]
    return Point(row["place"], row["name"], row["nbytes"], loss, spread, row["on_frontier"], row["role"])


def task_table(models: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A column for every task and metric, a row for every model; None where no task was run."""
    tasks = [words.mapping(model.get("tasks")) for model in models]
    columns = list(dict.fromkeys((task, key) for held in tasks for task in held for key in words.metrics(held[task])))
    rows = [
        (model_name(model), place, [task_cell(words.mapping(held.get(task)), key, place) for task, key in columns])
        for place, (model, held) in enumerate(zip(models, tasks, strict=True), 1)
    ]
    heads = [(words.public(task), words.public(key)) for task, key in columns]
    return {"heads": heads, "rows": rows} if columns else None


def task_cell(values: Mapping[str, Any], metric: str, place: int) -> dict[str, Any]:
    """A score, and how far it is from the first model's."""
    score, stderr, difference, spread = (
        number(values.get(metric + suffix)) for suffix in ("", "_stderr", "_difference", "_difference_stderr")
    )
    return {
        "score": score,
        "said": plus_minus(fixed(score, 4), stderr, 4),
        "difference": "" if place == 1 or difference is None else plus_minus(fixed(difference, 4, True), spread, 4),
        "beyond": bool(place > 1 and difference and spread and abs(difference) > BEYOND * spread),
    }


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """The comparison as one HTML file. Raises OutputError."""
    text = comparison_page(comparison)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
