"""The verb `quantize`: from what was asked for, with a plan or a profile made before, to one run or a search."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsqueeze.compress import blocks
from llmsqueeze.compress.job import prepare
from llmsqueeze.compress.reuse import given_plan, given_profile, open_plan
from llmsqueeze.compress.search import smallest_within
from llmsqueeze.errors import RecipeError, SqueezeError
from llmsqueeze.formats.folder import check_writable
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe

MOST_SAMPLES = 1024  # of text that distillation reads


def quantize(
    source: Source,
    settings: Mapping[str, Any],
    out: Path | None,
    *,
    plan: Path | None = None,
    profile: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compresses as the command says; returns its summary."""
    start, progress = time.monotonic(), progress or Progress()
    decided = measured = None
    if plan is not None:
        if contradiction := next((key for key in (*settings, *(["profile"] if profile else []))), None):
            raise RecipeError(f"--plan contradicts --{contradiction.replace('_', '-')}: the plan has its own recipe")
        file = open_plan(plan)
        recipe = file.recipe
        check_writable(out or folder_name(source, recipe), overwrite)
        decided = given_plan(prepare(source, recipe, progress, text=False), file)
    else:
        recipe = make_recipe(settings)
    folder = out or folder_name(source, recipe)
    check_writable(folder, overwrite)
    if profile is not None:
        job = prepare(source, recipe, progress, text=True, device=pick_device(device))
        measured = given_profile(job, job.recipe, profile)
    if recipe.bounded:
        return smallest_within(source, recipe, folder, measured, device, overwrite, verify, progress)
    first = folder.with_name(folder.name + ".undistilled") if recipe.distill_steps else folder
    summary = blocks.quantize(
        source,
        recipe,
        first,
        device=device,
        overwrite=overwrite or first != folder,
        decided=decided,
        profile=measured,
        verify=verify,
        progress=progress,
    )
    result = summary.as_dict()
    if first != folder:
        result |= distilled(source, recipe, first, folder, device, overwrite, progress)
    return result | {"seconds": round(time.monotonic() - start, 3)}  # with what was read before


def distilled(
    source: Source, recipe: Recipe, first: Path, out: Path, device: str, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Distils the folder `first` into `out` and removes it; returns what changes in the summary."""
    from llmsqueeze.distillation.distill import distill
    from llmsqueeze.distillation.settings import Distillation

    settings = Distillation(
        steps=recipe.distill_steps,
        loss=recipe.distill_loss,
        calibration=recipe.calibration,
        samples=max(recipe.samples, min(4 * recipe.distill_steps, MOST_SAMPLES)),
        seq_len=recipe.seq_len,
        seed=recipe.seed,
    )
    try:
        made = distill(
            str(first),
            source.model,
            settings,
            out,
            device=device,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    except SqueezeError as error:
        raise type(error)(f"{error}; what there was before distilling is in {first}") from error
    shutil.rmtree(first, ignore_errors=True)
    return {key: made[key] for key in ("out", "kl_before", "kl_after", "peak_memory_mb", "peak_device_memory_mb")}


def folder_name(source: Source, recipe: Recipe) -> Path:
    """`<model>-3bit`, or what else the budget is called."""
    name = Path(source.model).expanduser().resolve().name
    if recipe.size is not None:
        unit, label = next((u, s) for u, s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if recipe.size >= u)
        return Path(f"{name}-{recipe.size / unit:.4g}{label}")
    if recipe.bounded:
        return Path(f"{name}-smallest")
    return Path(f"{name}-{recipe.bits or recipe.code_bits:g}bit")
