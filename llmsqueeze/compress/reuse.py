"""Plans and profiles of earlier runs: read, checked against the model, and measured again if they do not match."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze import __version__
from llmsqueeze.allocation import allocator
from llmsqueeze.allocation.options import options_of, priced, request_of, salience_grids
from llmsqueeze.allocation.plan_yaml import PLAN, PROFILE, PlanFile, plan_of, read_plan
from llmsqueeze.compress.decision.decide import Decision, completed
from llmsqueeze.compress.job import Job, measure_job
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.measure.profile import Profile, lacks, load, misfit, save
from llmsqueeze.model.checkpoint import weights_digest
from llmsqueeze.model.experts.find import expert_linears
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe

SALIENCE_WIDTHS = (2, 3, 4)


def rows_by(recipe: Recipe) -> str | None:
    """The ranking behind the counts of rows; None if linears are not mixed."""
    if recipe.decides == "rows":
        return recipe.importance
    if recipe.decides == "options":
        return "cost" if recipe.needs_costs else "random"
    return None


def origin_of(job: Job, stored: Profile | None = None) -> dict[str, Any]:
    """The model, text and settings that a profile of this job is of; files that `stored` is of are not read again."""
    recipe = job.recipe
    files = job.digests(stored.source.get("files") if stored else None)
    return {
        "files": files,
        "weights": weights_digest(files),
        "calibration": job.calibration.sha256 if job.calibration is not None else None,
        "seed": recipe.seed,
        "labels": recipe.labels,
        "prices": "trace" if recipe.importance == "trace" else "cost",
        "products": recipe.products,
        "quantizer": recipe.quantizer,
        "search": recipe.search,
        "skip": list(recipe.skip),
        "outliers": [recipe.outliers, recipe.outlier_ranking, recipe.outlier_scope],
        "llmsqueeze": __version__,
    }


def shapes_of(job: Job) -> dict[str, tuple[int, int]]:
    """linear -> [rows, cols]."""
    return {name: weight.shape for name, weight in job.plan.weights.items()}


def stored_or_measured(job: Job, path: Path, progress: Progress) -> Profile:
    """The profile at `path` if it matches the job, else a new one, which is then written there."""
    recipe, request = job.recipe, request_of(job.recipe)
    if recipe.decides == "options":
        request = replace(request, options=options_of(recipe))
    if path.exists():
        stored = load(path)
        reason = lacks(stored, origin_of(job, stored), request) or misfit(stored, shapes_of(job))
        if reason is None:
            return stored
        progress.note(f"{path} does not match this recipe ({reason}); it is measured again")
    request = replace(request, groups=True)
    if request.salience:  # the gradients take the time, so that other budgets may be served too
        widths = tuple(dict.fromkeys((*SALIENCE_WIDTHS, *request.salience_widths)))
        request = replace(request, salience=salience_grids(recipe, widths))
    if recipe.decides == "options":
        request = replace(request, options=priced(recipe))
    profile = replace(measure_job(job, request, path.parent, progress), source=origin_of(job))
    save(profile, path)
    return profile


def given_profile(job: Job, path: Path) -> Profile:
    """The profile at `path`, or in the folder of a plan. Raises RecipeError if it does not match the job."""
    path = path / PROFILE if path.is_dir() else path
    profile, request = load(path), request_of(job.recipe)
    if job.recipe.needs_costs:
        request = replace(request, options=options_of(job.recipe))
    reason = lacks(profile, origin_of(job, profile), request) or misfit(profile, shapes_of(job))
    if reason is not None:
        raise RecipeError(f"the profile {path} does not match this recipe: {reason}; omit --profile to measure again")
    return profile


def given_plan(job: Job, file: PlanFile) -> Decision:
    """The decision in a plan file, checked against the model. Raises RecipeError if it is for another."""
    profile = load(file.profile) if file.profile is not None else Profile()
    if file.weights_sha256 is not None:
        files = job.digests(profile.source.get("files"))
        if weights_digest(files) != file.weights_sha256:
            raise RecipeError(f"{file.path} is a plan for other weights than those of {job.source.name}")
    if file.profile is not None and profile.source.get("weights") != file.weights_sha256:
        raise RecipeError(f"{file.path} and {file.profile} are for different weights")
    if reason := misfit(profile, shapes_of(job)):
        raise RecipeError(f"{file.profile} does not fit to the model: {reason}")
    plan = plan_of(file, job.plan)
    with_outliers = [name for name, weight in plan.weights.items() if weight.outliers]
    ranked = plan.mixed and rows_by(file.recipe) not in (None, "random")
    if file.profile is None and (ranked or with_outliers):
        raise RecipeError(f"{file.path} names no profile, which would rank the rows or weights that its counts mean")
    for name in with_outliers:
        count = len(profile.candidates[name].index) if name in profile.candidates else 0
        if plan.weights[name].outliers > count:
            raise RecipeError(f"{file.path}, {name}: {file.profile} ranks only {count} of its weights as outliers")
    if file.recipe.needs_steps:
        if not profile.curves:
            raise RecipeError(f"{file.path} names no profile that has costs of coded weights")
        plan = allocator(file.recipe.method)(plan, profile, file.recipe, (), job.target())
    else:
        plan = compressed_tensors.writable_plan(plan, file.recipe.portable, expert_linears(job.skeleton.model))
    return completed(plan, profile, file.recipe, job.target())


def open_plan(path: Path) -> PlanFile:
    """`read_plan`, for a file or the folder that `llmsqueeze plan` wrote."""
    return read_plan(path / PLAN if path.is_dir() else path)
