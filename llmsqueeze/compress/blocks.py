"""The whole pipeline: plan, measure, allocate, then compress block by block and write each block as it ends.

Two residual streams run along, the original model's and the compressed model's. Inside a block the fusion groups are
compressed in the order they are called, each seeing the inputs that what was compressed before it produces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.multiplier import Pace
from llmsqueeze.allocation.plan import Plan, unfit, why_native
from llmsqueeze.compress.decide import Decision, decide, request_of, target_nbytes
from llmsqueeze.compress.group import NOTHING, Compressed, as_made, compress_group, compressed_nbytes, with_made
from llmsqueeze.compress.job import Job, prepare
from llmsqueeze.compress.outer import compress_ends, outer_shard, outer_shards
from llmsqueeze.compress.weight import group_targets
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats import compressed_tensors, native, record
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.folder import Output, check_writable, output_folder
from llmsqueeze.formats.verify import Witness
from llmsqueeze.measure.moments import Moments, Streams, advance, fusion_groups, observe
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.memory import keep_little, peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.activations import Activations, Spill
from llmsqueeze.model.linears import all_linears, as_rows
from llmsqueeze.model.original import Source, pick_device
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.recipe.recipe import Recipe


@dataclass(frozen=True)
class Summary:
    """What `quantize` reports; the JSON names are these. `bits`: mean width of the codes. verified: how much of the
    result was read back and compared; opens: by target why it does not open the result, "" if it does. why_native:
    what compressed-tensors has no place for; predicted_portable: the loss increase that the same bytes promise there.
    """

    out: str
    model: str
    method: str
    bits: float
    bits_per_weight: float
    nbytes: int
    nbytes_original: int
    outliers: int
    predicted_loss_increase: float | None
    calibration: dict[str, object] | None
    seconds: float
    peak_memory_mb: float
    peak_device_memory_mb: float
    verified: dict[str, float] | None
    opens: dict[str, str]
    format: str
    why_native: str | None
    predicted_portable: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    source: Source | str,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    decided: Decision | None = None,
    profile: Profile | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Summary:
    """Compresses a model into the folder `out`, which appears when all is written, checked and, with `verify`, read
    back and compared with what was meant.

    `decided`: a plan made before; `profile`: measurements made before, which serve the recipe. What is not given is
    made here. Raises VerificationError for a result that is not what was meant, which stays in `<out>.partial`.
    """
    start, progress = time.monotonic(), progress or Progress()
    keep_little()
    place = pick_device(device)
    check_writable(out, overwrite)
    job = prepare(Source(source) if isinstance(source, str) else source, recipe, progress, device=place)
    recipe = job.recipe
    target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
    outer = outer_shards(job.skeleton)
    shards = len(outer) + len(job.skeleton.blocks)
    with (
        output_folder(out, shards, bytes_needed(job, recipe, decided), overwrite) as output,
        Spill(parent=output.partial) as spill,
    ):
        walk = Walk(job.skeleton, job.calibration.rows if job.calibration else [], spill, torch.float32, place)
        inputs = walk.embed() if recipe.needs_text else None
        decided = decided or measure_and_decide(walk, inputs, job, recipe, profile, target, progress)
        decided = replace(decided, plan=compressed_tensors.settled(decided.plan, recipe.portable))
        pace = pace_of(decided)
        ends = compress_ends(job.skeleton, decided, recipe, place, progress, pace)
        decided = replace(decided, plan=with_made(decided.plan, ends))
        for names in outer:
            output.write_shard(outer_shard(job, names, ends))
        with job.skeleton.overriding({f"{name}.weight": made.dense for name, made in ends.items()}):
            witness = Witness(walk, recipe.seed, progress) if verify else None
            streams = needed_streams(walk, inputs, recipe, bool(ends))
        if witness is not None:
            witness.see_ends({name: made.dense for name, made in ends.items()})
        plan, by_weight = compress_blocks(walk, streams, decided, recipe, output, progress, witness, pace=pace)
        decided = replace(decided, plan=plan)
        write_rest(output, job, recipe, decided, by_weight)
        trust = job.source.trust_remote_code
        if witness is not None:
            verified = verification.verify(output, witness.computed, place, trust, progress)
            compared, opens = verified.compared, verified.opens
        else:
            compared, opens = None, verification.inspected(output, trust)
    return summarize(job, recipe, decided, output, place, time.monotonic() - start, compared, opens)


def summarize(
    job: Job,
    recipe: Recipe,
    decided: Decision,
    output: Output,
    place: torch.device,
    seconds: float,
    verified: dict[str, float] | None,
    opens: dict[str, str],
) -> Summary:
    """What to say of a folder that has been written."""
    plan = decided.plan
    return Summary(
        out=str(output.final),
        model=job.source.model,
        method=recipe.method,
        bits=plan.code_bits,
        bits_per_weight=round(plan.bits_per_weight, 6),
        nbytes=output.nbytes,
        nbytes_original=job.checkpoint.nbytes,
        outliers=sum(weight.kept for weight in plan.weights.values()),
        predicted_loss_increase=decided.predicted,
        calibration=job.calibration.as_dict() if job.calibration else None,
        seconds=round(seconds, 3),
        peak_memory_mb=peak_memory_mb(),
        peak_device_memory_mb=peak_device_memory_mb(str(place)),
        verified=verified,
        opens=opens,
        **portability(recipe, job, decided),
    )


def portability(recipe: Recipe, job: Job, decided: Decision) -> dict[str, Any]:
    """`format`, `why_native` and `predicted_portable` of a Summary."""
    plan = decided.plan
    if plan.portable:
        return {"format": compressed_tensors.METHOD, "why_native": None, "predicted_portable": None}
    why = why_native(recipe, job.skeleton, plan.weights) or compressed_tensors.barred(plan) or "--native"
    instead = None if unfit(recipe, job.skeleton, plan.weights) else decided.predicted_portable
    return {"format": native.METHOD, "why_native": why, "predicted_portable": instead}


def measure_and_decide(
    walk: Walk,
    inputs: Activations | None,
    job: Job,
    recipe: Recipe,
    profile: Profile | None,
    target: int | None,
    progress: Progress,
) -> Decision:
    """What to do with every linear within `target` bytes, from a profile that is there or measured now."""
    profile = profile or measure(walk, inputs, job.plan.dtypes, request_of(recipe), progress)
    return decide(job.plan, profile, recipe, job.skeleton.linears, target)


def write_rest(
    output: Output, job: Job, recipe: Recipe, decided: Decision, by_weight: dict[str, dict[str, float]]
) -> None:
    """Everything in the folder beside the shards."""
    output.copy_rest(job.path)
    config = job.checkpoint.config | {"quantization_config": quantization_config(job.skeleton, decided.plan)}
    output.write_json("config.json", config)
    result = record.outcome(decided.plan, decided.predicted, output.nbytes, job.checkpoint.nbytes, by_weight)
    made = record.provenance(job.source, job.path) | record.settings(recipe, job.calibration)
    output.write_json(SIDECAR, made | result)
    output.finish()


def quantization_config(skeleton: Skeleton, plan: Plan) -> dict[str, Any]:
    """What `config.json` says of the compressed linears, in the format of the plan."""
    if not plan.portable:
        return native.quantization_config(plan)
    return compressed_tensors.config_of(plan, all_linears(skeleton.model) - set(plan.weights))


def needed_streams(walk: Walk, inputs: Activations | None, recipe: Recipe, embed: bool = False) -> Streams:
    """The residual streams that the recipe's moments come from; what nobody needs is released. `embed`: the compressed
    model's begins with embeddings of its own."""
    if inputs is not None and not recipe.needs_moments:
        inputs.clear()
        inputs = None
    original = inputs if recipe.inputs in ("original", "corrected") else None
    compressed = inputs if recipe.inputs in ("sequential", "corrected") else None
    if embed and compressed is not None:
        if original is None:
            compressed.clear()
        compressed = walk.embed()
    return Streams(original, compressed)


def pace_of(decided: Decision) -> Pace | None:
    """What keeps the run within its bytes, where they are not known before."""
    return Pace(decided.plan, decided.coding.curves, decided.coding.target) if decided.coding else None


def compress_blocks(
    walk: Walk,
    streams: Streams,
    decided: Decision,
    recipe: Recipe,
    output: Output,
    progress: Progress,
    witness: Witness | None = None,
    count: int | None = None,
    pace: Pace | None = None,
) -> tuple[Plan, dict[str, dict[str, float]]]:
    """Compresses and writes every block in turn, or the first `count`; `witness` sees what each has become.

    Returns the plan as it came out (a compensation that does not help is left out), and for the record each weight's
    relative output error and, of coded ones, its sensitivity.
    """
    skeleton, plan = walk.skeleton, Plan(dict(decided.plan.weights))
    pace = pace or pace_of(decided)
    errors: dict[str, float] = {}
    sensitivities: dict[str, float] = {}
    indices = range(len(skeleton.blocks))[:count]
    for index in progress.over(indices, "compress", len(indices)):
        linears = [name for name in skeleton.linears[index] if name in plan.weights]
        with walk.resident_block(index):
            original = {name: skeleton.linear(name).weight.data for name in linears}
            made, current = compress_block(walk, index, streams, original, decided, recipe, progress, pace)
            if witness is not None:
                witness.see(index, current)
            ahead = Streams(None, None)
            if index + 1 < len(skeleton.blocks):
                ahead = Streams(
                    advance(walk, index, streams.original, original),
                    advance(walk, index, streams.compressed, current),
                )
            del original, current  # or the next block would be loaded beside them
        for stream in {id(s): s for s in (streams.original, streams.compressed) if s is not None}.values():
            stream.clear()
        streams = ahead
        shard: dict[str, Tensor] = {}
        for name, found in made.items():
            shard |= (compressed_tensors if plan.portable else native).stored_tensors(name, found.parts)
            errors[name] = found.error
            if found.sensitivity is not None:
                sensitivities[name] = found.sensitivity
            plan.weights[name] = as_made(plan.weights[name], found.parts)
        kept = set(skeleton.names_in(skeleton.blocks[index])) - {f"{name}.weight" for name in linears}
        shard |= {name: skeleton.checkpoint.read(skeleton.sources[name]) for name in sorted(kept)}
        output.write_shard(shard)
    return plan, {"errors": errors} | ({"sensitivities": sensitivities} if sensitivities else {})


def compress_block(
    walk: Walk,
    index: int,
    streams: Streams,
    original: dict[str, Tensor],
    decided: Decision,
    recipe: Recipe,
    progress: Progress,
    pace: Pace | None,
) -> tuple[dict[str, Compressed], dict[str, Tensor]]:
    """A resident block's linears, fusion group by fusion group: what they are made of, and the weights they now have.

    `original` holds the weights as the modules store them, and so does what is returned.
    """
    skeleton, current = walk.skeleton, dict(original)
    result: dict[str, Compressed] = {}
    for names, moments in group_moments(walk, index, streams, original, current, recipe):
        group = {name: as_rows(skeleton.module(name), original[name]) for name in names if name in original}
        targets, curvature = group_targets(group, moments)

        def attempt(
            shift: float,
            group: dict[str, Tensor] = group,
            targets: dict[str, Tensor] = targets,
            curvature: Curvature | None = curvature,
        ) -> dict[str, Compressed]:
            return compress_group(group, targets, curvature, decided, recipe, shift)

        found = attempt(0.0) if pace is None else pace.settle(list(targets), attempt, compressed_nbytes)
        for name, made in found.items():
            current[name] = as_rows(skeleton.module(name), made.dense).contiguous()
            result[name] = made._replace(dense=NOTHING)
            progress.weight(name, parts.nbytes(made.parts) * 8 / decided.plan.weights[name].numel, made.error)
    return result, current


def group_moments(
    walk: Walk,
    index: int,
    streams: Streams,
    original: dict[str, Tensor],
    current: dict[str, Tensor],
    recipe: Recipe,
) -> Iterator[tuple[Sequence[str], Moments | None]]:
    """The resident block's fusion groups with the moments of their inputs, each observed when its turn comes.

    Linears that no sample reaches come last, with no moments.
    """
    names = walk.skeleton.linears[index]
    stream = streams.compressed if streams.original is None else streams.original
    if not recipe.needs_moments or stream is None:
        yield names, None
        return
    groups = fusion_groups(walk, index, stream.get(0, walk.device))
    for group in groups:
        if any(name in original for name in group.names):
            yield group.names, observe(walk, index, group, streams, original, current)
    reached = {name for group in groups for name in group.names}
    yield [name for name in names if name not in reached], None


def bytes_needed(job: Job, recipe: Recipe, decided: Decision | None) -> int:
    """Disk space for the result and, at the worst, for all activations of the run."""
    plan, linears = job.plan, job.plan.nbytes
    outliers = round(recipe.outliers * plan.numel) * 8 + sum(4 * w.shape[0] for w in plan.weights.values())
    if decided is not None:
        linears, outliers = decided.plan.nbytes, 0
    elif recipe.size is not None:
        linears = recipe.size - job.kept_nbytes
    elif recipe.average_bits is not None:
        linears = int(plan.numel * recipe.average_bits / 8)
    elif recipe.bounded or recipe.mix:
        linears = plan.numel
    activations = 0
    if job.calibration is not None:
        _, width = job.skeleton.embedding_shape
        lists = 4 + (len(job.skeleton.blocks) if recipe.needs_gradients and decided is None else 0)
        activations = len(job.calibration.rows) * job.calibration.seq_len * width * 4 * lists
    return job.kept_nbytes + max(0, linears) + outliers + activations
