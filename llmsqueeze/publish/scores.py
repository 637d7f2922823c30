"""The scores in `evaluation.json`, before and after, as rows of a table: for the terminal, the pages and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import mapping, task_scores
from llmsqueeze.publish.numbers import (
    UNKNOWN,
    chance,
    finite,
    fixed,
    integer,
    percent,
    significant,
    with_error,
    with_error_or_dash,
)


@dataclass(frozen=True)
class Row:
    """A score of the original, of the compressed model, and their difference. `note`: the unit. `flips`: how many
    documents changed from right to wrong and back, and whether that may be chance."""

    name: str
    note: str
    before: str
    after: str
    difference: str = ""
    flips: str = ""


def perplexities(evaluation: Mapping[str, Any]) -> tuple[float, float] | None:
    """Before and after, if both are known."""
    before, after = (finite(scores.get("perplexity")) for scores in (baseline(evaluation), evaluation))
    return (before, after) if before and after else None


def baseline(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores of the original, empty if not measured."""
    return mapping(evaluation.get("baseline"))


def limited(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scores that were measured on parts of the data, the newest first."""
    parts = mapping(evaluation.get("limited"))
    return [mapping(part) for part in reversed(list(parts.values()))]


def with_text(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores of a text: of all of it, else the newest of a part; if no text was measured, those of all tasks."""
    return next((one for one in (evaluation, *limited(evaluation)) if one.get("text")), evaluation)


def best_known(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores with a perplexity before and after: of all data, else the newest of a part; of all if none has it."""
    return next((one for one in (evaluation, *limited(evaluation)) if perplexities(one)), evaluation)


def has_baseline(evaluation: Mapping[str, Any]) -> bool:
    """Whether the original was measured, on a part of the data at least."""
    return any(map(baseline, (evaluation, *limited(evaluation))))


def reading(evaluation: Mapping[str, Any]) -> str:
    """How the windows of the text are cut, if that is not as usual: ', which begin 512 tokens apart'."""
    if evaluation.get("protocol"):
        return f", protocol {evaluation['protocol']}: no BOS, the rest dropped"
    stride = finite(evaluation.get("stride"))
    return f", which begin {integer(stride)} tokens apart" if stride else ""


def score_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """A row for each score; those of a part of the data last, named so, unless there is one of all of it or newer."""
    rows = rows_of(evaluation)
    names = {row.name for row in rows}
    for part in limited(evaluation):
        limit = finite(part.get("limit"))
        new = [row for row in rows_of(part) if row.name not in names]
        names |= {row.name for row in new}
        rows += [replace(row, name=f"{row.name} (limit {UNKNOWN if limit is None else f'{limit:g}'})") for row in new]
    return rows


def rows_of(evaluation: Mapping[str, Any]) -> list[Row]:
    """A row for each score, without those of a part of the data."""
    rows = perplexity_row(evaluation)
    for key, name in (("kl_mean", "KL divergence, mean"), ("kl_p99", "KL divergence, 99th percentile")):
        if (divergence := finite(evaluation.get(key))) is not None:
            rows.append(Row(name, "nats per token, lower is better", "0", significant(divergence)))
    if (share := finite(evaluation.get("top1_changed"))) is not None:
        rows.append(Row("Changed top-1 tokens", "share of all tokens", "0 %", percent(share)))
    before = mapping(baseline(evaluation).get("tasks"))
    for task, after in mapping(evaluation.get("tasks")).items():
        rows += [task_row(task, metric, mapping(after), mapping(before.get(task))) for metric in task_scores(after)]
    return rows


def perplexity_row(evaluation: Mapping[str, Any]) -> list[Row]:
    """One row, or none if no text was scored."""
    if finite(evaluation.get("perplexity")) is None:
        return []
    both, error = perplexities(evaluation), finite(evaluation.get("nll_difference_stderr"))
    change = UNKNOWN if both is None else numbers.change(*both)
    if change.endswith("%"):
        change = with_error(change, None if error is None else 100 * error)
    before, after = (score(scores, "perplexity", numbers.perplexity) for scores in (baseline(evaluation), evaluation))
    return [Row("Perplexity", "lower is better", before, after, change)]


def task_row(task: str, metric: str, after: Mapping[str, Any], before: Mapping[str, Any]) -> Row:
    """A row for a metric of an lm-eval task. The error of the difference is that of the pairs, document by document; if
    the two were not measured together, it counts both errors as independent."""
    new, old = finite(after.get(metric)), finite(before.get(metric))
    if new is None or old is None:
        difference = UNKNOWN
    elif finite(after.get(f"{metric}_difference")) is not None:
        difference = task_score(after, f"{metric}_difference", sign=True)
    else:
        errors = [finite(scores.get(f"{metric}_stderr")) for scores in (before, after)]
        measured = [error for error in errors if error is not None]
        both = sum(error**2 for error in measured) ** 0.5 if len(measured) == 2 else None
        difference = with_error_or_dash(fixed(new - old, 4, sign=True), both)
    return Row(
        f"{task} {metric}", "", task_score(before, metric), task_score(after, metric), difference, flips(after, metric)
    )


def task_score(scores: Mapping[str, Any], key: str, sign: bool = False) -> str:
    """The number of a task under `key` with its standard error; a dash if lm-eval gives none."""
    return with_error_or_dash(fixed(finite(scores.get(key)), 4, sign), finite(scores.get(f"{key}_stderr")))


def flips(scores: Mapping[str, Any], metric: str) -> str:
    """'3 lost, 1 won, p 0.63': documents that changed from right to wrong and back, and the p of McNemar's exact test;
    empty if that was not measured."""
    keys = ("right_to_wrong", "wrong_to_right", "mcnemar_p")
    lost, won, p = (finite(scores.get(f"{metric}_{key}")) for key in keys)
    return "" if p is None else f"{integer(lost)} lost, {integer(won)} won, {chance(p)}"


def score(scores: Mapping[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    """The number under `key` with its standard error."""
    return with_error(write(finite(scores.get(key))), finite(scores.get(f"{key}_stderr")))


def made(model: Mapping[str, Any]) -> str:
    """How a model was compressed: 'gptq, 3 bits'; of the original, or of what says no more, its kind."""
    method, bits = model.get("method"), finite(model.get("bits"))
    if not method:
        return str(model.get("kind"))
    return str(method) if bits is None else f"{method}, {bits:g} bits"


def full_name(model: Mapping[str, Any]) -> str:
    """'gptq, 3 bits: demo-3bit': how a model was compressed and its name; its name alone if the former is not known."""
    name = str(model.get("model")).rstrip("/")
    return f"{made(model)}: {name}" if model.get("method") else name


def made_and_stored(model: Mapping[str, Any]) -> str:
    """The same, and the format: 'gptq, 3 bits, compressed-tensors'."""
    how, kind = made(model), str(model.get("kind"))
    return how if kind == model.get("method") or kind == how else f"{how}, {kind}"
