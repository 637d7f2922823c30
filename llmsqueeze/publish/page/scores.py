"""The scores of a folder, before and after, as `evaluation.json` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsqueeze.publish.page import words
from llmsqueeze.publish.page.folder import Folder
from llmsqueeze.publish.page.words import fixed, mapping, number, plus_minus, significant


def baseline(folder: Folder) -> Mapping[str, Any]:
    """The original's scores; empty where it was not measured."""
    return mapping(folder.evaluation.get("baseline"))


def perplexities(folder: Folder) -> tuple[float, float] | None:
    """Before and after, where both are known."""
    before, after = (number(values.get("perplexity")) for values in (baseline(folder), folder.evaluation))
    return (before, after) if before and after else None


def score_rows(folder: Folder) -> list[dict[str, str]]:
    """Every measured score: before, after, difference."""
    after, before = folder.evaluation, baseline(folder)
    rows = perplexity_row(folder)
    for key, name in (("kl_mean", "KL divergence, mean"), ("kl_p99", "KL divergence, 99th percentile")):
        if (score := number(after.get(key))) is not None:
            said = {"before": "0", "after": significant(score), "difference": ""}
            rows.append({"name": name, "note": "nats per token, lower is better", **said})
    if (share := number(after.get("top1_changed"))) is not None:
        said = {"before": "0 %", "after": words.percent(share), "difference": ""}
        rows.append({"name": "Likeliest next token changed", "note": "share of all tokens", **said})
    old = mapping(before.get("tasks"))
    for task, scores in mapping(after.get("tasks")).items():
        rows += [task_row(task, metric, scores, mapping(old.get(task))) for metric in words.metrics(scores)]
    return rows


def perplexity_row(folder: Folder) -> list[dict[str, str]]:
    """One row, or none where no text was scored."""
    if number(folder.evaluation.get("perplexity")) is None:
        return []
    pair, spread = perplexities(folder), number(folder.evaluation.get("nll_difference_stderr"))
    change = words.UNKNOWN if pair is None else words.change(*pair)
    if change.endswith("%"):
        change = plus_minus(change, None if spread is None else 100 * spread, 2)
    said = {
        "before": with_error(baseline(folder), "perplexity", words.perplexity),
        "after": with_error(folder.evaluation, "perplexity", words.perplexity),
    }
    return [{"name": "Perplexity", "note": "lower is better", **said, "difference": change}]


def task_row(task: str, metric: str, after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    score, old = number(after.get(metric)), number(before.get(metric))
    spreads = [number(values.get(f"{metric}_stderr")) for values in (before, after)]
    known = [spread for spread in spreads if spread is not None]
    both = sum(spread**2 for spread in known) ** 0.5 if len(known) == 2 else None
    difference = words.UNKNOWN
    if score is not None and old is not None:
        difference = plus_minus(fixed(score - old, 4, sign=True), both, 4)
    said = {"before": with_error(before, metric), "after": with_error(after, metric), "difference": difference}
    return {"name": words.public(task), "note": metric, **said}


def with_error(values: Mapping[str, Any], key: str, write: Any = lambda value: fixed(value, 4)) -> str:
    text = str(write(number(values.get(key))))
    return plus_minus(text, number(values.get(f"{key}_stderr")), len(text.partition(".")[2]))
