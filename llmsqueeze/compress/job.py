"""What a run works on: the opened model, the linears to compress on the recipe's base grid, the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmsqueeze.allocation.plan import Plan, base_plan, planned_linears
from llmsqueeze.model.calibration import read_calibration
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.original import Original, Source, open_original
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.text import Calibration
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import fitted


@dataclass(frozen=True)
class Job:
    """An opened model, the recipe as it fits the model, its base plan, and the calibration text, if one is needed."""

    original: Original
    recipe: Recipe
    plan: Plan
    calibration: Calibration | None

    @property
    def source(self) -> Source:
        return self.original.source

    @property
    def path(self) -> Path:
        return self.original.path

    @property
    def checkpoint(self) -> Checkpoint:
        return self.original.checkpoint

    @property
    def skeleton(self) -> Skeleton:
        return self.original.skeleton

    @property
    def kept_nbytes(self) -> int:
        """Bytes of all weights beside the planned linears."""
        return self.checkpoint.nbytes - self.dense_nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the planned linears in the original."""
        names = (self.skeleton.sources[f"{name}.weight"] for name in self.plan.weights)
        return sum(self.checkpoint.tensors[name].nbytes for name in names)


def prepare(
    source: Source,
    recipe: Recipe,
    progress: Progress,
    text: bool | None = None,
    weights: bool = True,
    held_back: int = 0,
    device: torch.device | None = None,
) -> Job:
    """Finds and lays out the model and fits the recipe to it; reads the text if one is needed, or as `text` says.

    Without `weights` only the model's configuration has to be there. `held_back`: samples to keep for measuring.
    `device`: where a model that samples its own text does so.
    """
    original = open_original(source, weights)
    recipe, note = fitted(recipe, columns(original.skeleton, recipe))
    if note is not None:
        progress.note(note)
    plan = base_plan(original.skeleton, recipe)
    calibration = None
    if recipe.needs_text if text is None else text:
        calibration = read_calibration(original, recipe.text, progress, held_back, device)
    return Job(original, recipe, plan, calibration)


def columns(skeleton: Skeleton, recipe: Recipe) -> dict[str, int]:
    """Linear -> number of its columns; empty if the recipe needs no group size, or names several."""
    if not recipe.entry.on_grids or recipe.group_sizes:
        return {}
    return {name: skeleton.shape(name)[1] for name in planned_linears(skeleton, recipe.skip)}
