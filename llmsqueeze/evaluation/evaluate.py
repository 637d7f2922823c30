"""Measuring a model: perplexity, divergence from a baseline, and lm-eval tasks, before and after in one harness.

Perplexity: exp(sum of nll / tokens) over non-overlapping windows of the whole text, BOS first where the tokenizer has
one, float32 loss. Divergence: KL(baseline || model) of the next-token distributions, per predicted token, its mean
and 99th percentile in nats. Standard errors treat windows as the independent units.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from llmsqueeze.errors import HubError, RecipeError, UnsupportedError, first_line, nearest
from llmsqueeze.files import EVALUATION, SIDECAR, read_json_if_there
from llmsqueeze.formats import load as hf
from llmsqueeze.formats.public import shown
from llmsqueeze.model.original import locate
from llmsqueeze.model.text import DEMO, Text, evaluation_text, load_tokenizer, windows
from llmsqueeze.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096
DEFAULT_WINDOW = 2048
CHUNK = 512  # tokens whose distributions exist in float32 at a time


@dataclass
class Scores:
    """One model's scores; None where nothing was measured. The JSON names are these.

    top1_changed: share of the positions at which the likeliest next token is another than the baseline's.
    """

    model: str
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    tokens: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_changed: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskScores:
    """A task's `<metric>` and `<metric>_stderr`; and metric -> document -> its value, where a document has one."""

    metrics: dict[str, float]
    documents: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass
class Evaluation:
    """A model's scores beside its baseline's, and what they were measured on."""

    scores: Scores
    baseline: Scores | None
    text: str | None
    window: int | None
    nll_difference: float | None = None
    nll_difference_stderr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.scores),
            "text": self.text,
            "window": self.window,
            "nll_difference": self.nll_difference,
            "nll_difference_stderr": self.nll_difference_stderr,
            "baseline": asdict(self.baseline) if self.baseline else None,
        }


@dataclass
class Opened:
    """A model in memory, with the name that it was given."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    text: Text | None = None,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores `model`, and `baseline` in the same way where one is given.

    `limit` bounds both the windows of text and the documents of each task; `window` is the window length in tokens,
    by default the context length, at most 2048.
    """
    progress, device = progress or Progress(), device or torch.device("cpu")
    task_objects = find_tasks(tasks, include_path)
    opened = [open_model(name, device, trust_remote_code) for name in (model, baseline) if name is not None]
    scores = [Scores(item.name) for item in opened]
    result = Evaluation(scores[0], scores[1] if baseline else None, text.source if text else None, None)
    if text is not None:
        result.window = choose_window(opened[0], window)
        rows = windows(text, opened[0].tokenizer, result.window, tail=True)[:limit]
        score_text(opened, rows, result, device, progress)
    if task_objects:
        for item, score in zip(opened, scores, strict=True):
            with progress.foreign("tasks"):
                found = run_tasks(item.model, item.tokenizer, task_objects, include_path, limit, batch_size)
                score.tasks = {name: values.metrics for name, values in found.items()}
    return result


def evaluate_rows(
    model: str,
    baseline: str,
    rows: list[Tensor],
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> Evaluation:
    """Perplexity and KL of `model` against `baseline` on token rows [1, length]."""
    opened = [open_model(name, device, trust_remote_code) for name in (model, baseline)]
    result = Evaluation(Scores(model), Scores(baseline), None, rows[0].shape[1])
    score_text(opened, rows, result, device, progress)
    return result


def open_model(
    name: str, device: torch.device, trust_remote_code: bool, load: Callable[..., PreTrainedModel] = hf.load
) -> Opened:
    """The model and its tokenizer; `load` opens it."""
    with redirect_stderr(StringIO()):  # bars of other libraries
        loaded = load(name, trust_remote_code=trust_remote_code, device_map={"": device})
    return Opened(name, loaded, load_tokenizer(locate(name), trust_remote_code))


def choose_window(opened: Opened, wanted: int | None) -> int:
    """Tokens in a window of text: as wanted, but no more than the context, and by default at most 2048."""
    context = getattr(opened.model.config, "max_position_embeddings", None) or DEFAULT_WINDOW
    return min(wanted or min(context, DEFAULT_WINDOW), context)


def score_text(
    opened: list[Opened], rows: list[Tensor], result: Evaluation, device: torch.device, progress: Progress
) -> None:
    """Fills in the scores on token rows [1, length], of `opened`'s first model beside its second, if there is one."""
    if len({item.model.config.vocab_size for item in opened}) > 1:
        raise UnsupportedError("model and baseline have vocabularies of different size, so they cannot be compared")
    nll: list[list[Tensor]] = [[] for _ in opened]  # per model, per window: [predicted tokens]
    kl: list[Tensor] = []
    changed = 0
    batches = list(_batches(rows))
    for batch in progress.over(batches, "text", len(batches)):
        logits = [_logits(item.model, batch.to(device)) for item in opened]
        labels = batch.to(device)[:, 1:]
        for i, values in enumerate(logits):
            losses = token_losses(values.flatten(0, 1), labels.flatten())
            nll[i] += losses.view(labels.shape).cpu().double().unbind()
        if len(opened) > 1:
            kl.append(divergence(logits[1].flatten(0, 1), logits[0].flatten(0, 1)).cpu())
            changed += int((logits[0].argmax(-1) != logits[1].argmax(-1)).sum())
    for item_nll, score in zip(nll, (result.scores, result.baseline), strict=False):
        assert score is not None
        losses = torch.cat(item_nll)
        score.tokens = len(losses)
        score.perplexity = math.exp(min(float(losses.mean()), 700.0))
        score.perplexity_stderr = score.perplexity * _stderr(item_nll)
    if result.baseline is not None:
        all_kl = torch.cat(kl).double()
        result.scores.kl_mean = float(all_kl.mean())
        result.scores.kl_p99 = float(all_kl.kthvalue(max(1, math.ceil(0.99 * len(all_kl)))).values)
        result.scores.top1_changed = changed / len(all_kl)
        result.baseline.kl_mean = result.baseline.kl_p99 = result.baseline.top1_changed = 0.0
        differences = [a - b for a, b in zip(nll[0], nll[1], strict=True)]
        result.nll_difference = float(torch.cat(differences).mean())
        result.nll_difference_stderr = _stderr(differences)


def _batches(rows: list[Tensor]) -> Iterator[Tensor]:
    """Rows of equal length, several at a time."""
    size = max(1, BATCH_TOKENS // rows[0].shape[1])
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        for length in dict.fromkeys(row.shape[1] for row in chunk):
            yield torch.cat([row for row in chunk if row.shape[1] == length])


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats per row of logits [tokens, vocabulary] -> float32 [tokens]."""
    parts = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts])


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats per row of logits [tokens, vocabulary] -> float32 [tokens]."""
    parts = []
    for start in range(0, len(reference), CHUNK):
        p = reference[start : start + CHUNK].float().log_softmax(-1)
        q = other[start : start + CHUNK].float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    return torch.cat(parts)


def _stderr(per_window: list[Tensor]) -> float:
    """Standard error of the mean over all tokens, windows being the independent units; 0 for a single window."""
    if len(per_window) < 2:
        return 0.0
    tokens = sum(len(values) for values in per_window)
    mean = float(torch.cat(per_window).mean())
    spread = sum((float(values.sum()) - mean * len(values)) ** 2 for values in per_window)
    return math.sqrt(spread * len(per_window) / (len(per_window) - 1)) / tokens


def choose_text(model: str, source: str | None, wanted: bool) -> Text | None:
    """The evaluation text: what `source` names, the demo's own for the demo and what was made from it, else WikiText-2.

    None if no text is `wanted` and none comes for free.
    """
    made_from = read_json_if_there(Path(model) / SIDECAR).get("model") if Path(model).is_dir() else model
    if not wanted and DEMO not in (model, made_from):
        return None
    return evaluation_text(source, DEMO if made_from == DEMO else model)


def remember(model: str, result: dict[str, Any]) -> None:
    """Keeps the scores beside a local folder that we wrote, where the model card finds them, with earlier tasks'."""
    folder = Path(model)
    if (folder / SIDECAR).exists() and os.access(folder, os.W_OK):
        before = read_json_if_there(folder / EVALUATION)
        kept = _merged(before, result | {"model": shown(model)})
        if result["baseline"]:
            baseline = result["baseline"] | {"model": shown(result["baseline"]["model"])}
            kept["baseline"] = _merged(before.get("baseline") or {}, baseline)
        text = json.dumps(kept, indent=2)
        (folder / EVALUATION).write_text(text + "\n", encoding="utf-8")


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """`after`, with what it did not measure taken from `before`."""
    measured = {key: value for key, value in after.items() if value is not None and key != "tasks"}
    if after.get("perplexity") is None:
        measured = {key: value for key, value in measured.items() if key not in ("tokens", "baseline")}
    return after | before | measured | {"tasks": before.get("tasks", {}) | after["tasks"]}


def find_tasks(names: Sequence[str], include_path: Path | None) -> list[Any]:
    """lm-eval tasks by name, the built-in `demo_stories` among them; RecipeError names the nearest to an unknown."""
    if not names:
        return []
    from llmsqueeze.demo import task as demo_task

    if include_path is not None and not include_path.is_dir():
        raise RecipeError(f"--include-path {include_path} is not a folder of task definitions")
    found = [demo_task.task_config() if name == demo_task.TASK_NAME else name for name in names]
    if set(names) - {demo_task.TASK_NAME}:
        known = set(_task_manager(include_path).all_tasks) | {demo_task.TASK_NAME}
        for name in names:
            if name not in known:
                raise RecipeError(f"unknown task {name!r}{nearest(name, known)}")
    return found


@cache
def _task_manager(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include_path is None else str(include_path))


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, TaskScores]:
    """lm-eval's metrics by task, for a model that is already open."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        # it asks git for its own commit, which complains on stderr wherever there is no checkout
        with mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None, create=True):
            outcome = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks,
                limit=limit,
                task_manager=_task_manager(include_path),
                bootstrap_iters=0 if limit == 1 else 1000,
                log_samples=True,
                verbosity="ERROR",
            )
    except (OSError, ImportError) as error:  # its data cannot be had, or it needs a package
        names = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
        raise HubError(f"lm-eval cannot run {names}: {first_line(error)}") from error
    results: dict[str, dict[str, Any]] = outcome["results"]
    answers: dict[str, list[dict[str, Any]]] = outcome.get("samples") or {}
    return {name: TaskScores(_metrics(values), _documents(answers.get(name, []))) for name, values in results.items()}


def _documents(answers: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> document -> value, of what lm-eval logged of the documents; sums over a document's words have none."""
    found: dict[str, dict[int, float]] = {}
    for answer in answers:
        suffix = "" if answer.get("filter", "none") == "none" else f"_{answer['filter']}"
        for metric in answer.get("metrics", []):
            if isinstance(answer.get(metric), (int, float)):
                found.setdefault(f"{metric}{suffix}", {})[int(answer["doc_id"])] = float(answer[metric])
    return found


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` keys as plain names; other filters keep theirs as a suffix."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, (int, float)) and not isinstance(value, bool):
            base, stderr = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
            metrics[f"{base}{'' if filtered == 'none' else '_' + filtered}{stderr}"] = float(value)
    return metrics
