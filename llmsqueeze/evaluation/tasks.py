"""lm-eval tasks on a model that is in memory, and the differences between two models document by document."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsqueeze.demo import task as demo_task
from llmsqueeze.errors import HubError, RecipeError, first_line, nearest
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.model.blockwise.attention import AttentionInPieces
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress

SEED, OTHER_SEED = 0, 1234  # those of lm-eval's own command: Python's generator; NumPy's, torch's and few-shot's
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class TaskScores:
    """A task's `<metric>` and `<metric>_stderr`; and metric -> document -> its value, if documents have one."""

    metrics: dict[str, float]
    documents: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tasks:
    """The lm-eval tasks to run.

    specs: a name or a configuration per task. include_path: folder with definitions of more tasks. limit: documents
    per task, at most. batch_size: requests that go through the model at a time.
    """

    specs: list[str | dict[str, Any]]
    include_path: Path | None = None
    limit: int | None = None
    batch_size: int = 8

    def run(self, opened: OpenModel, progress: Progress) -> dict[str, TaskScores]:
        """task -> scores, which of several processes the first one measures. Raises HubError if the data of a task
        cannot be loaded, or a package is missing."""
        return processes.of_first(lambda: self._scores(opened, progress)) if self.specs else {}

    def _scores(self, opened: OpenModel, progress: Progress) -> dict[str, TaskScores]:
        with progress.foreign("tasks"):
            try:
                return self._run(opened)
            except (OSError, ImportError) as error:
                names = ", ".join(spec if isinstance(spec, str) else spec["task"] for spec in self.specs)
                raise HubError(f"lm-eval cannot run {names}: {first_line(error)}") from error

    def _run(self, opened: OpenModel) -> dict[str, TaskScores]:
        # the steps of lm_eval.simple_evaluate that change a score; the rest of it describes the machine, by starting
        # git and other commands, whose complaints reach the terminal
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        random.seed(SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        named = any(isinstance(spec, str) for spec in self.specs)
        loaded = _index(self.include_path, named).load(self.specs)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=OTHER_SEED)
        with AttentionInPieces():
            outcome = lm_eval.evaluate(
                lm=HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=self.batch_size),
                task_dict=loaded,
                limit=self.limit,
                bootstrap_iters=0 if self.limit == 1 else BOOTSTRAPS,
                log_samples=True,
                fewshot_as_multiturn=True,
            )
        answers: dict[str, list[dict[str, Any]]] = outcome.get("samples") or {}
        return {
            name: TaskScores(_metrics(values), _documents(answers.get(name, [])))
            for name, values in outcome["results"].items()
        }


def find_tasks(
    names: Sequence[str], include_path: Path | None = None, limit: int | None = None, batch_size: int = 8
) -> Tasks:
    """lm-eval tasks by name, the built-in `demo_stories` among them.

    Raises RecipeError for an unknown name, with the nearest one, and if `include_path` is not a folder.
    """
    if include_path is not None and names and not include_path.is_dir():
        raise RecipeError(f"--include-path {include_path} is not a folder of task definitions")
    if set(names) - {demo_task.TASK_NAME}:
        available = {*_index(include_path).all_tasks, demo_task.TASK_NAME}
        for name in names:
            if name not in available:
                raise RecipeError(f"unknown task {name!r}{nearest(name, available)}")
    specs = [demo_task.task_config() if name == demo_task.TASK_NAME else name for name in names]
    return Tasks(specs, include_path, limit, batch_size)


@cache
def _index(include_path: Path | None, defaults: bool = True) -> Any:
    """lm-eval's index of task definitions. To read its own definitions (`defaults`) takes seconds."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    return TaskManager(include_path=path, include_defaults=defaults)


def _documents(answers: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """metric -> document -> value, from lm-eval's samples. A sum over a document's words has none."""
    values: dict[str, dict[int, float]] = {}
    for answer in answers:
        suffix = "" if answer.get("filter", "none") == "none" else f"_{answer['filter']}"
        for metric in answer.get("metrics", []):
            if isinstance(answer.get(metric), (int, float)):
                values.setdefault(f"{metric}{suffix}", {})[int(answer["doc_id"])] = float(answer[metric])
    return values


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` keys as plain names. Any other filter becomes a suffix."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, (int, float)) and not isinstance(value, bool):
            base, stderr = metric.removesuffix("_stderr"), "_stderr" if metric.endswith("_stderr") else ""
            metrics[f"{base}{'' if filtered == 'none' else '_' + filtered}{stderr}"] = float(value)
    return metrics


def paired_differences(after: TaskScores, before: TaskScores) -> dict[str, float]:
    """`<metric>_difference` and its standard error over the documents that both answered."""
    differences: dict[str, float] = {}
    for metric, value in after.metrics.items():
        if metric.endswith("_stderr") or metric not in before.metrics:
            continue
        differences[f"{metric}_difference"] = value - before.metrics[metric]
        mine, theirs = after.documents.get(metric, {}), before.documents.get(metric, {})
        by_document = [mine[doc] - theirs[doc] for doc in mine if doc in theirs]
        if len(by_document) > 1:
            spread = float(torch.tensor(by_document, dtype=torch.float64).std())
            differences[f"{metric}_difference_stderr"] = spread / math.sqrt(len(by_document))
    return differences
