"""The verb `compare`: an original and its compressed forms under one harness, with true bytes and paired differences.

Every model is measured as `eval` does it, beside the original, on the same windows with the original's tokenizer. So
differences are paired, window by window and document by document. Memory: the original and one other model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.evaluation import bnb
from llmsqueeze.evaluation.contenders import Contender, RoundedModel, StoredModel, find_contenders
from llmsqueeze.evaluation.evaluate import choose_text, metrics_beside
from llmsqueeze.evaluation.losses.perplexity import no_scores, score_text
from llmsqueeze.evaluation.losses.windows import Windows, read_windows
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.evaluation.options import Limit, Reading
from llmsqueeze.evaluation.scores import Evaluation, Scores, is_ours, save_scores
from llmsqueeze.evaluation.tasks.options import TaskOptions, batch_size_of
from llmsqueeze.evaluation.tasks.run import Tasks, find_tasks
from llmsqueeze.evaluation.tasks.scores import TaskScores
from llmsqueeze.files import COMPARISON, read_json_if_there, write_json
from llmsqueeze.formats.public import shown
from llmsqueeze.model.original import pick_device
from llmsqueeze.model.precision import DTYPES
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.values import choice
from llmsqueeze.text.document import Text


@dataclass(frozen=True)
class Harness:
    """What every model is measured with. original: in memory. windows: of the text, if one is read."""

    original: OpenModel
    windows: Windows | None
    tasks: Tasks
    progress: Progress


@dataclass(frozen=True)
class Measurement:
    """A model's sizes, its scores beside the original's, and its task scores."""

    model: Contender
    nbytes: int
    bits_per_weight: float
    evaluation: Evaluation
    tasks: dict[str, TaskScores]


def compare(
    original: str,
    folders: Sequence[str],
    *,
    bnb_types: Sequence[str] = (),
    text: str | Text | None = None,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
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
) -> dict[str, Any]:
    """Measures the original, every folder, and the original in every bitsandbytes type.

    The options are those of `evaluate`. Returns the content of `comparison.json`. Its `left_out` has one message for
    each model that did not open. Raises RecipeError, CheckpointError or UnsupportedError for models that cannot be
    compared, before anything is measured.
    """
    progress, chosen_device = progress or Progress(), pick_device(str(device))
    reading = Reading(window, stride, protocol, limit)
    choice(DTYPES)("dtype", dtype)
    stored_original, others = find_contenders(original, folders, bnb_types, chosen_device, trust_remote_code, dtype)
    chosen_tasks = find_tasks(tasks, include_path, limit, batch_size_of(batch_size), task_options, progress)
    chosen_text = choose_text(original, text, required=not tasks, protocol=protocol)
    opened = open_model(original, chosen_device, trust_remote_code, dtype, progress)
    windows = None if chosen_text is None else read_windows(opened, chosen_text, reading)
    for note in windows.notes if windows else ():
        progress.note(note)
    harness = Harness(opened, windows, chosen_tasks, progress)
    answers = chosen_tasks.run(opened, progress)
    measurements, left_out = measure_all(others, harness)
    models = [measurement_of_original(stored_original, answers, measurements[0]), *measurements]
    result = [row_of(one, answers) for one in models]
    mark_frontier(result)
    return {
        "text": chosen_text.source if chosen_text else None,
        "window": windows.length if windows else None,
        "stride": stride,
        "protocol": protocol,
        "limit": limit,
        "task_settings": {label: values.settings for label, values in answers.items()},
        "tokens": models[0].evaluation.scores.tokens,
        "models": result,
        "left_out": left_out,
    }


def refuse_unreadable(original: str, given: Mapping[str, Any], progress: Progress) -> None:
    """Raises what `compare` raises for a text or tasks that cannot be read; given: its options."""
    batch_size = batch_size_of(given["batch_size"])
    find_tasks(given["tasks"], given["include_path"], given["limit"], batch_size, given["task_options"], progress)
    choose_text(original, given["text"], required=not given["tasks"], protocol=given["protocol"])


def measure_all(others: Sequence[Contender], harness: Harness) -> tuple[list[Measurement], list[str]]:
    """The measurements, and the error of each model that did not open. Raises UnsupportedError if none opens."""
    measurements: list[Measurement] = []
    errors: list[str] = []
    for contender in others:
        harness.progress.note(f"measuring {contender.name}")
        try:
            measurements.append(measure_one(contender, harness))
        except UnsupportedError as error:
            if contender is others[-1] and not measurements:
                raise
            errors.append(str(error))  # the measurements of other models are not lost
    return measurements, errors


def measure_one(contender: Contender, harness: Harness) -> Measurement:
    """Opens a model, measures it beside the original, and frees it. Raises UnsupportedError."""
    with bnb.translated_errors(contender.name) if isinstance(contender, RoundedModel) else nullcontext():
        opened = contender.open()
        if isinstance(contender, StoredModel):
            nbytes, bits = contender.nbytes, contender.bits_per_weight
        else:
            nbytes, bits = bnb.stored_sizes(opened.model)  # before it computes, which may change them
        opened = replace(opened, name=contender.name)
        evaluation = Evaluation(no_scores(opened), no_scores(harness.original))
        if harness.windows is not None:
            evaluation = score_text(opened, harness.original, harness.windows, harness.progress)
        return Measurement(contender, nbytes, bits, evaluation, harness.tasks.run(opened, harness.progress))


def measurement_of_original(original: StoredModel, answers: dict[str, TaskScores], beside: Measurement) -> Measurement:
    """The original's own, from the measurement of a model beside it."""
    scores = beside.evaluation.baseline or Scores(original.name)
    same = None if scores.perplexity is None else 0.0
    evaluation = Evaluation(scores, nll_difference=same, nll_difference_stderr=same)
    return Measurement(original, original.nbytes, original.bits_per_weight, evaluation, answers)


def row_of(one: Measurement, answers: Mapping[str, TaskScores]) -> dict[str, Any]:
    """A model's entry in `comparison.json`. `answers`: the original's task scores."""
    scores = one.evaluation.scores
    return {
        "model": one.model.name,
        "kind": one.model.kind,
        "method": one.model.method,
        "bits": one.model.bits,
        "nbytes": one.nbytes,
        "bits_per_weight": one.bits_per_weight,
        "perplexity": scores.perplexity,
        "perplexity_stderr": scores.perplexity_stderr,
        "nll_difference": one.evaluation.nll_difference,
        "nll_difference_stderr": one.evaluation.nll_difference_stderr,
        "kl_mean": scores.kl_mean,
        "kl_p99": scores.kl_p99,
        "top1_changed": scores.top1_changed,
        "computed_in": scores.computed_in,
        "tasks": {label: metrics_beside(own, answers.get(label)) for label, own in one.tasks.items()},
        "on_frontier": False,
    }


def mark_frontier(models: list[dict[str, Any]]) -> None:
    """Sets `on_frontier` of each model that no other beats: as small and as good, and better in one of the two."""
    measured = [m for m in models if m["nll_difference"] is not None]
    for one in measured:
        one["on_frontier"] = not any(
            other["nbytes"] <= one["nbytes"]
            and other["nll_difference"] <= one["nll_difference"]
            and (other["nbytes"] < one["nbytes"] or other["nll_difference"] < one["nll_difference"])
            for other in measured
        )


def save_comparison(result: Mapping[str, Any]) -> list[str]:
    """Writes `comparison.json` and `evaluation.json` into every compared folder of ours; returns their names.

    Model card and report read the files there. A comparison on a part of the data replaces no whole one.
    """
    public = shown(dict(result))
    folders = []
    for i, model in enumerate(result["models"]):
        folder = Path(model["model"])
        if i and is_ours(folder):
            save_scores(model["model"], as_evaluation(result, model))
            before = read_json_if_there(folder / COMPARISON)
            if result["limit"] is not None and before and before.get("limit") is None:
                continue
            models = [one | {"this": i == j} for j, one in enumerate(public["models"])]
            write_json(folder / COMPARISON, public | {"models": models})
            folders.append(model["model"])
    return folders


def as_evaluation(result: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `evaluation.json` for one of the models, with the original as its baseline."""

    def scores(one: Mapping[str, Any]) -> dict[str, Any]:
        names = {field.name for field in fields(Scores)}
        return {key: value for key, value in one.items() if key in names} | {"tokens": result["tokens"]}

    about = {field.name: result[field.name] for field in fields(Evaluation) if field.name in result}
    differences = {key: model[key] for key in ("nll_difference", "nll_difference_stderr")}
    return scores(model) | about | differences | {"baseline": scores(result["models"][0])}
