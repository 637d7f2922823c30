"""The scores of a model card: before and after, beside other models, and as metadata that the Hub reads.

From `evaluation.json` (`llmsqueeze eval`) and `comparison.json` (`llmsqueeze compare`); what they lack is left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsqueeze.files import COMPARISON, EVALUATION, FRONTIER, read_json_if_there
from llmsqueeze.formats.public import is_hub_id, is_number, number, shown, slug, table, with_error

# key in the JSON, how people read it, the metric's type in the Hub's metadata
MEASURES = (
    ("perplexity", "Perplexity", "perplexity"),
    ("kl_mean", "KL divergence, mean", "kl_divergence"),
    ("kl_p99", "KL, 99th percentile", "kl_divergence_p99"),
    ("top1_changed", "Changed top-1 tokens", "top1_changed"),
)
METRIC_TYPES = {"acc": "accuracy"}
DERIVED = ("_stderr", "_difference")  # beside a task's metric, under its name
# what the Hub takes for the type of a data set
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
UNITS = (
    "Lower is better for perplexity and for the KL divergence from the original's predictions (nats per token). "
    "± is one standard error."
)


def scores(directory: Path, original: str, name: str) -> str:
    """The table of scores before and after, or the command that measures what is not known."""
    evaluation = read_json_if_there(directory / EVALUATION)
    command = f"```\n{shlex.join(['llmsqueeze', 'eval', name, '--baseline', str(shown(original))])}\n```"
    rows = _before_and_after(evaluation)
    if not rows:
        return f"Not measured yet. This command measures them, before and after:\n\n{command}"
    before = evaluation.get("baseline") or {}
    text = f"{table(('', 'Original', 'This model'), rows)}\n\n"
    if evaluation.get("text"):
        count, other = evaluation.get("tokens"), before.get("tokens")
        tokens = f", {count:,} tokens" if count else ""
        tokens += f" ({other:,} for the original)" if other and other != count else ""
        text += f"Text: {shown(evaluation['text'])}{tokens}. "
    text += UNITS
    return text if before else f"{text}\n\nThe original was not measured; this command does:\n\n{command}"


def comparison(directory: Path) -> list[str]:
    """Sections with the table of all compared models, this one in bold, and the picture; none without either."""
    measured = read_json_if_there(directory / COMPARISON)
    picture = f"![Size and quality of the compared models]({FRONTIER})" if (directory / FRONTIER).is_file() else ""
    models = _models(measured)
    if not models:
        return ["## Compared", picture] if picture else []
    header, *rows = zip(*_columns(models), strict=True)
    told = (
        [f"Text: {shown(str(measured['text']))}, {measured.get('tokens') or 0:,} tokens."]
        if measured.get("text")
        else []
    )
    told.append(UNITS)
    if any(row.get("on_frontier") for row in models):
        told.append("* marks the frontier: no other row is at once smaller and better.")
    return ["## Compared", table(header, rows), " ".join(told), *([picture] if picture else [])]


def measured_on(directory: Path) -> list[str]:
    """The texts and tasks that the scores stand on."""
    evaluation, beside = read_json_if_there(directory / EVALUATION), read_json_if_there(directory / COMPARISON)
    found: list[str] = []
    for scored, text in ((evaluation, evaluation.get("text")), (_this(beside), beside.get("text"))):
        found += [str(shown(text))] if text and is_number(scored.get("perplexity")) else []
        found += list(scored.get("tasks") or {})
    return list(dict.fromkeys(found))


def model_index(directory: Path, name: str) -> list[dict[str, Any]]:
    """The scores in the Hub's own format, `model-index`; empty when there are none."""
    evaluation, beside = read_json_if_there(directory / EVALUATION), read_json_if_there(directory / COMPARISON)
    found: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for scored, text in ((evaluation, evaluation.get("text")), (_this(beside), beside.get("text"))):
        for dataset, metric in _metrics(scored, str(shown(text or "text without a name"))):
            # measured by both: the evaluation, which came first here, is kept
            found.setdefault(dataset["name"], (dataset, {}))[1].setdefault(metric["type"], metric)
    task = {"type": "text-generation", "name": "Text Generation"}
    results = [{"task": dict(task), "dataset": set_, "metrics": list(of.values())} for set_, of in found.values()]
    return [{"name": name, "results": results}] if results else []


def _metrics(scored: dict[str, Any], text: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Data set and metric of every score of a model."""
    for key, label, kind in MEASURES:
        if is_number(scored.get(key)):
            yield _dataset(text), {"type": kind, "value": scored[key], "name": label}
    for task, metrics in (scored.get("tasks") or {}).items():
        dataset = {"name": task, "type": task if DATASET_TYPE.fullmatch(task) else slug(task)}
        for metric, value in _of_task(metrics):
            yield dataset, {"type": METRIC_TYPES.get(metric, metric), "value": value, "name": metric}


def _dataset(text: str) -> dict[str, Any]:
    """A text as a data set of the Hub; one from there is called 'owner/name config split'."""
    name, *rest = text.split(" ")
    if is_hub_id(name) and DATASET_TYPE.fullmatch(name) and len(rest) in (1, 2):
        return {"name": text, "type": name, **dict(zip(("config", "split")[-len(rest) :], rest, strict=True))}
    return {"name": text, "type": slug(text) or "text"}


def _before_and_after(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, before, after; what was not measured of this model has no row."""
    before = evaluation.get("baseline") or {}
    rows = [
        (label, _score(before, key), _score(evaluation, key))
        for key, label, _ in MEASURES
        if is_number(evaluation.get(key))
    ]
    for task, metrics in (evaluation.get("tasks") or {}).items():
        old = (before.get("tasks") or {}).get(task) or {}
        rows += [(f"{task} {metric}", _score(old, metric), _score(metrics, metric)) for metric, _ in _of_task(metrics)]
    return rows


def _columns(models: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table of compared models by columns, the header first; a column that nobody has a number in is left out."""
    cells: list[tuple[str, list[str]]] = [
        ("Bytes", [f"{row['nbytes']:,}" if is_number(row.get("nbytes")) else "–" for row in models]),
        ("Bits per weight", [number(row.get("bits_per_weight")) for row in models]),
    ]
    cells += [(label, [_score(row, key) for row in models]) for key, label, _ in MEASURES[:3]]
    changed = [row.get("top1_changed") for row in models]
    cells.append(("Changed top-1", [f"{100 * v:.1f} %" if v is not None and is_number(v) else "–" for v in changed]))
    tasks = dict.fromkeys(
        (t, m) for row in models for t, of in (row.get("tasks") or {}).items() for m, _ in _of_task(of)
    )
    for task, metric in tasks:
        cells.append((f"{task} {metric}", [_score((row.get("tasks") or {}).get(task) or {}, metric) for row in models]))
    bold = [bool(row.get("this")) for row in models]
    yield "", *(_bold(_label(row), mark) for row, mark in zip(models, bold, strict=True))
    for header, column in cells:
        if set(column) != {"–"}:
            yield header, *(_bold(cell, mark) for cell, mark in zip(column, bold, strict=True))


def _label(row: dict[str, Any]) -> str:
    kind = f" ({shown(str(row['kind']))})" if row.get("kind") else ""
    return f"{shown(str(row.get('model')))}{kind}{' *' if row.get('on_frontier') else ''}"


def _bold(cell: str, wanted: bool) -> str:
    return f"**{cell}**" if wanted else cell


def _models(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in measured.get("models") or [] if isinstance(row, dict)]


def _this(measured: dict[str, Any]) -> dict[str, Any]:
    """The compared models' row of the folder that the comparison lies in."""
    return next((row for row in _models(measured) if row.get("this")), {})


def _score(scored: dict[str, Any], key: str) -> str:
    return with_error(scored.get(key), scored.get(f"{key}_stderr"))


def _of_task(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """A task's metrics with numbers, without what stands beside them."""
    return [(key, value) for key, value in metrics.items() if is_number(value) and not key.endswith(DERIVED)]
