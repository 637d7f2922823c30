"""The scores in a model card: before and after, beside other models, and as metadata for the Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmsqueeze.files import FRONTIER
from llmsqueeze.formats.public import is_hub_id
from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import Folder, mapping, task_scores
from llmsqueeze.publish.numbers import UNKNOWN, finite, fixed, integer, percent, significant
from llmsqueeze.publish.scores import (
    baseline,
    has_baseline,
    limited,
    made_and_stored,
    reading,
    score,
    score_rows,
    task_score,
    with_text,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# key in the JSON, name for the reader, type of the metric in the Hub's metadata
MEASURES = (
    ("perplexity", "Perplexity", "perplexity"),
    ("kl_mean", "KL divergence, mean", "kl_divergence"),
    ("kl_p99", "KL, 99th percentile", "kl_divergence_p99"),
    ("top1_changed", "Changed top-1 tokens", "top1_changed"),
)
METRIC_TYPES = {"acc": "accuracy"}
# the names that the Hub accepts as the type of a data set
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")
UNITS = (
    "Lower is better for perplexity and for the KL divergence from the original's predictions (nats per token). "
    "± is one standard error."
)
FLIPS = (
    " Changed answers: from right to wrong (lost) and from wrong to right (won), with the p of McNemar's exact test."
)
LIMITED = " A limit is the number of windows or documents that were measured, or the share of them."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first column is aligned left, the others right."""
    lines = [header, (":--", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def scores(folder: Folder, name: str) -> str:
    """The scores before and after, or the command that measures them. `name`: of the folder or of its repository."""
    command = f"```\n{shlex.join(['llmsqueeze', 'eval', name, '--baseline', str(folder.record['model'])])}\n```"
    rows = score_rows(folder.evaluation)
    if not rows:
        return f"Not measured yet. This command measures the original and the result:\n\n{command}"
    cells = [[row.name, row.before, row.after, row.difference, row.flips] for row in rows]
    header = ["", "Original", "This model", "Difference", "Changed answers"]
    if not any(row.flips for row in rows):
        header, cells = header[:-1], [cell[:-1] for cell in cells]
    notes = f"{_text(folder)}{UNITS}{FLIPS if len(header) == 5 else ''}{LIMITED if limited(folder.evaluation) else ''}"
    text = f"{table(header, cells)}\n\n{notes}"
    return (
        text
        if has_baseline(folder.evaluation)
        else f"{text}\n\nThe original was not measured; this command does:\n\n{command}"
    )


def _text(folder: Folder) -> str:
    """The scored text and its length; empty if no text was scored."""
    evaluation = with_text(folder.evaluation)
    if not evaluation.get("text"):
        return ""
    count, other = finite(evaluation.get("tokens")), finite(baseline(evaluation).get("tokens"))
    tokens = f", {integer(count)} tokens" if count else ""
    tokens += f" ({integer(other)} for the original)" if other and other != count else ""
    windows = f" in windows of {integer(evaluation.get('window'))}{reading(evaluation)}" if reading(evaluation) else ""
    return f"Text: {evaluation['text']}{tokens}{windows}. "


def comparison(folder: Folder) -> list[str]:
    """Sections with the table of all compared models, this one in bold, and the picture; empty without both."""
    has_picture = (folder.checkpoint.path / FRONTIER).is_file()
    picture = [f"![Size and quality of the compared models]({FRONTIER})"] if has_picture else []
    models = folder.compared
    if not models:
        return ["## Compared", *picture] if picture else []
    header, *rows = zip(*_columns(models), strict=True)
    text = folder.comparison.get("text")
    notes = (
        [f"Text: {text}, {integer(folder.comparison.get('tokens'))} tokens{reading(folder.comparison)}."]
        if text
        else []
    )
    if (limit := finite(folder.comparison.get("limit"))) is not None:
        notes.append(f"Measured on a part of the data, limit {limit:g}.{LIMITED}")
    notes.append(UNITS)
    if any(model.get("on_frontier") for model in models):
        notes.append("* marks the frontier: no other row is both smaller and better.")
    return ["## Compared", table(header, rows), " ".join(notes), *picture]


def measured_on(folder: Folder) -> list[str]:
    """The texts and the tasks of the scores."""
    names: list[str] = []
    for model, text in _measurements(folder):
        names += [str(text)] if text and finite(model.get("perplexity")) is not None else []
        names += [bare(task) for task in mapping(model.get("tasks"))]
    return list(dict.fromkeys(names))


def eval_results(folder: Folder) -> list[EvalResult]:
    """The scores for the Hub. A score that both `eval` and `compare` measured is that of `eval`."""
    results: dict[tuple[str, str], EvalResult] = {}
    for model, text in _measurements(folder):
        for result in _results(model, str(text or "text without a name")):
            results.setdefault((result.dataset_name, result.metric_type), result)
    return list(results.values())


def _measurements(folder: Folder) -> list[tuple[Mapping[str, Any], Any]]:
    """The scores of this model on all of the data, and their text: of `evaluation.json`, and of `comparison.json`."""
    whole = finite(folder.comparison.get("limit")) is None
    this = next((model for model in folder.compared if whole and model.get("this")), {})
    return [(folder.evaluation, folder.evaluation.get("text")), (this, folder.comparison.get("text"))]


def _results(model: Mapping[str, Any], text: str) -> Iterator[EvalResult]:
    """Each score of a model."""
    from huggingface_hub import EvalResult

    task: dict[str, Any] = {"task_type": "text-generation", "task_name": "Text Generation"}
    for key, name, kind in MEASURES:
        if finite(model.get(key)) is not None:
            yield EvalResult(**task, **_dataset(text), metric_type=kind, metric_value=model[key], metric_name=name)
    for one, values in mapping(model.get("tasks")).items():
        kind = bare(one) if DATASET_TYPE.fullmatch(bare(one)) else _slug(one)
        dataset: dict[str, Any] = {"dataset_name": one, "dataset_type": kind}
        for name, value in task_scores(values).items():
            metric = METRIC_TYPES.get(name, name)
            yield EvalResult(**task, **dataset, metric_type=metric, metric_value=value, metric_name=name)


def bare(task: str) -> str:
    """'arc_easy (5-shot)' -> 'arc_easy'."""
    return task.partition(" (")[0]


def _dataset(text: str) -> dict[str, Any]:
    """A text as a data set of the Hub: 'owner/name config split' is one that is there."""
    name, *rest = text.split(" ")
    if is_hub_id(name) and DATASET_TYPE.fullmatch(name) and len(rest) in (1, 2):
        keys = ("dataset_config", "dataset_split")[-len(rest) :]
        return {"dataset_name": text, "dataset_type": name, **dict(zip(keys, rest, strict=True))}
    return {"dataset_name": text, "dataset_type": _slug(text) or "text"}


def _slug(text: str) -> str:
    """'WikiText 2, test' -> 'wikitext-2-test'."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _columns(models: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table of compared models, column by column, without the columns that have no number."""
    columns = {
        "Bytes": [integer(model.get("nbytes")) for model in models],
        "Bits per weight": [fixed(finite(model.get("bits_per_weight")), 2) for model in models],
        "Perplexity": [score(model, "perplexity", numbers.perplexity) for model in models],
        "KL divergence, mean": [significant(finite(model.get("kl_mean"))) for model in models],
        "KL, 99th percentile": [significant(finite(model.get("kl_p99"))) for model in models],
        "Changed top-1": [percent(finite(model.get("top1_changed"))) for model in models],
    }
    tasks = [mapping(model.get("tasks")) for model in models]
    for task, metric in dict.fromkeys((t, m) for one in tasks for t in one for m in task_scores(one[t])):
        columns[f"{task} {metric}"] = [task_score(mapping(one.get(task)), metric) for one in tasks]
    bold = [bool(model.get("this")) for model in models]
    yield "", *map(_bold, map(_name, models), bold)
    for header, column in columns.items():
        if set(column) != {UNKNOWN}:
            yield header, *map(_bold, column, bold)


def _name(model: Mapping[str, Any]) -> str:
    kind = f" ({made_and_stored(model)})" if model.get("kind") else ""
    return f"{model.get('model')}{kind}{' *' if model.get('on_frontier') else ''}"


def _bold(cell: str, bold: bool) -> str:
    return f"**{cell}**" if bold else cell
