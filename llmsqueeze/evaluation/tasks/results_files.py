"""lm-eval's own results files, written by its own code, so that its tools read them.

In `--output-path`, in a folder named after the model: results_<date>.json, and with --log-samples one
samples_<task>_<date>.jsonl per task.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import OutputError, first_line
from llmsqueeze.evaluation.models import OpenModel
from llmsqueeze.evaluation.options import Limit
from llmsqueeze.evaluation.tasks.options import TaskOptions

if TYPE_CHECKING:
    from llmsqueeze.evaluation.tasks.harness import Harness

BOOTSTRAPS = 1000  # for standard errors that have no formula


def make_folder(path: Path | None) -> None:
    """Makes the folder for results, before anything is measured for it. Raises OutputError."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output-path {path} cannot be made: {first_line(error)}") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"--output-path {path} is not writable")


def write_results(
    outcome: Mapping[str, Any],
    opened: OpenModel,
    model: Harness,
    options: TaskOptions,
    limit: Limit | None,
) -> list[Path]:
    """Writes what `lm_eval.evaluate` returned into `options.output_path`; returns the files. Raises OutputError."""
    from lm_eval.loggers import EvaluationTracker

    if options.output_path is None:
        return []
    arguments = {"pretrained": opened.name, "dtype": opened.computed_in, "softmax_dtype": "float32"}
    tracker = EvaluationTracker(output_path=str(options.output_path))
    tracker.general_config_tracker.log_experiment_args(
        model_source="hf",
        model_args=arguments,
        system_instruction=options.system_instruction,
        chat_template=model.chat_template(True) if options.apply_chat_template else None,
        fewshot_as_multiturn=options.apply_chat_template,
    )
    samples = outcome["samples"]
    results = {key: value for key, value in outcome.items() if key != "samples"} | about_run(model)
    results["config"] = {"model": "hf", "model_args": arguments} | settings_of(opened, model, options, limit)
    tracker.save_results_aggregated(results=results, samples=samples)
    if options.log_samples:
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
    folder = options.output_path / str(tracker.general_config_tracker.model_name_sanitized)
    date = getattr(tracker, "date_id", None)
    files = sorted(folder.glob(f"*_{date}.json*")) if date else []
    if len(files) != 1 + options.log_samples * len(results["configs"]):  # lm-eval only logs what fails
        raise OutputError(f"lm-eval could not write its results into {folder}; is it writable, and the disk not full?")
    return files


def about_run(model: Harness) -> dict[str, Any]:
    """What lm-eval notes of a run, but for the description of the machine."""
    from lm_eval.loggers.utils import add_tokenizer_info

    about: dict[str, Any] = {"git_hash": None, "date": time.time()}
    about |= {f"{name}_version": version(name) for name in ("transformers", "lm_eval")}
    add_tokenizer_info(about, model)
    return about


def settings_of(opened: OpenModel, model: Harness, options: TaskOptions, limit: Limit | None) -> dict[str, Any]:
    """The settings of a run, by lm-eval's names."""
    seeds = dict(zip(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), options.seed, strict=True))
    return {
        "model_num_parameters": opened.model.num_parameters(),
        "model_dtype": opened.computed_in,
        "batch_size": model.batch_size,
        "batch_sizes": list(model.batch_sizes.values()),
        "device": str(opened.model.device),
        "use_cache": None,
        "limit": limit,
        "bootstrap_iters": BOOTSTRAPS,
        "gen_kwargs": dict(options.gen_kwargs) or None,
        **seeds,
    }
