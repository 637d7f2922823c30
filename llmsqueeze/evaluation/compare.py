"""The verb `compare`: an original and what was made of it under one harness, with true bytes and paired differences.

Every model is measured as `eval` does it, on the same windows with the original's tokenizer, beside the original: so
differences are paired, window by window and document by document. The original and one other model are in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.evaluation import bnb, evaluate
from llmsqueeze.evaluation.evaluate import (
    Evaluation,
    Opened,
    Scores,
    TaskScores,
    choose_window,
    find_tasks,
    open_model,
    run_tasks,
    score_text,
)
from llmsqueeze.files import COMPARISON, SIDECAR, write_json
from llmsqueeze.formats.entries import format_of
from llmsqueeze.formats.public import shown
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.linears import find_blocks, find_linears
from llmsqueeze.model.original import locate
from llmsqueeze.model.skeleton import empty_model, load_config
from llmsqueeze.model.text import Text, windows
from llmsqueeze.progress import Progress


@dataclass(frozen=True)
class Contender:
    """A model to compare: how it is called and opened, of what kind it is; its bytes and bits per weight, or None where
    they can be counted only when it is open."""

    name: str
    kind: str
    open: Callable[[], Opened]
    sizes: tuple[int, float] | None = None


@dataclass(frozen=True)
class Harness:
    """What every model is measured with.

    reference: the original in memory; rows: tokens [1, length] of the text; tasks_of: runs the tasks on a model;
    answers: the original's; scores: the original's on the text, filled in with the first model beside it.
    """

    reference: Opened
    rows: list[Tensor]
    window: int | None
    tasks_of: Callable[[Opened], dict[str, TaskScores]]
    answers: dict[str, TaskScores]
    scores: Scores
    device: torch.device
    progress: Progress


def compare(
    original: str,
    folders: Sequence[str],
    *,
    bnb_types: Sequence[str] = (),
    text: Text | None = None,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures the original, every folder and every bitsandbytes type made of it; `comparison.json` as a dict.

    What only turns out not to open when its turn comes is named under `left_out`. Raises RecipeError, CheckpointError
    or UnsupportedError, before anything is measured, for what cannot be compared.
    """
    progress, device = progress or Progress(), device or torch.device("cpu")
    found = contenders(original, folders, bnb_types, device, trust_remote_code)
    task_objects = find_tasks(tasks, include_path)
    reference = open_model(original, device, trust_remote_code)
    rows, size = [], None
    if text is not None:
        size = choose_window(reference, window)
        rows = windows(text, reference.tokenizer, size, tail=True)[:limit]

    def tasks_of(opened: Opened) -> dict[str, TaskScores]:
        if not task_objects:
            return {}
        with progress.foreign("tasks"):
            return run_tasks(opened.model, opened.tokenizer, task_objects, include_path, limit, batch_size)

    harness = Harness(reference, rows, size, tasks_of, tasks_of(reference), Scores(original), device, progress)
    models: list[dict[str, Any]] = []
    left_out: list[str] = []
    for contender in found[1:]:
        progress.note(f"measuring {contender.name}")
        try:
            models.append(measured(contender, harness))
        except UnsupportedError as error:
            if contender is found[-1] and not models:
                raise
            left_out.append(str(error))  # what others measured is not lost for it
    models.insert(0, row_of_original(found[0], harness))
    mark_frontier(models)
    about = {"text": text.source if text else None, "window": size, "tokens": harness.scores.tokens}
    return about | {"models": models, "left_out": left_out}


def measured(contender: Contender, harness: Harness) -> dict[str, Any]:
    """Opens a model, measures it beside the original, lets it go. Raises UnsupportedError."""
    result = Evaluation(Scores(contender.name), harness.scores, None, harness.window)
    with bnb.named(contender.name) if contender.sizes is None else nullcontext():
        opened = contender.open()
        sizes = contender.sizes or bnb.sizes(opened.model)  # before it computes, which may change it
        if harness.rows:
            score_text([opened, harness.reference], harness.rows, result, harness.device, harness.progress)
        return row_of(contender, sizes, result, harness.tasks_of(opened), harness.answers)


def row_of_original(contender: Contender, harness: Harness) -> dict[str, Any]:
    """The original's line, once others were measured beside it."""
    assert contender.sizes is not None
    same = 0.0 if harness.rows else None
    before = Evaluation(harness.scores, None, None, harness.window, same, same)
    return row_of(contender, contender.sizes, before, harness.answers, harness.answers)


def contenders(
    original: str, folders: Sequence[str], bnb_types: Sequence[str], device: torch.device, trust_remote_code: bool
) -> list[Contender]:
    """All that will be measured, the original first; every folder has been found and its size is known."""
    if not folders and not bnb_types:
        raise RecipeError("there is nothing to compare the original with; name folders, or --bnb nf4")
    if twice := next((name for name in folders if name == original or list(folders).count(name) > 1), None):
        raise RecipeError(f"{twice} is named twice")
    path = locate(original)
    config = load_config(path, trust_remote_code)
    base = open_checkpoint(path)
    model = empty_model(path, config, trust_remote_code)
    linears = {name for block in find_blocks(model) for name in find_linears(model, block)}
    found = []
    for name in (original, *folders):
        where = locate(name)
        checkpoint = base if name == original else open_checkpoint(where)
        other = load_config(where, trust_remote_code)
        if other.vocab_size != config.vocab_size:
            raise UnsupportedError(
                f"{name} has a vocabulary of {other.vocab_size} tokens and {original} one of {config.vocab_size}: it "
                "was not made of it, so they cannot be compared"
            )
        sizes = checkpoint.nbytes, bits_per_weight(checkpoint, model, linears)
        kind = "original" if name == original else format_of(checkpoint)
        found.append(Contender(name, kind, partial(open_model, name, device, trust_remote_code), sizes))
    for kind in bnb_types:
        load = partial(bnb.load, kind=kind)
        name = f"{Path(original).name} ({kind})"
        found.append(Contender(name, bnb.NAMES[kind], partial(open_model, original, device, trust_remote_code, load)))
    return found


def bits_per_weight(checkpoint: Checkpoint, model: PreTrainedModel, linears: Iterable[str]) -> float:
    """All bytes that the folder stores for the blocks' linears which it compresses, in bits, per weight of theirs.

    Of all linears, where it compresses none. Biases are not counted; `model` is the original, without its weights.
    """
    total = {True: [0, 0], False: [0, 0]}  # compressed or not -> bytes, weights
    prefix = f"{model.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in checkpoint.tensors)  # as GPT-2 is on the Hub
    stored = {prefix + name if bare else name: tensor for name, tensor in checkpoint.tensors.items()}
    by_linear = tensors_by_linear(stored, linears)
    for linear in linears:
        names = [name for name in by_linear[linear] if name != f"{linear}.bias"]
        if names:
            compressed = names != [f"{linear}.weight"]
            total[compressed][0] += sum(stored[name].nbytes for name in names)
            total[compressed][1] += model.get_parameter(f"{linear}.weight").numel()
    nbytes, numel = total[True] if total[True][1] else total[False]
    return round(8 * nbytes / numel, 6) if numel else math.nan


def tensors_by_linear(tensors: Iterable[str], linears: Iterable[str]) -> dict[str, list[str]]:
    """linear -> the tensors below its name."""
    found: dict[str, list[str]] = {linear: [] for linear in linears}
    for name in tensors:
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in found:
                found[parent].append(name)
                break
    return found


def row_of(
    contender: Contender,
    sizes: tuple[int, float],
    result: Evaluation,
    tasks: Mapping[str, TaskScores],
    before: Mapping[str, TaskScores],
) -> dict[str, Any]:
    """A model's line of `comparison.json`."""
    nbytes, bits = sizes
    scores = asdict(result.scores)
    own = contender.kind == "original"
    same = own and scores["perplexity"] is not None
    kl = {key: 0.0 if same else scores[key] for key in ("kl_mean", "kl_p99", "top1_changed")}
    return {
        "model": contender.name,
        "kind": contender.kind,
        "nbytes": nbytes,
        "bits_per_weight": bits,
        "perplexity": scores["perplexity"],
        "perplexity_stderr": scores["perplexity_stderr"],
        "nll_difference": result.nll_difference,
        "nll_difference_stderr": result.nll_difference_stderr,
        **kl,
        "tasks": {task: values.metrics | paired(values, before[task]) for task, values in tasks.items()},
        "on_frontier": False,
    }


def paired(after: TaskScores, before: TaskScores) -> dict[str, float]:
    """`<metric>_difference` and its standard error over the documents that both answered."""
    found: dict[str, float] = {}
    for metric, value in after.metrics.items():
        if metric.endswith("_stderr") or metric not in before.metrics:
            continue
        found[f"{metric}_difference"] = value - before.metrics[metric]
        mine, theirs = after.documents.get(metric, {}), before.documents.get(metric, {})
        differences = [mine[doc] - theirs[doc] for doc in mine if doc in theirs]
        if len(differences) > 1:
            spread = float(torch.tensor(differences, dtype=torch.float64).std())
            found[f"{metric}_difference_stderr"] = spread / math.sqrt(len(differences))
    return found


def mark_frontier(models: list[dict[str, Any]]) -> None:
    """A model is on the frontier if none is both as small and as good, and better in one."""
    measured = [m for m in models if m["nll_difference"] is not None]
    for one in measured:
        one["on_frontier"] = not any(
            other["nbytes"] <= one["nbytes"]
            and other["nll_difference"] <= one["nll_difference"]
            and (other["nbytes"] < one["nbytes"] or other["nll_difference"] < one["nll_difference"])
            for other in measured
        )


def remember(result: Mapping[str, Any]) -> list[str]:
    """Keeps the comparison in every folder of ours that was compared, where card and report find it; their names."""
    public = shown(dict(result))
    kept = []
    for i, model in enumerate(result["models"]):
        folder = Path(model["model"])
        if i and (folder / SIDECAR).exists() and os.access(folder, os.W_OK):
            models = [one | {"this": i == j} for j, one in enumerate(public["models"])]
            write_json(folder / COMPARISON, public | {"models": models})
            evaluate.remember(model["model"], as_evaluation(result, model))
            kept.append(model["model"])
    return kept


def as_evaluation(result: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """What `eval` would have measured of one of the models, with the original as its baseline."""

    def scores(one: Mapping[str, Any]) -> dict[str, Any]:
        names = {field.name for field in fields(Scores)}
        tasks = {
            task: {metric: value for metric, value in values.items() if "_difference" not in metric}
            for task, values in one["tasks"].items()
        }
        return {key: value for key, value in one.items() if key in names} | {"tasks": tasks, "tokens": result["tokens"]}

    differences = {key: model[key] for key in ("nll_difference", "nll_difference_stderr")}
    about = {"text": result["text"], "window": result["window"], "baseline": scores(result["models"][0])}
    return scores(model) | differences | about
