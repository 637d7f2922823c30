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
from llmsqueeze.compress.fingerprint import fingerprint
from llmsqueeze.compress.forecast.room import bytes_needed
from llmsqueeze.compress.job import Job, measure_job, open_job
from llmsqueeze.compress.summary import Summary, summarize
from llmsqueeze.compress.weights import resume
from llmsqueeze.compress.weights.blocks import Run, compress_blocks, needed_streams
from llmsqueeze.compress.weights.ends import (
    compress_ends,
    compress_outer,
    outside_shard,
    outside_shards,
    readers,
    stored_parts,
)
from llmsqueeze.compress.weights.group import final_plan
from llmsqueeze.compress.weights.resume import Resumed, Tally, numbers_of
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats import compressed_tensors, experts, native, record
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.folder import Output, check_writable, output_folder
from llmsqueeze.formats.inspection.beside import files_beside
from llmsqueeze.formats.inspection.opening import Opened
from llmsqueeze.formats.verify import Witness
from llmsqueeze.journal import Journal
from llmsqueeze.measure.profile import Profile, load, save
from llmsqueeze.memory import keep_within_block
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.config import attention_kernel, without_kernel
from llmsqueeze.model.experts.find import expert_linears
from llmsqueeze.model.linears import all_linears, as_rows
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.tensors.ties import untied_config
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress, stopwatch
from llmsqueeze.progress.log import RUN_LOG, Logged
from llmsqueeze.recipe.recipe import Recipe

PROFILE = "profile"  # the step of a journal
MUCH_BESIDE = 100_000_000  # bytes of files beside the weights
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
    restart: bool = False,
    force: bool = False,
) -> Summary:
    """Compresses a model into the folder `out`, which appears when all is written, checked and, with `verify`, read
    back and compared with the weights that were computed with.

    `decision`, or the `profile` that it is made from: from an earlier run; without them they are made here. A run that
    was killed leaves a journal in `<out>.partial`, and the same run goes on from there, unless it is to `restart`.
    `force`: even if the disk seems too small.
    Raises VerificationError for a result that differs, which stays in `<out>.partial`.
    """
    start = time.monotonic()
    check_writable(out, overwrite)
    target, about = job.target(), processes.of_first(lambda: fingerprint(job, decision, profile, verify))
    shards = len(outside_shards(job.skeleton)) + len(job.skeleton.blocks)
    if (beside := sum(files_beside(job.path).values())) > MUCH_BESIDE:
        progress.note(f"{beside / 1e6:.0f} MB of files beside the weights will be copied")
    needed = 0 if force else bytes_needed(job, decision)
    with output_folder(out, shards, needed, overwrite, about, restart) as output:
        progress = Logged(progress, output.partial / RUN_LOG) if processes.first() else progress
        without_damaged(output.journal, progress)
        decision = decision or measure_and_decide(job, target, profile, output, progress)
        # what it was decided from is the same in all processes; other machines may decide otherwise
        told = processes.told((writable(job, decision.plan), decision.chosen, decision.predicted))
        decision = replace(decision, plan=told[0], chosen=told[1], predicted=told[2])
        decision, by_weight, witness = write_weights(job, decision, output, verify, progress)
        compared, opens, opened = finish(output, job, decision, by_weight, witness, verify, progress)
    return summarize(job, decision, output, time.monotonic() - start, compared, opens, by_weight, opened)


def finish(
    output: Output,
    job: Job,
    decision: Decision,
    by_weight: Mapping[str, Mapping[str, float]],
    witness: Witness | None,
    verify: bool,
    progress: Progress,
) -> tuple[dict[str, float] | None, dict[str, str], Opened]:
    """Writes what is left and reads everything back: what was compared, if the run is to `verify`, what opens the
    folder (`Verified`), and as what it was opened. Only the first process has a witness."""
    recorded = processes.of_first(lambda: write_rest(output, job, decision, by_weight))
    trust, portable = job.source.trust_remote_code, decision.plan.portable
    seen: tuple[dict[str, float] | None, dict[str, str], Opened] | None
    if verify:
        computed = None if witness is None else witness.computed
        outcome = verification.verified_and_opened(output, computed, job.device, trust, portable, progress)
        seen = None if outcome is None else (outcome[0].compared, outcome[0].opens, outcome[1])
    else:
        opens = processes.of_first(lambda: verification.inspected(output, trust))
        seen = None, opens, Opened()
    if processes.first() and (times := stopwatch.measured()) is not None:
        output.write_json(SIDECAR, recorded | {"time": times})
    result = processes.told(seen)
    assert result is not None, "the first process has seen it"
    return result


def without_damaged(journal: Journal, progress: Progress) -> None:
    """Forgets what a killed run has noted, but for its profile, if a file of it is not what was written."""
    for damaged in filter(None, processes.gathered([str(journal.file(step)) for step in journal.damaged()])):
        progress.note(f"{damaged[0]} is not what was written: what came after it is done again")
        journal.keep({PROFILE} - {Path(file).name for file in damaged})


def measure_and_decide(job: Job, target: int, profile: Profile | None, output: Output, progress: Progress) -> Decision:
    """What every linear becomes within `target` bytes, from a profile that is there, noted, or measured now."""
    profile = profile or measured(job, output.partial, output.journal, progress)
    return decide(job.plan, profile, job.recipe, job.skeleton.linears, target)


def measured(job: Job, folder: Path, journal: Journal, progress: Progress) -> Profile:
    """The profile of the job, from the journal or measured now; activations are kept in `folder` meanwhile."""
    if journal.value(PROFILE) is not None:
        return load(journal.file(PROFILE))
    profile = measure_job(job, request_of(job.recipe), folder, progress, journal)
    if journal.active:
        others = journal.files()
        save(profile, journal.file(PROFILE))
        journal.note(PROFILE, {}, [PROFILE], others)
    return profile


def write_weights(
    job: Job, decision: Decision, output: Output, verify: bool, progress: Progress, count: int | None = None
) -> tuple[Decision, dict[str, Mapping[str, float]], Witness | None]:
    """Compresses and writes all weights, or those of the first `count` blocks. Returns the decision with the plan after
    compression, numbers by weight for the record, and with `verify` the witness of the run."""
    if decision.plan.portable and isinstance(job.skeleton.experts_in_files, dict):
        output.experts = job.skeleton.experts_in_files
    with Spill(parent=output.partial) as spill:
        walk = job.walk(spill)
        inputs = walk.embed() if job.recipe.needs_text else None
        run = Run.of(walk, decision, job.recipe, progress)
        witness = Witness(walk, job.recipe.seed, progress) if verify and processes.first() else None
        before = resume.resumed(output, decision.plan, job.skeleton.linears, run.pace, witness, walk)
        if before is None:
            before, witness = begin_weights(run, output, inputs, witness)
        else:
            if inputs is not None:
                inputs.clear()
            progress.note(f"goes on behind block {before.blocks} of {len(job.skeleton.blocks)}")
        decision = replace(decision, plan=decision.plan.having(before.ends))
        shared = processes.of_first(lambda: stored_parts(output, decision.plan, job.skeleton.shared))
        with job.skeleton.overriding(readers(job.skeleton, shared, walk.device)):
            result = compress_blocks(replace(run, decision=decision), output, witness, before, count)
        output.wait()  # what is still to be written may be kept in the spill
        if note := short_text(result.numbers["chance"], job):
            progress.note(note)
    return replace(decision, plan=result.plan), result.by_weight, witness


def begin_weights(
    run: Run, output: Output, inputs: Activations | None, witness: Witness | None
) -> tuple[Resumed, Witness | None]:
    """Compresses and writes what lies outside the blocks. Returns where that leaves the run, and the witness, which has
    seen it."""
    skeleton, recipe, decided = run.walk.skeleton, run.recipe, run.decision.plan
    ends = compress_ends(run) | compress_outer(run, inputs)
    done, tally, shards = Tally(), Tally(), list[str]()
    planned = {name: one for name, one in ends.items() if name in decided.weights}
    for name, one in planned.items():
        of_kind = done if decided.weights[name].end else tally
        for each in (done, of_kind):
            each.add(decided.weights[name], final_plan(decided.weights[name], one.parts), numbers_of(one))
    dense = {name: one.dense for name, one in ends.items()}
    new = {f"{name}.weight": as_rows(skeleton.module(name), weight) for name, weight in dense.items()}
    with skeleton.overriding(new):
        streams = needed_streams(run.walk, inputs, recipe, bool(ends))
        if ends and witness is not None:
            witness = Witness(run.walk, recipe.seed, run.progress)
    for names in outside_shards(skeleton):
        output.write_shard(outside_shard(run, names, ends, witness))
        shards.append(output.last_shard)
    if witness is not None:
        witness.see_outside(dense)
    resume.note(output, run.walk, resume.START, None, shards, decided, planned, run.pace, witness, streams)
    return Resumed(0, streams, done.plans, tally), witness


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
    config = record.without_paths(job.checkpoint.config)
    config = without_kernel(config) if attention_kernel(config) else config
    if config.get("architectures") and (own := type(job.skeleton.model).__name__) not in config["architectures"]:
        config["architectures"] = [own]  # not that of a model without its head
    config = untied_config(config) if job.skeleton.apart else config
    quantization = quantization_config(job.skeleton, decision.plan)
    output.write_json("config.json", config | {"quantization_config": quantization})
    result = record.outcome(decision.plan, decision.predicted, output.nbytes, job.nbytes_original, by_weight)
    origin = record.provenance(job.source, job.path) | record.settings(job.recipe, job.calibration)
    if output.experts:
        origin |= {experts.KEY: output.experts}
    if decision.block_scores:
        origin |= {"block_scores": {name: list(scores) for name, scores in decision.block_scores.items()}}
    output.write_json(SIDECAR, origin | result)
    output.finish()
    return origin | result


def quantization_config(skeleton: Skeleton, plan: Plan) -> dict[str, Any]:
    """What `config.json` says of the compressed linears, in the format of the plan."""
    if not plan.portable:
        return native.quantization_config(plan)
    others = all_linears(skeleton.model) - set(plan.weights)
    return compressed_tensors.config_of(plan, others, expert_linears(skeleton.model))


def writable(job: Job, plan: Plan) -> Plan:
    """The plan, in the native format if compressed-tensors cannot represent all of it."""
    return compressed_tensors.writable_plan(plan, job.recipe.portable, expert_linears(job.skeleton.model))
