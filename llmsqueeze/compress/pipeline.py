"""The pipeline of one run: measure, decide, compress and write block by block, read the result back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsqueeze.allocation.options import request_of
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.compress.decision.decide import Decision, decide
from llmsqueeze.compress.job import Job, measure_job, open_job
from llmsqueeze.compress.summary import Summary, summarize
from llmsqueeze.compress.weights.blocks import Run, compress_blocks, needed_streams
from llmsqueeze.compress.weights.ends import compress_ends, outside_shard, outside_shards
from llmsqueeze.compress.weights.group import with_final
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats import compressed_tensors, native, record
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.folder import Output, check_writable, output_folder
from llmsqueeze.formats.verify import Witness
from llmsqueeze.measure.profile import Profile
from llmsqueeze.memory import keep_within_block
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.linears import all_linears
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress import Progress, stopwatch
from llmsqueeze.recipe.recipe import Recipe

MUCH_CHANCE = 0.2  # of the moments: between what 8 and 32 samples of 512 tokens leave of SmolLM2-135M


def compress_model(
    source: Source | str,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    decision: Decision | None = None,
    verify: bool = True,
) -> Summary:
    """`compress` for a model that is not open yet."""
    keep_within_block()
    check_writable(out, overwrite)
    source, progress = Source(source) if isinstance(source, str) else source, Progress()
    job = open_job(source, recipe, progress, device=pick_device(device))
    return compress(job, out, overwrite=overwrite, decision=decision, verify=verify, progress=progress)


def compress(
    job: Job,
    out: Path,
    *,
    overwrite: bool,
    decision: Decision | None = None,
    profile: Profile | None = None,
    verify: bool,
    progress: Progress,
) -> Summary:
    """Compresses a model into the folder `out`, which appears when all is written, checked and, with `verify`, read
    back and compared with the weights that were computed with.

    `decision`, or the `profile` that it is made from: from an earlier run; without them they are made here. Raises
    VerificationError for a result that differs, which stays in `<out>.partial`.
    """
    start = time.monotonic()
    check_writable(out, overwrite)
    target = job.target()
    shards = len(outside_shards(job.skeleton)) + len(job.skeleton.blocks)
    with output_folder(out, shards, bytes_needed(job, decision), overwrite) as output:
        decision = decision or measure_and_decide(job, target, profile, output.partial, progress)
        decision = replace(decision, plan=compressed_tensors.writable_plan(decision.plan, job.recipe.portable))
        decision, by_weight, witness = write_weights(job, decision, output, verify, progress)
        recorded = write_rest(output, job, decision, by_weight)
        trust, compared = job.source.trust_remote_code, None
        if witness is not None:
            verified = verification.verify(output, witness.computed, job.device, trust, progress)
            compared, opens = verified.compared, verified.opens
        else:
            opens = verification.inspected(output, trust)
        if (times := stopwatch.measured()) is not None:
            output.write_json(SIDECAR, recorded | {"time": times})
    tokens = by_weight.get("tokens", {})
    return summarize(job, decision, output, time.monotonic() - start, compared, opens, tokens)


def measure_and_decide(job: Job, target: int, profile: Profile | None, folder: Path, progress: Progress) -> Decision:
    """What every linear becomes within `target` bytes, from a profile that is there or measured now."""
    profile = profile or measure_job(job, request_of(job.recipe), folder, progress)
    return decide(job.plan, profile, job.recipe, job.skeleton.linears, target)


def write_weights(
    job: Job, decision: Decision, output: Output, verify: bool, progress: Progress, count: int | None = None
) -> tuple[Decision, dict[str, Mapping[str, float]], Witness | None]:
    """Compresses and writes all weights, or those of the first `count` blocks. Returns the decision with the plan after
    compression, numbers by weight for the record, and with `verify` the witness of the run."""
    with Spill(parent=output.partial) as spill:
        walk = job.walk(spill)
        inputs = walk.embed() if job.recipe.needs_text else None
        run = Run.of(walk, decision, job.recipe, progress)
        ends = compress_ends(run)
        decision = replace(decision, plan=with_final(decision.plan, ends))
        for names in outside_shards(job.skeleton):
            output.write_shard(outside_shard(job.skeleton, names, ends))
        with job.skeleton.overriding({f"{name}.weight": one.dense for name, one in ends.items()}):
            witness = Witness(walk, job.recipe.seed, progress) if verify else None
            streams = needed_streams(walk, inputs, job.recipe, bool(ends))
        if witness is not None:
            witness.see_ends({name: one.dense for name, one in ends.items()})
        result = compress_blocks(replace(run, decision=decision), streams, output, witness, count)
        if note := short_text(result.chances, job):
            progress.note(note)
    return replace(decision, plan=result.plan), result.by_weight, witness


def short_text(chances: Mapping[str, float], job: Job) -> str | None:
    """What to say if much of what was measured of the linears' inputs is chance; chances: linear -> its share."""
    share = sum(chances.values()) / max(1, len(chances))
    if share < MUCH_CHANCE or job.calibration is None:
        return None
    count, length = len(job.calibration.rows), job.calibration.rows[0].shape[1]
    return (
        f"{count} samples of {length} tokens are few for this model: {share:.0%} of what was measured of its inputs is "
        "chance; more text (--samples) lowers the loss"
    )


def write_rest(
    output: Output, job: Job, decision: Decision, by_weight: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Everything in the folder beside the shards; returns the record."""
    output.copy_rest(job.path)
    config = job.checkpoint.config | {"quantization_config": quantization_config(job.skeleton, decision.plan)}
    output.write_json("config.json", config)
    result = record.outcome(decision.plan, decision.predicted, output.nbytes, job.checkpoint.nbytes, by_weight)
    origin = record.provenance(job.source, job.path) | record.settings(job.recipe, job.calibration)
    output.write_json(SIDECAR, origin | result)
    output.finish()
    return origin | result


def quantization_config(skeleton: Skeleton, plan: Plan) -> dict[str, Any]:
    """What `config.json` says of the compressed linears, in the format of the plan."""
    if not plan.portable:
        return native.quantization_config(plan)
    return compressed_tensors.config_of(plan, all_linears(skeleton.model) - set(plan.weights))


def bytes_needed(job: Job, decision: Decision | None) -> int:
    """Disk space for the result and, at the worst, for all activations of the run."""
    plan, recipe, linears = job.plan, job.recipe, job.plan.nbytes
    outliers = round(recipe.outliers * plan.numel) * 8 + sum(4 * w.shape[0] for w in plan.weights.values())
    if decision is not None:
        linears, outliers = decision.plan.nbytes, 0
    elif recipe.size is not None:
        linears = recipe.size - job.kept_nbytes
    elif recipe.average_bits is not None:
        linears = int(plan.numel * recipe.average_bits / 8)
    elif recipe.bounded or recipe.mix:
        linears = plan.numel
    activations = 0
    if job.calibration is not None:
        _, width = job.skeleton.embedding_shape
        lists = 4 + (len(job.skeleton.blocks) if recipe.needs_gradients and decision is None else 0)
        activations = len(job.samples) * job.calibration.seq_len * width * 4 * lists
    return job.kept_nbytes + max(0, linears) + outliers + activations
