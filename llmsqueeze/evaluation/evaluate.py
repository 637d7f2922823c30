"""The verb `eval`: perplexity, KL divergence from a baseline, and lm-eval tasks, for both models in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.evaluation.perplexity import PairedLosses, choose_window, no_scores, paired_losses, score_text
from llmsqueeze.evaluation.scores import Evaluation, Scores
from llmsqueeze.evaluation.tasks import Tasks, TaskScores, find_tasks
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.original import pick_device
from llmsqueeze.model.precision import DTYPES
from llmsqueeze.model.text import DEMO, Text, evaluation_text, windows
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.values import choice, whole


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    tasks: str | Sequence[str] = (),
    text: str | Text | None = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model, and a baseline on the same windows of text and the same documents.

    model, baseline: a folder, compressed or not, a Hub id, or `demo`. The differences and the KL divergence are from
    the baseline.
    tasks: names of lm-eval tasks, or `demo_stories`. include_path: a folder with definitions of more tasks.
    text: the source of a text: a .txt or .jsonl file, a data set on the Hub as `owner/name[:config[:split]]`, or
    `demo`. By default `demo` for the demo and its compressed forms; for every other model WikiText-2, or no text if
    tasks are named.
    limit: how many windows of text, and how many documents of each task, are measured at most; all by default.
    window: tokens in a window; by default the context length of the model, at most 2048.
    batch_size: task requests that go through the model at a time.
    dtype: what the models compute in. `stored`: the dtype of their files; `float32`; `auto`: the one of the two in
    which the device is faster, by a short trial. The results of a bfloat16 model differ slightly between the two.
    device: `auto` (the first CUDA device, or else the CPU), `cpu`, `cuda`, `cuda:1`, ...

    Returns perplexities, losses and divergences in nats per token, and task metrics; see `Evaluation`.
    Raises RecipeError for an unknown name or a bad value, CheckpointError for a model that cannot be read,
    CalibrationError for an unreadable or too short text, UnsupportedError if the vocabularies of the two models
    differ in size, HubError if the data of a task cannot be loaded. Each derives from SqueezeError.

    >>> result = evaluate("demo", limit=4)
    >>> result.text
    "the demo's story generator, evaluation seed"
    >>> f"{result.scores.perplexity:.1f} on {result.scores.tokens} tokens"
    '2.8 on 1020 tokens'
    """
    progress = progress or Progress()
    chosen_device = pick_device(str(device))
    check_sizes(limit=limit, window=window, batch_size=batch_size)
    choice(DTYPES)("dtype", dtype)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    chosen_tasks = find_tasks(names, None if include_path is None else Path(include_path), limit, batch_size)
    chosen_text = choose_text(str(model), text, required=not names)
    opened = open_model(str(model), chosen_device, trust_remote_code, dtype, progress)
    other = None if baseline is None else open_model(str(baseline), chosen_device, trust_remote_code, dtype)
    result = Evaluation(no_scores(opened), None if other is None else no_scores(other))
    if chosen_text is not None:
        rows, length = text_rows(opened, chosen_text, window, limit)
        result = replace(score_text(opened, other, rows, progress), text=chosen_text.source, window=length)
    return with_tasks(result, chosen_tasks, opened, other, progress)


def check_sizes(**sizes: int | None) -> None:
    """Raises RecipeError for a limit, window or batch size that is too small."""
    for name, value in sizes.items():
        if value is not None:
            whole(2 if name == "window" else 1)(name, value)


def text_rows(opened: OpenModel, text: Text, window: int | None, limit: int | None) -> tuple[list[Tensor], int]:
    """Token rows [1, length] over the text, at most `limit`, and their length; the last row may be shorter."""
    length = choose_window(opened, window)
    return windows(text, opened.tokenizer, length, tail=True)[:limit], length


def with_tasks(
    result: Evaluation, tasks: Tasks, opened: OpenModel, other: OpenModel | None, progress: Progress
) -> Evaluation:
    """The result with the metrics of the tasks, for the model and its baseline."""
    result = replace(result, scores=with_metrics(result.scores, tasks.run(opened, progress)))
    if other is None or result.baseline is None:
        return result
    return replace(result, baseline=with_metrics(result.baseline, tasks.run(other, progress)))


def with_metrics(scores: Scores, tasks: dict[str, TaskScores]) -> Scores:
    """The scores with the metrics of `tasks`."""
    return replace(scores, tasks={name: values.metrics for name, values in tasks.items()})


def evaluate_rows(
    model: str, baseline: str, rows: Sequence[Tensor], device: torch.device, trust_remote_code: bool, progress: Progress
) -> PairedLosses:
    """The losses of `model` beside `baseline` on token rows [1, length]."""
    opened, other = (open_model(name, device, trust_remote_code) for name in (model, baseline))
    return paired_losses(opened, other, rows, progress)


def choose_text(model: str, text: str | Text | None, required: bool) -> Text | None:
    """The text to measure on: `text`, or by default the demo's own for the demo and its compressed forms.

    For other models it is WikiText-2 if `required`, else None. Raises CalibrationError for an unreadable text.
    """
    if isinstance(text, Text):
        return text
    original = read_record(Path(model)).get("model") if Path(model).is_dir() else model
    if text is None and not required and DEMO not in (model, original):
        return None
    return evaluation_text(text, DEMO if original == DEMO else model)
