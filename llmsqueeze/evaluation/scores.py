"""The scores of a model beside those of its baseline, and `evaluation.json`, which keeps them in a folder."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmsqueeze.files import EVALUATION, SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats.public import shown


@dataclass(frozen=True)
class Scores:
    """The scores of one model; None for a score that was not measured. The field names are those of the JSON file.

    perplexity, perplexity_stderr: exp of the mean loss per token, and its standard error. tokens: predicted tokens.
    kl_mean, kl_p99: mean and 99th percentile over the tokens of KL(baseline || model), in nats.
    top1_changed: share of the tokens, 0 to 1, for which the most likely next token is not that of the baseline.
    tasks: lm-eval task -> `<metric>` or `<metric>_stderr` -> value. computed_in: the dtype of the computation.
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

    text: source of the text. window: tokens in a window of it. nll_difference, nll_difference_stderr: mean over the
    tokens of the model's loss minus the baseline's, in nats, and its standard error.
    """

    scores: Scores
    baseline: Scores | None = None
    text: str | None = None
    window: int | None = None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of `evaluation.json`: the model's scores at the top level, the baseline's under `baseline`."""
        return {
            **asdict(self.scores),
            "text": self.text,
            "window": self.window,
            "nll_difference": self.nll_difference,
            "nll_difference_stderr": self.nll_difference_stderr,
            "baseline": asdict(self.baseline) if self.baseline else None,
        }


def is_ours(folder: Path) -> bool:
    """True if llmsqueeze wrote the folder and may write into it."""
    return (folder / SIDECAR).exists() and os.access(folder, os.W_OK)


def save_scores(model: str, result: dict[str, Any]) -> None:
    """Writes `result` (`Evaluation.as_dict`) into `model` if that is a folder of ours. The model card reads it there.

    Scores that `result` does not have stay as they are in the file. Local paths become their last component.
    """
    folder = Path(model)
    if not is_ours(folder):
        return
    before = read_json_if_there(folder / EVALUATION)
    after = _merged(before, result | {"model": shown(model)})
    if result["baseline"]:
        baseline = result["baseline"] | {"model": shown(result["baseline"]["model"])}
        after["baseline"] = _merged(before.get("baseline") or {}, baseline)
    write_json(folder / EVALUATION, after)


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """`after`; a score that it does not have comes from `before`."""
    measured = {key: value for key, value in after.items() if value is not None and key != "tasks"}
    if after.get("perplexity") is None:
        measured = {key: value for key, value in measured.items() if key not in ("tokens", "baseline")}
    return after | before | measured | {"tasks": before.get("tasks", {}) | after["tasks"]}
