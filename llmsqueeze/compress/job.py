"""A job: the opened model, the recipe, the linears to compress on its base grid, the text. Opened once, passed on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.allocation.plan import Plan, WeightPlan, base_plan, planned_linears, plans_beside
from llmsqueeze.compress.decision.bend import bent, lowered
from llmsqueeze.compress.decision.target import target_nbytes
from llmsqueeze.errors import RecipeError, UnsupportedError, first_line
from llmsqueeze.files import ADAPTER_WEIGHTS
from llmsqueeze.formats.imports.quantized import GGUF
from llmsqueeze.journal import NO_JOURNAL, Journal
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.recorder import needs_more
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.calibration import read_calibration
from llmsqueeze.model.checkpoint import Checkpoint, file_digests
from llmsqueeze.model.config import attention_kernel
from llmsqueeze.model.linears import find_towers
from llmsqueeze.model.original import Original, Source, open_original
from llmsqueeze.model.precision import fastest_dtype
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import SHARES, Shares
from llmsqueeze.progress import Progress, stopwatch
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import fitted
from llmsqueeze.text.rows import Calibration

CPU = torch.device("cpu")
TRIED_TOKENS = 8
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
# of a sample text that prices are measured on; gradients per row and moments differ little with more of it
ENOUGH_TOKENS, TOKENS_PER_COLUMN = 8192, 4
GOOD_TOKENS_PER_COLUMN = 8  # on SmolLM2-135M, about those from which on little of the moments is chance


@dataclass(frozen=True)
class Job:
    """An opened model, and the recipe as it fits the model.

    plan: its linears as the recipe's base plan has them; calibration: the text, if it was read; device: of all runs.
    """

    original: Original
    recipe: Recipe
    plan: Plan
    calibration: Calibration | None = None
    device: torch.device = CPU

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
    def samples(self) -> list[Tensor]:
        """Token rows [1, length] of the text; none if it was not read."""
        return self.calibration.rows if self.calibration is not None else []

    def digests(self, previous: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """`file_digests` of the model, and of the adapter that is merged into it."""
        adapter = self.original.adapter
        return file_digests(self.checkpoint, previous, () if adapter is None else (adapter / ADAPTER_WEIGHTS,))

    @property
    def kept_nbytes(self) -> int:
        """Bytes of all weights beside the planned linears, of those that are rounded too as they will be."""
        return kept_nbytes(self.skeleton, self.plan.weights, self.plan.beside)

    @property
    def nbytes_original(self) -> int:
        """Bytes of the weights that the model uses."""
        return self.skeleton.stored_nbytes

    def target(self) -> int:
        """Bytes that the linears may take; UNBOUNDED without a budget. Raises RecipeError if no plan can meet it."""
        return target_nbytes(self.recipe, self.plan, self.kept_nbytes, self.nbytes_original)

    def asking(self, recipe: Recipe) -> Job:
        """The same model and text with another recipe."""
        return replace(self, recipe=recipe, plan=base_plan(self.skeleton, recipe))

    def walk(self, spill: Spill) -> Walk:
        """A walk over the samples."""
        return self.walk_over(self.samples, spill)

    def walk_over(self, samples: list[Tensor], spill: Spill) -> Walk:
        """A walk over some of them."""
        if processes.count() > min(SHARES, max(1, len(samples))):
            raise RecipeError(
                f"{processes.count()} processes cannot share {len(samples)} samples; start at most "
                f"{min(SHARES, len(samples))}, or take shorter samples, of which more are measured"
            )
        products, shares = getattr(torch, self.recipe.products), Shares.of(len(samples))
        own = [samples[number] for number in shares.numbers]
        return Walk(self.skeleton, own, spill, torch.float32, self.device, products, shares)


def model_name(source: Source) -> str:
    """The model's name without its owner or folder; folders of results begin with it."""
    path = Path(source.name).expanduser().resolve()
    return path.stem if path.suffix.lower() == GGUF else path.name


def open_job(
    source: Source,
    recipe: Recipe,
    progress: Progress,
    text: bool | None = None,
    weights: bool = True,
    device: torch.device = CPU,
) -> Job:
    """Finds and lays out the model and fits the recipe to it; reads the text if one is needed, or as `text` says.

    Without `weights` only the model's configuration has to be there.
    """
    stopwatch.computes_on(str(device))
    original = open_original(source, weights)
    if weights and recipe.needs_text:
        original = replace(original, skeleton=in_turn(original.skeleton, progress))
    recipe, note = fitted(recipe, columns(original.skeleton, recipe))
    if note is not None:
        progress.note(note)
    if note := left_out(original.skeleton):
        progress.note(note)
    if kernel := attention_kernel(original.checkpoint.config):
        progress.note(
            f"config.json asks for {kernel}, which compression does not need; the result's does not ask for it"
        )
    if find_towers(original.skeleton.model) and not any((original.path / name).exists() for name in PROCESSORS):
        progress.note(f"{original.path} has no processor ({PROCESSORS[0]}); the result will have none either")
    recipe = within_budget(original.skeleton, recipe, progress)
    job = Job(original, recipe, base_plan(original.skeleton, recipe), device=device)
    job = replace(job, recipe=with_products(recipe, progress, device))
    return with_text(job, progress) if (job.recipe.needs_text if text is None else text) else job


def within_budget(skeleton: Skeleton, recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe with what its budget decides of the whole model: the option that bends, or the width of low rows."""
    linears = planned_linears(skeleton, recipe.skip)
    about = skeleton, kept_nbytes(skeleton, linears, plans_beside(skeleton, recipe)), skeleton.stored_nbytes
    if not recipe.bends:
        return lowered(recipe, *about)
    decided, note = bent(recipe, *about)
    progress.note(note)
    return decided


def kept_nbytes(skeleton: Skeleton, planned: Iterable[str], beside: Mapping[str, WeightPlan]) -> int:
    """Bytes of all weights but the planned ones, of those that are rounded beside them as they will be."""
    dense = sum(skeleton.nbytes(f"{name}.weight") for name in (*planned, *beside))
    return skeleton.stored_nbytes - dense + sum(weight.nbytes for weight in beside.values())


def in_turn(skeleton: Skeleton, progress: Progress) -> Skeleton:
    """The skeleton, with one block if what it has cannot be walked in turn; as it is, if that does not help. Only
    models are tried whose blocks demand more than hidden states, or that have linears around them or shared by several.
    """
    if not skeleton.outer and not any(needs_more(skeleton.module(block)) for block in skeleton.blocks):
        return skeleton
    row, enclosed = torch.zeros(1, TRIED_TOKENS, dtype=torch.long), skeleton.enclosed()
    with Spill() as spill:
        try:
            Walk(skeleton, [row], spill, torch.float32, CPU).embed()
            return skeleton
        except UnsupportedError as error:
            reason = first_line(error)
        try:
            Walk(enclosed, [row], spill, torch.float32, CPU).embed()
        except Exception:  # whatever it is, the reason above is what the user has to know
            return skeleton
    progress.note(f"the model is compressed as one block, all of it in memory: {reason}")
    return enclosed


def left_out(skeleton: Skeleton) -> str | None:
    """What to say of the tensors in the checkpoint that the result will not have; None if it will have all."""
    if not (unused := skeleton.unused):
        return None
    nbytes = sum(stored.nbytes for stored in unused.values())
    return (
        f"{len(unused)} tensors of {nbytes} bytes, among them {next(iter(unused))}, are not part of the model that "
        "config.json describes: they are left out, and not counted"
    )


def with_products(recipe: Recipe, progress: Progress, device: torch.device) -> Recipe:
    """The recipe with the dtype of the products decided: by a short trial, if it is open and the model is run."""
    if recipe.products != "auto":
        return recipe
    chosen = torch.float32 if "products" in recipe.unused() else fastest_dtype(device)
    if chosen != torch.float32:
        progress.note("linears multiply in bfloat16, which is faster here (--products float32 for the other)")
    return replace(recipe, products=str(chosen).removeprefix("torch."))


def columns(skeleton: Skeleton, recipe: Recipe) -> dict[str, int]:
    """Linear -> number of its columns; empty if the recipe needs no group size, or names several."""
    if not recipe.entry.on_grids or recipe.group_sizes:
        return {}
    return {name: skeleton.shape(name)[1] for name in planned_linears(skeleton, recipe.skip)}


def with_text(job: Job, progress: Progress, held_back: int = 0) -> Job:
    """The job with its calibration text; a model that generates it does so on the job's device.

    `held_back`: samples to keep for measuring.
    """

    def read() -> Calibration:
        return read_calibration(job.original, job.recipe.text, progress, held_back, job.device)

    job = replace(job, calibration=processes.of_first(read))
    if job.recipe.needs_moments and (note := few_tokens(job)):
        progress.note(note)
    return job


def few_tokens(job: Job) -> str | None:
    """What to say if the text has few tokens for the columns of the widest linear, and how many are enough."""
    widest = max((weight.shape[1] for weight in job.plan.weights.values()), default=0)
    if job.calibration is None or job.calibration.tokens >= TOKENS_PER_COLUMN * widest:
        return None
    enough = GOOD_TOKENS_PER_COLUMN * widest
    samples = math.ceil(enough * len(job.calibration.rows) / job.calibration.tokens)
    return (
        f"{job.calibration.tokens} tokens of text are few for linears of {widest} columns, and may do harm: take "
        f"{enough} or more (--samples {samples} of this length)"
    )


def measured_samples(job: Job, request: Request) -> list[Tensor]:
    """The samples that are measured: the first that are enough for prices, all for what a paper defines on all."""
    if not request.prices or request.weight_gradients or request.lim:
        return job.samples
    widest = max(weight.shape[1] for weight in job.plan.weights.values())
    enough, taken = max(ENOUGH_TOKENS, TOKENS_PER_COLUMN * widest), 0
    for count, sample in enumerate(job.samples):
        if taken >= enough:
            return job.samples[:count]
        taken += sample.shape[1]
    return job.samples


def measure_job(job: Job, request: Request, folder: Path, progress: Progress, journal: Journal = NO_JOURNAL) -> Profile:
    """The profile of the job's linears; activations are kept in `folder` meanwhile."""
    with Spill(parent=folder) as spill:
        walk = job.walk_over(measured_samples(job, request), spill)
        inputs = walk.embed() if request.needs_text else Activations(spill)
        return measure(walk, inputs, job.plan.dtypes, request, progress, journal)
