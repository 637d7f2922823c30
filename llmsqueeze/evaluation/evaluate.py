"""The verb `eval`: perplexity, KL divergence from a baseline, and lm-eval tasks, for both models in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmsqueeze.evaluation.losses.perplexity import PairedLosses, no_scores, paired_losses, score_text
from llmsqueeze.evaluation.losses.windows import papers_text, read_windows
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.evaluation.options import PAPERS, Limit, Reading
from llmsqueeze.evaluation.scores import Evaluation, Scores
from llmsqueeze.evaluation.tasks.options import TaskOptions, batch_size_of
from llmsqueeze.evaluation.tasks.paired import paired_differences
from llmsqueeze.evaluation.tasks.run import Tasks, find_tasks
from llmsqueeze.evaluation.tasks.scores import TaskScores
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.original import pick_device
from llmsqueeze.model.precision import DTYPES
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.values import choice
from llmsqueeze.text.document import Text
from llmsqueeze.text.source import DEMO, evaluation_text


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    tasks: str | Sequence[str] = (),
    text: str | Text | None = None,
    include_path: str | Path | None = None,
    limit: Limit | None = None,
    window: int | None = None,
    stride: int | None = None,
    protocol: str | None = None,
    batch_size: int | str = 8,
    task_options: TaskOptions | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a model, and a baseline on the same windows of text and the same documents.

    model, baseline: a folder, compressed or not, a Hub id, or `demo`. The differences and the KL divergence are from
    the baseline.
    tasks: names of lm-eval tasks and groups, wildcards, YAML files, or `demo_stories`. include_path: a folder with
    definitions of more tasks. task_options: how they are asked.
    text: the source of a text: a .txt or .jsonl file, a data set on the Hub as `owner/name[:config[:split]]`, or
    `demo`. By default `demo` for the demo and its compressed forms; for every other model WikiText-2, or no text if
    tasks are named.
    limit: how many windows of text, and how many documents of each task, are measured at most, or which share of them
    (below 1); all by default.
    window: tokens in a window; by default the context length of the model, at most 2048. stride: tokens between the
    beginnings of two windows, of which only the tokens beyond the window before count; by default windows do not
    overlap. protocol: `papers` reads WikiText-2 as GPTQ and QTIP do (losses/windows.py).
    batch_size: task requests that go through the model at a time, or `auto`.
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
    reading = Reading(window, stride, protocol, limit)
    choice(DTYPES)("dtype", dtype)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    folder = None if include_path is None else Path(include_path)
    chosen_tasks = find_tasks(names, folder, limit, batch_size_of(batch_size), task_options, progress)
    chosen_text = choose_text(str(model), text, required=not names, protocol=protocol)
    opened = open_model(str(model), chosen_device, trust_remote_code, dtype, progress)
    other = None if baseline is None else open_model(str(baseline), chosen_device, trust_remote_code, dtype)
    for one in (opened, other):
        if one is not None:
            chosen_tasks.check(one)
    result = Evaluation(no_scores(opened), None if other is None else no_scores(other))
    if chosen_text is not None:
        windows = read_windows(opened, chosen_text, reading)
        for note in windows.notes:
            progress.note(note)
        result = replace(
            score_text(opened, other, windows, progress), text=chosen_text.source, stride=stride, protocol=protocol
        )
    return with_tasks(replace(result, limit=limit), chosen_tasks, opened, other, progress)


def with_tasks(
    result: Evaluation, tasks: Tasks, opened: OpenModel, other: OpenModel | None, progress: Progress
) -> Evaluation:
    """The result with the metrics of the tasks, for the model and its baseline, and their paired differences."""
    own = tasks.run(opened, progress)
    settings = {label: values.settings for label, values in own.items()}
    if other is None or result.baseline is None:
        return replace(result, scores=with_metrics(result.scores, own, {}), task_settings=settings)
    theirs = tasks.run(other, progress)
    return replace(
        result,
        scores=with_metrics(result.scores, own, theirs),
        baseline=with_metrics(result.baseline, theirs, {}),
        task_settings=settings,
    )


def with_metrics(scores: Scores, own: Mapping[str, TaskScores], theirs: Mapping[str, TaskScores]) -> Scores:
    """The scores with the metrics of tasks, and with the differences from those of a baseline."""
    return replace(scores, tasks={label: metrics_beside(values, theirs.get(label)) for label, values in own.items()})


def metrics_beside(own: TaskScores, theirs: TaskScores | None) -> dict[str, float]:
    """The metrics of a task; their differences from a baseline's."""
    return own.metrics | ({} if theirs is None else paired_differences(own, theirs))


def evaluate_rows(
    model: str, baseline: str, rows: Sequence[Tensor], device: torch.device, trust_remote_code: bool, progress: Progress
) -> PairedLosses:
    """The losses of `model` beside `baseline` on token rows [1, length]."""
    opened, other = (open_model(name, device, trust_remote_code) for name in (model, baseline))
    return paired_losses(opened, other, rows, progress)


def choose_text(model: str, text: str | Text | None, required: bool, protocol: str | None = None) -> Text | None:
    """The text to measure on: `text`, or by default the demo's own for the demo and its compressed forms.

    For other models it is WikiText-2 if `required`, else None. A protocol has its own text and form of it.
    Raises CalibrationError for an unreadable text.
    """
    if isinstance(text, Text):
        return text
    if protocol == PAPERS:
        return papers_text(text)
    original = read_record(Path(model)).get("model") if Path(model).is_dir() else model
    if text is None and not required and DEMO not in (model, original):
        return None
    return evaluation_text(text, DEMO if original == DEMO else model)
