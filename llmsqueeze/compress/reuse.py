"""Plans and profiles made before: found, checked against the model, and measured anew where they do not serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmsqueeze import __version__
from llmsqueeze.allocation.plan_yaml import PLAN, PlanFile, plan_of, read_plan
from llmsqueeze.compress.decide import (
    Decision,
    coded,
    options_of,
    priced,
    request_of,
    salience_grids,
    target_nbytes,
    with_rows,
)
from llmsqueeze.compress.job import Job
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.measure.profile import Profile, lacks, load, save
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.checkpoint import file_digests, weights_digest
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe

SALIENCE_WIDTHS = (2, 3, 4)


def rows_by(recipe: Recipe) -> str | None:
    """The ranking behind the counts of rows; None where linears are not mixed."""
    if recipe.method == "mixllm":
        return recipe.importance
    if recipe.method == "budget":
        return "cost" if recipe.importance == "cost" else "random"
    return None


def source_of(job: Job, recipe: Recipe, known: Profile | None = None) -> dict[str, Any]:
    """What a profile of this job and recipe is of; files that `known` has seen are not read again."""
    assert job.calibration is not None
    files = file_digests(job.checkpoint, known.source.get("files") if known else None)
    return {
        "files": files,
        "weights": weights_digest(files),
        "calibration": job.calibration.sha256,
        "seed": recipe.seed,
        "labels": recipe.labels,
        "quantizer": recipe.quantizer,
        "search": recipe.search,
        "skip": list(recipe.skip),
        "outliers": [recipe.outliers, recipe.outlier_ranking, recipe.outlier_scope],
        "llmsqueeze": __version__,
    }


def stored_or_measured(job: Job, recipe: Recipe, path: Path, place: torch.device, progress: Progress) -> Profile:
    """The profile at `path` if it serves, else a new one, which is then written there."""
    request = request_of(recipe)
    if recipe.method == "budget":
        request = replace(request, options=options_of(recipe))
    if path.exists():
        known = load(path)
        reason = lacks(known, source_of(job, recipe, known), request)
        if reason is None:
            return known
        progress.note(f"{path} does not match this recipe ({reason}); it is measured again")
    widths = tuple(dict.fromkeys((*SALIENCE_WIDTHS, *request.salience_widths)))
    request = replace(request, salience=salience_grids(recipe, widths), lim=True, zd=True)
    if recipe.method == "budget":
        request = replace(request, options=priced(recipe))
    assert job.calibration is not None
    with Spill(parent=path.parent) as spill:
        walk = Walk(job.skeleton, job.calibration.rows, spill, torch.float32, place)
        profile = measure(walk, walk.embed(), job.plan.dtypes, request, progress)
    profile = replace(profile, source=source_of(job, recipe))
    save(profile, path)
    return profile


def given_profile(job: Job, recipe: Recipe, path: Path) -> Profile:
    """The profile that the user names. Raises RecipeError if it is of something else than the recipe wants."""
    profile = load(path)
    request = request_of(recipe)
    if recipe.needs_costs:
        request = replace(request, options=options_of(recipe))
    reason = lacks(profile, source_of(job, recipe, profile), request)
    if reason is not None:
        raise RecipeError(f"the profile {path} does not match this recipe: {reason}; omit --profile to measure again")
    return profile


def given_plan(job: Job, file: PlanFile) -> Decision:
    """The decision in a plan file, checked against the model. Raises RecipeError where it is for another."""
    profile = load(file.profile) if file.profile is not None else Profile()
    if file.weights_sha256 is not None:
        files = file_digests(job.checkpoint, profile.source.get("files"))
        if weights_digest(files) != file.weights_sha256:
            raise RecipeError(f"{file.path} is a plan for other weights than those of {job.source.model}")
    if file.profile is not None and profile.source.get("weights") != file.weights_sha256:
        raise RecipeError(f"{file.path} and {file.profile} are for different weights")
    found = plan_of(file, job.plan)
    ranked_weights = [name for name, weight in found.weights.items() if weight.outliers]
    ranked = found.mixed and rows_by(file.recipe) not in (None, "random")
    if file.profile is None and (ranked or ranked_weights):
        raise RecipeError(f"{file.path} names no profile, which would say which rows or weights its counts mean")
    for name in ranked_weights:
        there = len(profile.candidates[name].index) if name in profile.candidates else 0
        if found.weights[name].outliers > there:
            raise RecipeError(f"{file.path}, {name}: {file.profile} ranks {there} of its weights as outliers, no more")
    if file.recipe.needs_steps:
        if not profile.curves:
            raise RecipeError(f"{file.path} names no profile that knows what coded weights cost")
        target = target_nbytes(file.recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
        return coded(found, profile, target)
    return with_rows(compressed_tensors.settled(found, file.recipe.portable), profile, file.recipe)


def open_plan(path: Path) -> PlanFile:
    """`read_plan`, for a file or the folder that `llmsqueeze plan` wrote."""
    return read_plan(path / PLAN if path.is_dir() else path)
