"""The verb `plan`: measure (or read an earlier profile), decide, predict, and write all of it. Compresses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze.allocation.plan_yaml import PLAN, PROFILE, write_plan
from llmsqueeze.allocation.prediction import likely
from llmsqueeze.compress.decision.decide import Decision, decide
from llmsqueeze.compress.decision.outlook import curve, table
from llmsqueeze.compress.forecast.room import bytes_needed
from llmsqueeze.compress.forecast.trial import run_trial
from llmsqueeze.compress.job import Job, model_name, open_job
from llmsqueeze.compress.reuse import rows_by, stored_or_measured
from llmsqueeze.compress.summary import counts_beside, portability
from llmsqueeze.errors import OutputError, RecipeError
from llmsqueeze.formats.imports.quantized import as_dense
from llmsqueeze.measure.profile import Profile
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.progress import Progress, stopwatch
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.source import check_calibration


def plan(
    source: Source,
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    device: str = "auto",
    weights: bool = True,
    trial: bool = True,
    shared_among: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures (or reads a profile in `out` that matches), decides, predicts, and writes plan and profile into `out`.

    Without `weights` sizes come from `config.json` alone, and every linear gets the same widths (method budget).
    shared_among: so many processes, for the prediction of time.
    Returns what the command prints.
    """
    progress = progress or Progress()
    recipe = plannable(settings, weights)
    check_calibration(recipe.calibration)
    folder = make_folder(out or Path(f"{model_name(source)}-plan"))
    with as_dense(source, folder, progress) as dense:
        job = open_job(
            dense, recipe, progress, text=None if weights else False, weights=weights, device=pick_device(device)
        )
        if not weights:
            job = replace(job, recipe=replace(job.recipe, importance="uniform", granularity="", portable=None))
        target = job.target()
        profile = stored_or_measured(job, folder / PROFILE, progress) if weights else Profile()
        decision = decide(job.plan, profile, job.recipe, job.skeleton.linears, target)
        about = in_short(job, profile, decision)
        write_plan(folder / PLAN, decision.plan, job.recipe, about, rows_by(job.recipe), PROFILE if weights else None)
        needed = run_trial(job, folder / PLAN, progress, shared_among) if trial and weights else {}
    return (
        about
        | {"given": source.name, "options": source.options, "out": str(folder)}
        | at_length(job, profile, decision)
        | {f"predicted_{key}": needed.get(key) for key in ("seconds", "time", "peak_memory_mb")}
        | {"predicted_disk_bytes": bytes_needed(job, decision), "processes": shared_among}
        | {"time": stopwatch.measured()}
    )


def plannable(settings: Mapping[str, Any], weights: bool) -> Recipe:
    """The recipe of a plan. Raises RecipeError for one that cannot be planned, with or without `weights`."""
    recipe = make_recipe({"method": "auto" if weights else "budget", **settings})
    if recipe.needs_steps and not weights:
        raise RecipeError(
            "--weights none does not apply to --method coded, whose sizes must be measured: use --method budget"
        )
    if (recipe.outliers or recipe.bends == "outliers") and not weights:
        raise RecipeError(f"--weights none does not apply to outliers (--method {recipe.method}), which must be ranked")
    if recipe.bounded:
        raise RecipeError("a bound on quality needs compressed weights to measure: use it with `llmsqueeze quantize`")
    return recipe


def in_short(job: Job, profile: Profile, decision: Decision) -> dict[str, Any]:
    """What the plan file says beside the plan: the model, sizes, the promise."""
    model = job.source.name
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "weights_sha256": profile.source.get("weights"),
        "bits_per_weight": round(decision.plan.bits_per_weight, 6),
        "nbytes": job.kept_nbytes + decision.plan.nbytes,
        "predicted_loss_increase": decision.predicted,
    }


def at_length(job: Job, profile: Profile, decision: Decision) -> dict[str, Any]:
    """What the command prints beside that."""
    plan = decision.plan
    return {
        "method": job.recipe.method,
        "bits": plan.code_bits,
        "nbytes_original": job.nbytes_original,
        "loss": profile.loss,
        "predicted_loss_interval": None if decision.predicted is None else likely(decision.predicted),
        "rows": table(decision, job.skeleton.linears, job.skeleton.outer, profile),
        "block_scores": decision.block_scores,
        **portability(job, decision),
        "towers": counts_beside(job, job.plan.towers),
        "embeddings": counts_beside(job, job.plan.ends),
        "curve": curve(job.plan, job.recipe, profile) if decision.predicted is not None else [],
        "blocks": job.skeleton.linears,
        "weights": {name: 8 * plan.nbytes_of(name) / weight.numel for name, weight in plan.weights.items()},
    }


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error}") from error
    return folder
