"""The verb `plan`: measure (or find what was measured), decide, predict, and write it all down. Compresses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze.allocation.plan_yaml import PLAN, PROFILE, write_plan
from llmsqueeze.compress.blocks import portability
from llmsqueeze.compress.decide import decide, target_nbytes
from llmsqueeze.compress.job import prepare
from llmsqueeze.compress.outlook import curve, table
from llmsqueeze.compress.reuse import rows_by, stored_or_measured
from llmsqueeze.compress.trial import run_trial
from llmsqueeze.errors import OutputError, RecipeError
from llmsqueeze.measure.profile import Profile
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe


def plan(
    source: Source,
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    device: str = "auto",
    weights: bool = True,
    trial: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures (or reads what was measured), decides, predicts, and writes plan, profile and pictures into `out`.

    Without `weights` sizes come from `config.json` alone, and every linear gets the same widths (method budget).
    Returns what the command prints. A profile in `out` that serves is reused.
    """
    progress = progress or Progress()
    recipe = make_recipe({"method": "auto" if weights else "budget", **settings})
    if recipe.needs_steps and not weights:
        raise RecipeError(
            "what coded weights take is known by measuring; --weights none tells sizes of --method budget"
        )
    if recipe.bounded:
        raise RecipeError("a bound on quality is found by compressing and measuring: use it with `llmsqueeze quantize`")
    folder = make_folder(out or Path(f"{Path(source.model).expanduser().resolve().name}-plan"))
    place = pick_device(device)
    job = prepare(source, recipe, progress, text=weights, weights=weights, device=place)
    recipe = job.recipe
    if not weights:
        recipe = replace(recipe, importance="uniform", granularity="", portable=None)
    target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
    profile = stored_or_measured(job, recipe, folder / PROFILE, place, progress) if weights else Profile()
    decided = decide(job.plan, profile, recipe, job.skeleton.linears, target)
    about = {
        "model": Path(source.model).name if Path(source.model).is_dir() else source.model,
        "weights_sha256": profile.source.get("weights"),
        "bits_per_weight": round(decided.plan.bits_per_weight, 6),
        "nbytes": job.kept_nbytes + decided.plan.nbytes,
        "predicted_loss_increase": decided.predicted,
    }
    write_plan(folder / PLAN, decided.plan, recipe, about, rows_by(recipe), PROFILE if weights else None)
    points = curve(job.plan, recipe, profile)
    predicted = run_trial(job, folder / PLAN, place, progress) if trial and weights else {}
    return about | {
        "given": source.model,
        "out": str(folder),
        "method": recipe.method,
        "bits": decided.plan.code_bits,
        "nbytes_original": job.checkpoint.nbytes,
        "loss": profile.loss,
        "rows": table(decided, job.skeleton.linears, profile),
        **portability(recipe, job, decided),
        "curve": points,
        "blocks": job.skeleton.linears,
        "weights": {name: 8 * weight.nbytes / weight.numel for name, weight in decided.plan.weights.items()},
        "predicted_seconds": predicted.get("seconds"),
        "predicted_peak_memory_mb": predicted.get("peak_memory_mb"),
    }


def make_folder(folder: Path) -> Path:
    """The folder, made if it is not there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error}") from error
    return folder
