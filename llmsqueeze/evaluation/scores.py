"""The scores of a model beside those of its baseline, and `evaluation.json`, which keeps them in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmsqueeze.evaluation.options import Limit
from llmsqueeze.files import EVALUATION, SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats.public import shown

WINDOWS = ("text", "window", "stride", "protocol")  # what says which windows of text were measured
OF_TEXT = (
    *WINDOWS,
    *("perplexity", "perplexity_stderr", "tokens", "kl_mean", "kl_p99", "top1_changed"),
    *("nll_difference", "nll_difference_stderr"),
)


@dataclass(frozen=True)
class Scores:
    """The scores of one model; None for a score that was not measured. The field names are those of the JSON file.

    perplexity, perplexity_stderr: exp of the mean loss per token, and its standard error. tokens: predicted tokens.
    kl_mean, kl_p99: mean and 99th percentile over the tokens of KL(baseline || model), in nats.
    top1_changed: share of the tokens, 0 to 1, for which the most likely next token is not that of the baseline.
    tasks: lm-eval task, with what was asked for beside its definition, as `arc_easy (5-shot)` -> `<metric>`,
    `<metric>_stderr`, or what `paired_differences` gives beside a baseline -> value.
    computed_in: the dtype of the computation.
    """

    model: str
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    tokens: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_changed: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    computed_in: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model, and those of its baseline on the same windows and documents.

    text: source of the text. window: tokens in a window of it. stride, protocol: as `Reading` has them.
    nll_difference, nll_difference_stderr: mean over the tokens of the model's loss minus the baseline's, in nats, and
    its standard error. limit: how many windows, and documents of each task, were measured, or which share of them; None
    if all. task_settings: task -> what was asked for, by lm-eval's names.
    """

    scores: Scores
    baseline: Scores | None = None
    text: str | None = None
    window: int | None = None
    stride: int | None = None
    protocol: str | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None
    limit: Limit | None = None
    task_settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of `evaluation.json`: the model's scores at the top level, the baseline's under `baseline`."""
        return {
            **asdict(self.scores),
            **{key: value for key, value in vars(self).items() if key not in ("scores", "baseline")},
            "baseline": asdict(self.baseline) if self.baseline else None,
        }


def is_ours(folder: Path) -> bool:
    """True if llmsqueeze wrote the folder and may write into it."""
    return (folder / SIDECAR).exists() and os.access(folder, os.W_OK)


def save_scores(model: str, result: Mapping[str, Any]) -> None:
    """Writes `result` (`Evaluation.as_dict`) into `model` if that is a folder of ours. Card and report read it there.

    Scores that `result` does not have stay as they are in the file. Those of a part of the data are kept apart, under
    `limited` and their limit, the newest last. Local paths become their last component.
    """
    folder = Path(model)
    if not is_ours(folder):
        return
    before, public = read_json_if_there(folder / EVALUATION), dict(result) | {"model": shown(model)}
    if public["baseline"]:
        public["baseline"] = public["baseline"] | {"model": shown(public["baseline"]["model"])}
    if public.get("limit") is None:
        after = merged(before, public)
    else:
        parts, limit = dict(before.get("limited") or {}), str(public["limit"])
        after = before | {"limited": parts | {limit: merged(parts.pop(limit, {}), public)}}
    write_json(folder / EVALUATION, after)


def merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """`after`; a score that it does not have comes from `before`, if it was measured on the same windows of text."""
    scored = after.get("perplexity") is not None
    same = not scored or all(before.get(key) == after.get(key) for key in WINDOWS)
    new, old = after.get("baseline"), before.get("baseline") or {}
    if new and old.get("model") != new["model"]:
        old = {}
    baseline = _filled(old, new or {}, scored, same)
    return _filled(before, after, scored, same) | {"baseline": baseline if new or old else None}


def _filled(before: Mapping[str, Any], after: Mapping[str, Any], scored: bool, same: bool) -> dict[str, Any]:
    """`after`, with what it lacks from `before`. scored: whether it has a text; same: on the windows of `before`."""
    lacking = [key for key in OF_TEXT if not scored or (same and after.get(key) is None)]
    values = dict(before) | {key: value for key, value in after.items() if value is not None or key not in before}
    values |= {key: before[key] if key in lacking and key in before else after.get(key) for key in OF_TEXT}
    by_task = {key: before.get(key, {}) | after.get(key, {}) for key in ("tasks", "task_settings")}
    return values | {key: kept for key, kept in by_task.items() if kept or key == "tasks"}
