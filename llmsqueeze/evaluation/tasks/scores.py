"""The scores of a task: its metrics, and what each document contributes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskScores:
    """A task's `<metric>` and `<metric>_stderr`, the latter only if lm-eval gives it; metric -> document -> its value,
    if documents have one; what was asked for, by lm-eval's names."""

    metrics: dict[str, float]
    documents: dict[str, dict[int, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def metrics_of(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` keys as plain names. Any other filter becomes a suffix."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, (int, float)) and not isinstance(value, bool):
            base, stderr = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
            metrics[f"{base}{'' if filtered == 'none' else '_' + filtered}{stderr}"] = float(value)
    return metrics


def group_documents(
    group: str, members: Mapping[str, Sequence[str]], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[int, float]]:
    """`documents_of` all tasks of a group, numbered through. members: group -> its tasks and groups."""
    values: dict[str, dict[int, float]] = {}
    for name in members.get(group, ()):
        inner = group_documents(name, members, answers) if name in members else documents_of(answers.get(name, []))
        for metric, documents in inner.items():
            known = values.setdefault(metric, {})
            known |= dict(enumerate(documents.values(), len(known)))
    return values


def documents_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """metric -> document -> value, from lm-eval's samples. A sum over a document's words has none."""
    values: dict[str, dict[int, float]] = {}
    for answer in answers:
        suffix = "" if answer.get("filter", "none") == "none" else f"_{answer['filter']}"
        for metric in answer.get("metrics", []):
            if isinstance(answer.get(metric), (int, float)):
                values.setdefault(f"{metric}{suffix}", {})[int(answer["doc_id"])] = float(answer[metric])
    return values
