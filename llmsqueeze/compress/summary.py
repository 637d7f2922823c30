"""The summary of a run: what `quantize` reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmsqueeze.allocation.plan import WeightPlan, unfit, why_native
from llmsqueeze.allocation.prediction import likely
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.job import Job
from llmsqueeze.formats import compressed_tensors, native, record
from llmsqueeze.formats.folder import Output
from llmsqueeze.formats.inspection.opening import Opened
from llmsqueeze.memory import peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.experts.find import expert_linears


@dataclass(frozen=True)
class Summary:
    """A run in numbers; the JSON names are these.

    bits: mean width of the codes. predicted_loss_interval: where the loss lies in nine of ten cases. verified: how much
    of the result was read back and compared. opens: runtime -> why it does not open the result, "" if it does or
    should; opened: the runtimes that opened it here, with the logits that were computed with; not_opened: runtime ->
    why one that should open it was not tried, or did not. why_native: what compressed-tensors cannot represent;
    predicted_portable: the loss increase that the same bytes promise there; predicted_native: that they promise in our
    own format, if the result is there.
    text_begins: the first characters of the first calibration sample, as the model sees them, of a text that the user
    named; "" else. experts: of their matrices that were fitted to inputs, how many there are (`matrices`), how many saw
    few tokens (`few`) and how many none (`none`).
    towers: of the rounded linears of other towers and projectors, their number (`linears`), width (`bits`), bytes
    (`nbytes`) and those of the original (`nbytes_original`); None if they stay as they are; embeddings: the same of
    rounded embeddings and head. unreached: how many linears no text
    reaches, such as those that look at images alone: they are rounded as if all their inputs counted the same.
    left_out: how many `tensors` of how many bytes (`nbytes`) the original has that its model does not use.
    ends_nbytes: bytes of embeddings and head as they are in the original; 0 if they are compressed. made_from: the
    adapter that was merged first, or how the original was quantized already; "" else. block_scores: ranking (lim, zd)
    -> its score of every block, if blocks were ranked by one.
    """

    out: str
    model: str
    made_from: str
    method: str
    bits: float
    bits_per_weight: float
    nbytes: int
    nbytes_original: int
    outliers: int
    predicted_loss_increase: float | None
    predicted_loss_interval: list[float] | None
    calibration: dict[str, object] | None
    text_begins: str
    seconds: float
    peak_memory_mb: float
    peak_device_memory_mb: float
    verified: dict[str, float] | None
    opens: dict[str, str]
    opened: list[str]
    not_opened: dict[str, str]
    format: str
    why_native: str | None
    predicted_portable: float | None
    predicted_native: float | None
    experts: dict[str, int] | None
    towers: dict[str, int] | None
    embeddings: dict[str, int] | None
    unreached: int
    left_out: dict[str, int] | None
    ends_nbytes: int
    block_scores: Mapping[str, tuple[float, ...]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    job: Job,
    decision: Decision,
    output: Output,
    seconds: float,
    verified: dict[str, float] | None,
    opens: dict[str, str],
    by_weight: Mapping[str, Mapping[str, float]],
    opened: Opened,
) -> Summary:
    """The summary of a folder that has been written. by_weight: kind of number -> weight -> number."""
    plan, seen = decision.plan, by_weight.get("chances", {})
    planned = [name for name, weight in plan.weights.items() if not weight.end]
    changed = {**plan.weights, **job.plan.beside}
    return Summary(
        out=str(output.final),
        model=job.source.name,
        made_from=made_from(job),
        method=job.recipe.method,
        bits=plan.code_bits,
        bits_per_weight=round(plan.bits_per_weight, 6),
        nbytes=output.nbytes,
        nbytes_original=job.nbytes_original,
        outliers=sum(weight.kept for weight in plan.weights.values()),
        predicted_loss_increase=decision.predicted,
        predicted_loss_interval=None if decision.predicted is None else likely(decision.predicted),
        calibration=job.calibration.as_dict() if job.calibration else None,
        text_begins=job.calibration.begins if job.calibration else "",
        seconds=round(seconds, 3),
        peak_memory_mb=peak_memory_mb(),
        peak_device_memory_mb=peak_device_memory_mb(str(job.device)),
        verified=verified,
        opens=opens,
        **opened.as_dict(),
        **portability(job, decision),
        experts=record.experts(by_weight.get("tokens", {})),
        towers=counts_beside(job, job.plan.towers),
        embeddings=counts_beside(job, job.plan.ends),
        unreached=len(set(planned) - set(seen)) if job.recipe.needs_moments else 0,
        left_out=left_out(job),
        ends_nbytes=sum(job.skeleton.nbytes(f"{n}.weight") for n in job.skeleton.ends if n not in changed),
        block_scores=decision.block_scores,
    )


def made_from(job: Job) -> str:
    """`made_from` of a summary."""
    source, adapter = job.source, job.original.adapter
    merged = "" if adapter is None else f"with the adapter {source.adapter or 'in its folder'} merged"
    return " ".join(filter(None, [source.read_from and f"{source.name} ({source.read_from})", merged]))


def counts_beside(job: Job, weights: Mapping[str, WeightPlan]) -> dict[str, int] | None:
    """`towers` and `embeddings` of a summary."""
    if not weights:
        return None
    original = sum(job.skeleton.nbytes(f"{name}.weight") for name in weights)
    bits = int(next(iter(weights.values())).code_bits)
    return {
        "linears": len(weights),
        "bits": bits,
        "nbytes": sum(weight.nbytes for weight in weights.values()),
        "nbytes_original": original,
    }


def left_out(job: Job) -> dict[str, int] | None:
    unused = job.skeleton.unused.values()
    return {"tensors": len(unused), "nbytes": sum(stored.nbytes for stored in unused)} if unused else None


def portability(job: Job, decision: Decision) -> dict[str, Any]:
    """`format`, `why_native`, `predicted_portable` and `predicted_native` of a summary."""
    plan, recipe = decision.plan, job.recipe
    if plan.portable:
        known = {"predicted_portable": None, "predicted_native": decision.predicted_native}
        return {"format": compressed_tensors.METHOD, "why_native": None} | known
    experts = expert_linears(job.skeleton.model)
    why = why_native(recipe, job.skeleton, plan.weights) or compressed_tensors.barred(plan, experts) or "--native"
    predicted = None if unfit(recipe, job.skeleton, plan.weights) else decision.predicted_portable
    known = {"predicted_portable": predicted, "predicted_native": None}
    return {"format": native.METHOD, "why_native": why} | known
