"""The verb `quantize`: one run, or a search, from settings or from a plan or a profile of an earlier run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.decision.default import default
from llmsqueeze.compress.fingerprint import earlier_products, fingerprint
from llmsqueeze.compress.forecast.room import check_room
from llmsqueeze.compress.job import Job, model_name, open_job, with_text
from llmsqueeze.compress.pipeline import compress
from llmsqueeze.compress.reuse import given_plan, given_profile, open_plan
from llmsqueeze.compress.search import HELD_BACK, smallest_within
from llmsqueeze.errors import RecipeError, SqueezeError
from llmsqueeze.files import read_json_if_there, write_json
from llmsqueeze.formats.folder import check_writable
from llmsqueeze.formats.imports.quantized import as_dense
from llmsqueeze.measure.profile import Profile
from llmsqueeze.memory import keep_within_block
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress, stopwatch
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.recipe.values import flag
from llmsqueeze.text.source import check_calibration

DONE = ".done.json"  # in a folder that is to be distilled: the fingerprint and the summary of the run that wrote it
DECIDES = {"method", "bits", "size", "max_ppl_increase", "max_kl", "portable", "mix", "widths"}
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
    restart: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compresses as the command says; returns its summary. What a killed run of the same command has done is not done
    again, unless it is to `restart`. A run for which memory or disk cannot suffice is refused, but for `force`."""
    start, progress = time.monotonic(), progress or Progress()
    progress = progress if processes.first() else Progress()
    keep_within_block()
    others = [flag(name) for name in (*settings, *(["profile"] if profile else []))]
    if plan is not None and others:
        raise RecipeError(f"--plan contradicts {', '.join(others)}: the plan has its own recipe")
    file = open_plan(plan) if plan is not None else None
    recipe = file.recipe if file is not None else make_recipe(with_default(source, settings, device, progress))
    folder, target = out or folder_name(source, recipe), {"target": settings.get("target")}
    check_writable(folder, overwrite)
    if recipe.needs_text or recipe.distill_steps:
        check_calibration(recipe.calibration)
    if recipe.products == "auto" and not restart:
        before = undistilled(folder) if recipe.distill_steps else folder
        recipe = replace(recipe, products=earlier_products(before) or recipe.products)
    with as_dense(source, folder, progress) as dense:
        job = open_job(dense, recipe, progress, text=False, device=pick_device(device))
        job.target()  # a budget that no plan can meet is refused before the text is read
        decision = given_plan(job, file) if file is not None else None
        if decision is not None and (without := len(job.plan.weights) - len(decision.plan.weights)):
            progress.note(f"{without} of {len(job.plan.weights)} linears are not in {plan}: they stay as they are")
        if not force:
            processes.of_first(lambda: check_room(job, decision, folder))
        job, measured = with_measurements(job, profile, progress)
        how = overwrite, verify, progress, restart, force
        if job.recipe.bounded:
            return smallest_within(job, folder, measured, *how) | target | {"time": stopwatch.measured()}
        result = run(job, folder, decision, measured, *how)
    # with all that was read before
    return result | target | {"seconds": round(time.monotonic() - start, 3), "time": stopwatch.measured()}


def with_default(source: Source, settings: Mapping[str, Any], device: str, progress: Progress) -> Mapping[str, Any]:
    """The settings, with what fits the memory here if they decide neither method nor size."""
    if settings.keys() & DECIDES or settings.get("target") not in (None, "transformers", "vllm"):
        return settings
    make_recipe(settings)  # what is wrong with them is told first
    more, note = processes.of_first(lambda: default(source, settings, pick_device(device)))
    progress.note(note)
    return {**settings, **more}


def with_measurements(job: Job, profile: Path | None, progress: Progress) -> tuple[Job, Profile | None]:
    """The job with its text, if it needs one, and what an earlier run has measured, if that is given."""
    needs_text = job.recipe.needs_text
    if needs_text or profile is not None:
        job = with_text(job, progress, HELD_BACK if job.recipe.bounded else 0)
    if profile is None:
        return job, None
    measured = given_profile(job, profile)
    return (job if needs_text else replace(job, calibration=None)), measured


def run(
    job: Job,
    out: Path,
    decision: Decision | None,
    profile: Profile | None,
    overwrite: bool,
    verify: bool,
    progress: Progress,
    restart: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """One run, and the distillation of its result if the recipe has steps of it; returns the summary."""
    from llmsqueeze.distillation.distill import working_path

    given: dict[str, Any] = {"decision": decision, "profile": profile, "verify": verify, "progress": progress}
    given |= {"restart": restart, "force": force}
    if not job.recipe.distill_steps:
        return compress(job, out, overwrite=overwrite, **given).as_dict()
    first, about = undistilled(out), processes.of_first(lambda: fingerprint(job, decision, profile, verify))
    done = processes.of_first(lambda: read_json_if_there(first / DONE))
    if restart or done.get("about") != json.loads(json.dumps(about)):
        if restart and processes.first():
            shutil.rmtree(working_path(out), ignore_errors=True)
        summary = compress(job, first, overwrite=True, **given).as_dict()
        if processes.first():
            write_json(first / DONE, {"about": about, "summary": summary})
        processes.meet()
    else:
        summary = done["summary"]
        progress.note(f"goes on with {first}, which is to be distilled")
    return summary | distilled(job, first, out, overwrite, progress)


def undistilled(out: Path) -> Path:
    """Where a result lies that is to be distilled."""
    return out.with_name(out.name + ".undistilled")


def distilled(job: Job, first: Path, out: Path, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Distils the folder `first` into `out` and removes it; returns the entries of the summary that change."""
    from llmsqueeze.distillation.distill import distill
    from llmsqueeze.distillation.settings import Distillation

    recipe, source = job.recipe, job.source
    settings = Distillation(
        steps=recipe.distill_steps,
        loss=recipe.distill_loss,
        calibration=recipe.calibration,
        samples=max(recipe.samples, min(recipe.distill_steps, MOST_SAMPLES)),
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        products=recipe.products,
    )
    try:
        summary = distill(
            str(first),
            source.model,
            settings,
            out,
            device=str(job.device),
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            adapter=source.adapter,
            merge_adapter=source.merge_adapter,
            overwrite=overwrite,
            progress=progress,
        )
    except SqueezeError as error:
        raise type(error)(f"{error}; the result before distillation is in {first}") from error
    if processes.first():
        shutil.rmtree(first, ignore_errors=True)
    changed = ("out", "kl_before", "kl_after", "peak_memory_mb", "peak_device_memory_mb")
    return {key: summary[key] for key in changed} | {"opened": [], "not_opened": {}}


def folder_name(source: Source, recipe: Recipe) -> Path:
    """`<model>-3bit`, or what else the budget is called."""
    name = model_name(source)
    if recipe.size is not None:
        unit, label = next((u, s) for u, s in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if recipe.size >= u)
        return Path(f"{name}-{recipe.size / unit:.4g}{label}")
    if recipe.bounded:
        return Path(f"{name}-smallest")
    return Path(f"{name}-{recipe.bits or recipe.code_bits:g}bit")
