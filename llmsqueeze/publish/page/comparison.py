"""The page of `llmsqueeze compare`: models that were measured on the same text, and the best of them for their size.

`llmsqueeze report` shows the same tables if its folder was compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import write_text
from llmsqueeze.formats.public import shown
from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import mapping, task_scores
from llmsqueeze.publish.numbers import UNKNOWN, finite, fixed, percent, significant, with_error
from llmsqueeze.publish.page.pictures import quality_picture
from llmsqueeze.publish.page.render import render
from llmsqueeze.publish.page.verdict import verdict
from llmsqueeze.publish.plots.figure import available
from llmsqueeze.publish.scores import flips, full_name, reading, task_score

NUMBERS = (
    *("nbytes", "bits_per_weight", "perplexity", "perplexity_stderr", "nll_difference", "nll_difference_stderr"),
    *("kl_mean", "kl_p99", "top1_changed"),
)
BEYOND = 2.0  # standard errors; a larger difference is bold


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The HTML for the contents of `comparison.json`. Raises CheckpointError if there are no models in it."""
    view = view_of(comparison)
    return render("comparison.html", title=f"{view['original']} compared", pictures=available(), view=view)


def view_of(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The values for the templates."""
    public = shown(dict(comparison))
    models = public.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise CheckpointError("the comparison has no models; run `llmsqueeze compare` again to write it")
    rows = [model_row(i, model) for i, model in enumerate(models, 1)]
    return {
        "original": rows[0]["name"],
        "models": rows,
        "tasks": task_table(models),
        "text": public.get("text"),
        "window": public.get("window"),
        "reading": reading(public),
        "limit": finite(public.get("limit")),
        "tokens": public.get("tokens"),
        "plot": quality_picture(models),
        "verdict": verdict(models),
    }


def model_row(place: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the numbers to sort by, and their `texts`."""
    row: dict[str, Any] = {key: finite(model.get(key)) for key in NUMBERS}
    texts = {
        "loss": with_error(fixed(row["nll_difference"], 4, sign=True), row["nll_difference_stderr"]),
        "kl_mean": significant(row["kl_mean"]),
        "kl_p99": significant(row["kl_p99"]),
        "top1_changed": percent(row["top1_changed"]),
    }
    original = model.get("kind") == "original"
    if original:  # no difference from itself
        texts = dict.fromkeys(texts, UNKNOWN)
    texts["perplexity"] = with_error(numbers.perplexity(row["perplexity"]), row["perplexity_stderr"])
    return row | {
        "place": place,
        "name": full_name(model),
        "kind": "" if model.get("kind") == model.get("method") else str(model.get("kind")),
        "role": "original" if original else "this" if model.get("this") is True else "other",
        "on_frontier": model.get("on_frontier") is True,
        "texts": texts,
    }


def task_table(models: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A column for each metric of each task, a row for each model; None without tasks."""
    tasks = [mapping(model.get("tasks")) for model in models]
    columns = list(dict.fromkeys((task, key) for one in tasks for task in one for key in task_scores(one[task])))
    rows = [
        (full_name(model), place, [task_cell(mapping(one.get(task)), key, place) for task, key in columns])
        for place, (model, one) in enumerate(zip(models, tasks, strict=True), 1)
    ]
    return {"heads": columns, "rows": rows} if columns else None


def task_cell(values: Mapping[str, Any], metric: str, place: int) -> dict[str, Any]:
    """A score, its difference from the first model's, and the documents that changed."""
    score, difference, error = (finite(values.get(metric + end)) for end in ("", "_difference", "_difference_stderr"))
    cell = {"score": score, "text": task_score(values, metric), "difference": "", "flips": "", "beyond": False}
    if place > 1 and difference is not None:
        cell["difference"] = task_score(values, f"{metric}_difference", sign=True)
        cell["flips"] = flips(values, metric)
        cell["beyond"] = bool(error and abs(difference) > BEYOND * error)
    return cell


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """The comparison as one HTML file. Raises OutputError."""
    write_text(path, comparison_page(comparison))
