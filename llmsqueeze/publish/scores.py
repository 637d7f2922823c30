"""The scores in `evaluation.json`, before and after, as rows of a table: for the terminal, the pages and the card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import mapping, task_scores
from llmsqueeze.publish.numbers import UNKNOWN, finite, fixed, percent, significant, with_error


@dataclass(frozen=True)
class Row:
    """A score of the original, of the compressed model, and their difference. `note`: the unit."""

    name: str
    note: str
    before: str
    after: str
    difference: str = ""


def perplexities(evaluation: Mapping[str, Any]) -> tuple[float, float] | None:
    """Before and after, if both are known."""
    before, after = (finite(scores.get("perplexity")) for scores in (baseline(evaluation), evaluation))
    return (before, after) if before and after else None


def baseline(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores of the original, empty if not measured."""
    return mapping(evaluation.get("baseline"))


def score_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """A row for each score."""
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
    """A row for a metric of an lm-eval task. The error of the difference counts both errors as independent."""
    new, old = finite(after.get(metric)), finite(before.get(metric))
    errors = [finite(scores.get(f"{metric}_stderr")) for scores in (before, after)]
    measured = [error for error in errors if error is not None]
    both = sum(error**2 for error in measured) ** 0.5 if len(measured) == 2 else None
    difference = UNKNOWN if new is None or old is None else with_error(fixed(new - old, 4, sign=True), both)
    return Row(f"{task} {metric}", "", score(before, metric), score(after, metric), difference)


def score(
    scores: Mapping[str, Any], key: str, write: Callable[[float | None], str] = lambda value: fixed(value, 4)
) -> str:
    """The number under `key` with its standard error."""
    return with_error(write(finite(scores.get(key))), finite(scores.get(f"{key}_stderr")))
