"""The smallest result within a bound on quality: compress, measure on held-back text, move along the allocator's order.

The predicted curve gives the first size and, scaled by the last measurement, the next ones; the bracket between a
result within the bound and one beyond it halves at worst. Of blocks on two widths nothing is predicted, and the split
between them is found by bisection. The result returned was measured, not assumed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsqueeze.allocation.layerwise import sizes
from llmsqueeze.compress.decision.outlook import curve
from llmsqueeze.compress.fingerprint import fingerprint
from llmsqueeze.compress.job import Job
from llmsqueeze.compress.pipeline import compress, measured, without_damaged
from llmsqueeze.errors import BudgetError, CalibrationError, RecipeError
from llmsqueeze.evaluation.evaluate import evaluate_rows
from llmsqueeze.formats.folder import joined_journal, publish
from llmsqueeze.journal import Journal, restoring
from llmsqueeze.journal.partial import partial_folder
from llmsqueeze.measure.profile import Profile
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.progress.log import RUN_LOG, Logged

HELD_BACK, FEWEST = 64, 4
WIDTH = 0.02  # of the bracket that is narrow enough, in bits per weight
ROUNDS = 9


@dataclass(frozen=True)
class Round:
    """One size: its bits per weight, the loss predicted, and the measurements. `measured` is the one that is bounded,
    infinite for a size that is not possible; kept: whether it is within the bound."""

    bits: float
    predicted: float
    loss_increase: float
    perplexity_increase: float
    kl_mean: float
    measured: float
    kept: bool


def smallest_within(
    job: Job,
    out: Path,
    profile: Profile | None,
    overwrite: bool,
    verify: bool,
    progress: Progress,
    restart: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Compresses to the smallest size within the recipe's bound; returns the summary, with every round. Rounds that a
    killed run has finished are not done again, unless it is to `restart`. `force`: as `compress` has it.

    The job's text has held-back samples. Raises CalibrationError if they are too few, RecipeError if no size is within
    the bound.
    """
    if len(held_back(job)) < FEWEST:
        raise CalibrationError(
            f"a bound is measured on calibration text held back, at least {FEWEST} samples; the text fills only "
            f"{len(job.samples) + len(held_back(job))}: use fewer --samples or a longer text"
        )
    about = processes.of_first(lambda: fingerprint(job, None, profile, verify))
    with partial_folder(out, about, restart) as folder:
        journal = joined_journal(folder, about)
        progress = Logged(progress, folder / RUN_LOG) if processes.first() else progress
        without_damaged(journal, progress)
        profile = profile or measured(job, folder, journal, progress)
        search = _Search(job, folder, profile, {"verify": verify, "force": force}, progress, journal)
        rounds = [one for one in search.rounds() if math.isfinite(one.measured)]
        if not rounds and search.refused is not None:
            raise search.refused
        kept = [one for one in rounds if one.kept]
        if not kept:
            least = min(rounds, key=lambda one: one.measured)
            raise RecipeError(
                f"no plan keeps within the bound: the best, of {least.bits:.3f} bits per weight, measures "
                f"{least.measured:.4g} on held-back text"
            )
        if processes.first():
            publish(search.best, out, overwrite)
    chosen = min(kept, key=lambda one: one.bits)
    return search.summary | {
        "out": str(out),
        "perplexity_increase": chosen.perplexity_increase,
        "kl_mean": chosen.kl_mean,
        "rounds": [asdict(one) for one in rounds],
    }


def held_back(job: Job) -> list[Tensor]:
    """Token rows that nothing is calibrated on."""
    return job.calibration.held_back if job.calibration is not None else []


class _Search:
    """Compresses to a size and measures it; keeps the smallest folder that is within the bound."""

    def __init__(
        self, job: Job, folder: Path, profile: Profile, how: dict[str, Any], progress: Progress, journal: Journal
    ) -> None:
        """how: `verify` and `force`, as `compress` has them."""
        self.job, self.profile, self.how, self.progress, self.journal = job, profile, how, progress, journal
        self.tried, self.best, self.best_bits = folder / "tried", folder / "best", math.inf
        self.summary: dict[str, Any] = {}
        self.refused: BudgetError | None = None

    @property
    def bound(self) -> float:
        """The bound, of the KL or of the relative rise of the perplexity; either is about the rise of the loss."""
        return self.job.recipe.max_kl or self.job.recipe.max_ppl_increase or 0.0

    def try_size(self, bits: float) -> Round:
        """Compresses to an average of `bits` and measures; if a killed run has done it, it is not done again."""
        step = f"tried {bits!r}"
        noted = self.journal.value(step)
        if noted is None:
            summary = self._compressed(bits)
            noted = self._tried(bits, summary)
            self.journal.note(step, noted)
            self.journal.wait()
        with restoring(self.journal.folder):
            one, refused, summary = Round(**noted["round"]), noted["refused"], dict(noted["summary"])
        if refused:
            self.refused = BudgetError(refused)
        if one.kept and one.bits < self.best_bits:
            self._take(f"best {bits!r}")
            self.best_bits, self.summary = one.bits, summary
        return one

    def rounds(self) -> list[Round]:
        """Every size that the search tries."""
        recipe, plan = self.job.recipe, self.job.plan
        if recipe.decides == "blocks":
            return split(self.try_size, sizes(plan, self.profile, recipe, self.job.skeleton.linears))
        return bisect(self.try_size, curve(plan, recipe, self.profile), self.bound)

    def _take(self, step: str) -> None:
        """The folder that was tried is the best; if this is noted, the one that lies there now is of a later round."""
        if self.journal.value(step) is None:
            if processes.first() and self.tried.exists():
                shutil.rmtree(self.best, ignore_errors=True)
                self.tried.rename(self.best)
            self.journal.note(step, {})
            self.journal.wait()

    def _compressed(self, bits: float) -> dict[str, Any]:
        """Compresses to an average of `bits`; returns the summary, or a refusal."""
        step = f"compressed {bits!r}"
        tried = processes.of_first(self.tried.exists)
        if (noted := self.journal.value(step)) is not None and (noted.get("refused") or tried):
            return noted
        job = self.job.asking(replace(self.job.recipe, max_ppl_increase=None, max_kl=None, bits=float(bits)))
        try:
            summary = compress(
                job, self.tried, overwrite=True, profile=self.profile, progress=self.progress, **self.how
            ).as_dict()
        except BudgetError as error:  # the least sizes are estimates: a run may need more
            summary = {"refused": str(error)}
        self.journal.note(step, summary)
        self.journal.wait()
        return summary

    def _tried(self, bits: float, summary: dict[str, Any]) -> dict[str, Any]:
        """The round of a folder that was compressed, and its summary, as JSON."""
        if reason := summary.get("refused"):
            self.progress.note(f"{bits:.3f} bits per weight are not possible: {reason}")
            impossible = Round(bits, 0.0, 0.0, 0.0, 0.0, math.inf, False)
            return {"round": asdict(impossible), "summary": {}, "refused": reason}
        loss_increase, kl = self._measured()
        increase = math.expm1(loss_increase)
        measured = increase if self.job.recipe.max_kl is None else kl
        kept, spent = measured <= self.bound, summary["bits_per_weight"]
        verdict = f"{'within' if kept else 'beyond'} {self.bound:g}"
        self.progress.note(f"{spent:.3f} bits per weight measures {measured:.4g} on held-back text, {verdict}")
        predicted = summary["predicted_loss_increase"] or 0.0
        return {
            "round": asdict(Round(spent, predicted, loss_increase, increase, kl, measured, kept)),
            "summary": summary,
            "refused": None,
        }

    def _measured(self) -> tuple[float, float]:
        """Rise of the loss, and mean KL, of the folder tried on the held-back text."""
        job, trust = self.job, self.job.source.trust_remote_code
        evaluation = evaluate_rows(str(self.tried), str(job.path), held_back(job), job.device, trust, self.progress)
        return evaluation.nll_difference, evaluation.kl_mean


def bisect(try_size: Callable[[float], Round], points: Sequence[tuple[float, float]], bound: float) -> list[Round]:
    """The rounds of the search. `points`: (bits per weight, predicted loss), falling; `bound`: of the measured loss.

    Ends when a size that keeps the bound and one that breaks it lie within `WIDTH` bits, or no other size is there.
    """
    smallest, largest = points[0][0], points[-1][0]
    rounds: list[Round] = []
    guess, step = _bits_at(points, bound), 0.1
    while len(rounds) < ROUNDS:
        last = try_size(guess)
        rounds.append(last)
        keeping = min((one for one in rounds if one.kept), key=lambda one: one.bits, default=None)
        breaking = max((one for one in rounds if not one.kept), key=lambda one: one.bits, default=None)
        if keeping is not None and breaking is not None:
            gap = keeping.bits - breaking.bits
            if gap <= WIDTH:
                break
            guess = breaking.bits + gap * min(max(_share(breaking.measured, keeping.measured, bound), 0.15), 0.85)
            continue
        if guess == (smallest if last.kept else largest):
            break
        # corrected by the error of the last prediction, but at least a step on
        scale = last.loss_increase / last.predicted if last.predicted > 0 and last.loss_increase > 0 else 1.0
        by_prediction = _bits_at(points, bound / scale)
        guess = min(by_prediction, last.bits - step) if last.kept else max(by_prediction, last.bits + step)
        guess, step = min(max(guess, smallest), largest), 2 * step
    return rounds


def split(try_size: Callable[[float], Round], sizes: Sequence[float]) -> list[Round]:
    """The rounds of a bisection over the sizes (bits per weight) of a method, which rise. A larger one is taken to
    measure less."""
    rounds: list[Round] = []
    first, last = 0, len(sizes)
    while first < last and len(rounds) < ROUNDS:
        middle = (first + last) // 2
        rounds.append(try_size(sizes[middle]))
        first, last = (first, middle) if rounds[-1].kept else (middle + 1, last)
    return rounds


def _bits_at(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Bits per weight at which the predicted loss is this."""
    return next((bits for bits, predicted in points if predicted <= loss), points[-1][0])


def _share(above: float, below: float, bound: float) -> float:
    """How far the bound lies between two measured values, the logarithm being about linear in the bits."""
    if min(above, below, bound) <= 0 or above <= below or not math.isfinite(above):
        return 0.5
    return (math.log(above) - math.log(bound)) / (math.log(above) - math.log(below))
