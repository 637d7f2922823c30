"""The smallest result within a bound on quality: compress, measure on held-back text, move along the allocator's order.

The predicted curve says where to begin and, scaled by what was measured last, where to go on; the bracket between a
result that keeps the bound and one that breaks it halves at worst. What is returned was measured, not assumed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.compress import blocks
from llmsqueeze.compress.decide import request_of
from llmsqueeze.compress.job import Job, prepare
from llmsqueeze.compress.outlook import curve
from llmsqueeze.errors import BudgetError, CalibrationError, RecipeError
from llmsqueeze.evaluation.evaluate import evaluate_rows
from llmsqueeze.formats.folder import partial_folder, publish
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe

HELD_BACK, FEWEST = 64, 4
WIDTH = 0.02  # of the bracket that is narrow enough, in bits per weight
ROUNDS = 9


@dataclass(frozen=True)
class Round:
    """One size tried: its bits per weight, the loss predicted, and what was measured against the bound; infinite for a
    size that cannot be had."""

    bits: float
    predicted: float
    loss_increase: float
    perplexity_increase: float
    kl_mean: float
    measured: float
    kept: bool


def smallest_within(
    source: Source,
    recipe: Recipe,
    out: Path,
    profile: Profile | None,
    device: str,
    overwrite: bool,
    verify: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Compresses to the smallest size that keeps the recipe's bound; returns the summary, with every round."""
    job = prepare(source, recipe, progress, held_back=HELD_BACK, device=pick_device(device))
    assert job.calibration is not None
    if len(job.calibration.held_back) < FEWEST:
        raise CalibrationError(
            f"a bound is measured on calibration text held back, at least {FEWEST} samples; the text fills only "
            f"{len(job.calibration.rows) + len(job.calibration.held_back)}: use fewer --samples or a longer text"
        )
    with partial_folder(out) as folder:
        search = _Search(source, recipe, job, folder, device, progress, profile, verify)
        tried = bisect(search.attempt, search.points, search.bound)
        rounds = [one for one in tried if math.isfinite(one.measured)]
        if not rounds and search.refused is not None:
            raise search.refused
        kept = [one for one in rounds if one.kept]
        if not kept:
            least = min(rounds, key=lambda one: one.measured)
            raise RecipeError(
                f"no plan keeps within the bound: the best, of {least.bits:.3f} bits per weight, measures "
                f"{least.measured:.4g} on held-back text"
            )
        publish(search.best, out, overwrite)
    chosen = min(kept, key=lambda one: one.bits)
    return search.summary | {
        "out": str(out),
        "perplexity_increase": chosen.perplexity_increase,
        "kl_mean": chosen.kl_mean,
        "rounds": [asdict(one) for one in rounds],
    }


class _Search:
    """Compresses to a size and measures it; keeps the smallest folder that is within the bound."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        job: Job,
        folder: Path,
        device: str,
        progress: Progress,
        profile: Profile | None,
        verify: bool,
    ) -> None:
        self.source, self.recipe, self.job, self.folder = source, job.recipe, job, folder
        self.device, self.progress, self.verify = device, progress, verify
        self.profile = profile or self._measured()
        self.points = curve(job.plan, recipe, self.profile)
        self.best, self.best_bits = folder / "best", math.inf
        self.summary: dict[str, Any] = {}
        self.refused: BudgetError | None = None

    @property
    def bound(self) -> float:
        """The bound, of the KL or of the relative rise of the perplexity; either is about the rise of the loss."""
        return self.recipe.max_kl or self.recipe.max_ppl_increase or 0.0

    def attempt(self, bits: float) -> Round:
        """Compresses to an average of `bits` and measures."""
        sized = replace(self.recipe, max_ppl_increase=None, max_kl=None, bits=float(bits))
        made = self.folder / "tried"
        try:
            summary = blocks.quantize(
                self.source,
                sized,
                made,
                device=self.device,
                overwrite=True,
                profile=self.profile,
                verify=self.verify,
                progress=self.progress,
            )
        except BudgetError as error:  # the least sizes are estimates: a run may find that it takes more
            self.refused = error
            self.progress.note(f"{bits:.3f} bits per weight cannot be had: {error}")
            return Round(bits, 0.0, 0.0, 0.0, 0.0, math.inf, False)
        assert self.job.calibration is not None
        rows = self.job.calibration.held_back
        trust = self.source.trust_remote_code
        place = pick_device(self.device)
        found = evaluate_rows(str(made), str(self.job.path), rows, place, trust, self.progress)
        increase, kl = math.expm1(found.nll_difference), found.kl_mean
        measured = increase if self.recipe.max_kl is None else kl
        kept, spent = measured <= self.bound, summary.bits_per_weight
        said = f"{'within' if kept else 'beyond'} {self.bound:g}"
        self.progress.note(f"{spent:.3f} bits per weight measures {measured:.4g} on held-back text, {said}")
        if kept and spent < self.best_bits:
            shutil.rmtree(self.best, ignore_errors=True)
            made.rename(self.best)
            self.best_bits, self.summary = spent, summary.as_dict()
        return Round(spent, summary.predicted_loss_increase or 0.0, found.nll_difference, increase, kl, measured, kept)

    def _measured(self) -> Profile:
        assert self.job.calibration is not None
        place = pick_device(self.device)
        with Spill(parent=self.folder) as spill:
            walk = Walk(self.job.skeleton, self.job.calibration.rows, spill, torch.float32, place)
            return measure(walk, walk.embed(), self.job.plan.dtypes, request_of(self.recipe), self.progress)


def bisect(attempt: Callable[[float], Round], points: Sequence[tuple[float, float]], bound: float) -> list[Round]:
    """The rounds of the search. `points`: (bits per weight, predicted loss), falling; `bound`: of the measured loss.

    Ends when a size that keeps the bound and one that breaks it lie within `WIDTH` bits, or no other size is there.
    """
    smallest, largest = points[0][0], points[-1][0]
    rounds: list[Round] = []
    guess, step = _where(points, bound), 0.1
    while len(rounds) < ROUNDS:
        found = attempt(guess)
        rounds.append(found)
        keeping = min((one for one in rounds if one.kept), key=lambda one: one.bits, default=None)
        breaking = max((one for one in rounds if not one.kept), key=lambda one: one.bits, default=None)
        if keeping is not None and breaking is not None:
            gap = keeping.bits - breaking.bits
            if gap <= WIDTH:
                break
            guess = breaking.bits + gap * min(max(_share(breaking.measured, keeping.measured, bound), 0.15), 0.85)
            continue
        if guess == (smallest if found.kept else largest):
            break
        # by what the prediction was off, but at least a step on
        scale = found.loss_increase / found.predicted if found.predicted > 0 and found.loss_increase > 0 else 1.0
        wished = _where(points, bound / scale)
        guess = min(wished, found.bits - step) if found.kept else max(wished, found.bits + step)
        guess, step = min(max(guess, smallest), largest), 2 * step
    return rounds


def _where(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Bits per weight at which the predicted loss is this."""
    return next((bits for bits, predicted in points if predicted <= loss), points[-1][0])


def _share(above: float, below: float, bound: float) -> float:
    """How far the bound lies between two measured values, the logarithm being about linear in the bits."""
    if min(above, below, bound) <= 0 or above <= below or not math.isfinite(above):
        return 0.5
    return (math.log(above) - math.log(bound)) / (math.log(above) - math.log(below))
