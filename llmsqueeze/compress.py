"""The whole pipeline: plan, measure, allocate, then compress block by block and write each block as it ends.

Two residual streams run along, the original model's and the compressed model's. Inside a block the fusion groups are
compressed in the order they are called, each seeing the inputs that what was compressed before it produces.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import parts, record
from llmsqueeze.activations import Activations, Spill
from llmsqueeze.allocate import gwq
from llmsqueeze.blocks import Walk
from llmsqueeze.calibrate import DEMO, Calibration, calibration_rows, calibration_text, load_tokenizer
from llmsqueeze.checkpoint import open_checkpoint
from llmsqueeze.curvature import Curvature, factorize, row_error
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats import native
from llmsqueeze.locate import locate
from llmsqueeze.memory import keep_little, peak_device_memory_mb, peak_memory_mb
from llmsqueeze.observe import Moments, Streams, advance, as_rows, fusion_groups, observe
from llmsqueeze.output import Output, check_writable, output_folder
from llmsqueeze.parts import Affine, Part, Sparse
from llmsqueeze.plan import Plan, WeightPlan, base_plan
from llmsqueeze.profile import Profile, measure, rank_without_data
from llmsqueeze.progress import Progress
from llmsqueeze.quantize import QUANTIZERS
from llmsqueeze.quantize.descent import corrected_target
from llmsqueeze.recipe import Recipe
from llmsqueeze.skeleton import Skeleton, build_skeleton

SHARD_BYTES = 1 << 30
# rows are independent, so a weight is rounded some rows at a time; a GPU is kept busy only by many
ROUNDING_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}


@dataclass(frozen=True)
class Summary:
    """What `quantize` reports; the JSON names are these."""

    out: str
    model: str
    method: str
    bits: int
    bits_per_weight: float
    nbytes: int
    nbytes_original: int
    outliers: int
    calibration: dict[str, object] | None
    seconds: float
    peak_memory_mb: float
    peak_device_memory_mb: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Compresses `model` (a Hub id, a folder, or 'demo') into the folder `out`, which appears when all is written."""
    start, progress = time.monotonic(), progress or Progress()
    if revision is not None and (model == DEMO or Path(model).expanduser().is_dir()):
        raise RecipeError(f"--revision {revision} goes with a Hub id, and {model} is a local folder")
    keep_little()
    place = pick_device(device)
    check_writable(out, overwrite)
    path = locate(model, revision)
    checkpoint = open_checkpoint(path)
    skeleton = build_skeleton(checkpoint, trust_remote_code)
    plan = base_plan(skeleton, recipe)
    calibration = read_calibration(model, skeleton, recipe, progress, trust_remote_code)
    outer = outer_shards(skeleton)
    shards = len(outer) + len(skeleton.blocks)
    with (
        output_folder(out, shards, bytes_needed(skeleton, plan, recipe, calibration), overwrite) as output,
        Spill(parent=output.partial) as spill,
    ):
        walk = Walk(skeleton, calibration.rows if calibration else [], spill, torch.float32, place)
        inputs = walk.embed() if recipe.needs_text else None
        profile = outlier_profile(walk, inputs, plan, recipe, progress)
        if profile is not None:
            plan = gwq.allocate(plan, profile.candidates, recipe.outlier_fraction, recipe.outlier_scope)
            profile = profile.trimmed(plan)
        for names in outer:
            output.write_shard({name: checkpoint.read(skeleton.sources[name]) for name in names})
        streams = needed_streams(inputs, recipe)
        errors = compress_blocks(walk, streams, plan, profile, recipe, output, progress)
        output.copy_rest(path)
        output.write_json("config.json", checkpoint.config | {"quantization_config": native.quantization_config(plan)})
        result = record.outcome(plan, output.nbytes, checkpoint.nbytes, errors)
        made = record.provenance(model, path, revision) | record.settings(recipe, calibration)
        output.write_json(SIDECAR, made | result)
    return Summary(
        out=str(out),
        model=model,
        method=recipe.method,
        bits=recipe.bits,
        bits_per_weight=round(plan.bits_per_weight, 6),
        nbytes=output.nbytes,
        nbytes_original=checkpoint.nbytes,
        outliers=sum(weight.outliers for weight in plan.weights.values()),
        calibration=calibration.as_dict() if calibration else None,
        seconds=round(time.monotonic() - start, 3),
        peak_memory_mb=peak_memory_mb(),
        peak_device_memory_mb=peak_device_memory_mb(str(place)),
    )


def outlier_profile(
    walk: Walk, inputs: Activations | None, plan: Plan, recipe: Recipe, progress: Progress
) -> Profile | None:
    """The ranking that the recipe asks for, measured where it needs gradients; None where no outliers are kept."""
    if not recipe.outlier_fraction:
        return None
    if not recipe.needs_gradients:
        return rank_without_data(walk.skeleton, plan, recipe, walk.device)
    assert inputs is not None
    return measure(walk, inputs, plan, recipe, progress)


def needed_streams(inputs: Activations | None, recipe: Recipe) -> Streams:
    """The residual streams that the recipe's moments come from; what nobody needs is released."""
    if inputs is not None and not recipe.needs_moments:
        inputs.clear()
        inputs = None
    return Streams(
        inputs if recipe.inputs in ("original", "corrected") else None,
        inputs if recipe.inputs in ("sequential", "corrected") else None,
    )


def compress_blocks(
    walk: Walk,
    streams: Streams,
    plan: Plan,
    profile: Profile | None,
    recipe: Recipe,
    output: Output,
    progress: Progress,
) -> dict[str, float]:
    """Compresses and writes every block in turn; returns each weight's relative output error."""
    skeleton = walk.skeleton
    errors: dict[str, float] = {}
    for index in progress.over(range(len(skeleton.blocks)), "compress", len(skeleton.blocks)):
        linears = [name for name in skeleton.linears[index] if name in plan.weights]
        with walk.resident_block(index):
            original = {name: skeleton.linear(name).weight.data for name in linears}
            made, current = compress_block(walk, index, streams, original, plan, profile, recipe, progress)
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
        for name, (weight_parts, error) in made.items():
            shard |= native.stored_tensors(name, weight_parts)
            errors[name] = error
        kept = set(skeleton.names_in(skeleton.blocks[index])) - {f"{name}.weight" for name in linears}
        shard |= {name: skeleton.checkpoint.read(skeleton.sources[name]) for name in sorted(kept)}
        output.write_shard(shard)
    return errors


def compress_block(
    walk: Walk,
    index: int,
    streams: Streams,
    original: dict[str, Tensor],
    plan: Plan,
    profile: Profile | None,
    recipe: Recipe,
    progress: Progress,
) -> tuple[dict[str, tuple[list[Part], float]], dict[str, Tensor]]:
    """A resident block's linears, fusion group by fusion group: their parts and errors, and the weights they now have.

    `original` holds the weights as the modules store them, and so does what is returned.
    """
    skeleton, current = walk.skeleton, dict(original)
    result: dict[str, tuple[list[Part], float]] = {}
    for names, moments in group_moments(walk, index, streams, original, current, recipe):
        group = {name: as_rows(skeleton.module(name), original[name]) for name in names if name in original}
        targets, curvature = group_targets(group, moments)
        for name, target in targets.items():
            planned, mask = plan.weights[name], None
            if planned.outliers:
                assert profile is not None
                mask = gwq.outlier_mask(profile.candidates[name], planned.outliers, planned.shape)
            made, dense, error = compress_weight(group[name], target, planned, curvature, mask, recipe)
            current[name] = as_rows(skeleton.module(name), dense).contiguous()
            result[name] = made, error
            progress.weight(name, parts.nbytes(made) * 8 / planned.numel, error)
    return result, current


def group_moments(
    walk: Walk,
    index: int,
    streams: Streams,
    original: dict[str, Tensor],
    current: dict[str, Tensor],
    recipe: Recipe,
) -> Any:
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


def group_targets(group: dict[str, Tensor], moments: Moments | None) -> tuple[dict[str, Tensor], Curvature | None]:
    """What each linear of a fusion group is rounded towards [rows, cols], and the curvature it is rounded under.

    The target is the weight, corrected for the drift of its inputs. Uses up the moments: they are as large as what
    is made of them.
    """
    if moments is None:
        return group, None
    pulls = {} if moments.drift is None else {name: weight @ moments.drift for name, weight in group.items()}
    moments.drift = None
    curvature = factorize(moments.xtx)
    targets = {
        name: corrected_target(weight, pulls.pop(name), curvature) if pulls else weight
        for name, weight in group.items()
    }
    return targets, curvature


def compress_weight(
    weight: Tensor,
    target: Tensor,
    planned: WeightPlan,
    curvature: Curvature | None,
    mask: Tensor | None,
    recipe: Recipe,
) -> tuple[list[Part], Tensor, float]:
    """`target` [rows, cols] (float32) -> its parts, their sum in float32, and the output error relative to `weight`.

    Outliers (`mask`) keep their value in `weight`. Without curvature every input counts the same, so the error is the
    weight's own.
    """
    curvature = curvature or Curvature.flat(planned.shape[1], weight)
    stored = weight.to(planned.dtype)
    if mask is not None:
        mask = mask.to(weight.device)
        target = torch.where(mask, weight, target)
    step = max(1, ROUNDING_BYTES[weight.device.type] // (4 * planned.shape[1]))
    rounded = [
        QUANTIZERS[planned.quantizer](
            target[rows],
            planned.grid,
            planned.dtype,
            curvature,
            None if mask is None else mask[rows],
            bool(recipe.search),
        )
        for rows in (slice(start, start + step) for start in range(0, planned.shape[0], step))
    ]
    codes, scale, zero = (torch.cat([getattr(r, field) for r in rounded]) for field in ("codes", "scale", "zero"))
    made: list[Part] = [Affine.from_codes(codes, scale, zero, planned.grid)]
    if mask is not None:
        made.append(Sparse.from_mask(mask, stored))
    dense = parts.sum_of_parts(made)
    error = row_error(weight - dense, curvature.H).sum() / row_error(weight, curvature.H).sum().clamp(min=1e-30)
    return made, dense, float(error)


def read_calibration(
    model: str, skeleton: Skeleton, recipe: Recipe, progress: Progress, trust_remote_code: bool
) -> Calibration | None:
    """The calibration rows, as long as the model's context allows; None where the method needs no text."""
    if not recipe.needs_text:
        return None
    context = getattr(skeleton.model.config, "max_position_embeddings", None) or recipe.seq_len
    tokenizer = load_tokenizer(skeleton.checkpoint.path, trust_remote_code)
    text = calibration_text(recipe.calibration, model)
    rows = calibration_rows(text, tokenizer, recipe.samples, min(recipe.seq_len, context), recipe.seed)
    vocabulary, _ = skeleton.embedding_shape
    if max(int(row.max()) for row in rows.rows) >= vocabulary:
        raise UnsupportedError(
            f"the tokenizer gives ids beyond the model's vocabulary of {vocabulary}: they do not match"
        )
    if len(rows.rows) < recipe.samples:
        progress.note(
            f"the calibration text fills {len(rows.rows)} samples of {rows.seq_len} tokens, not {recipe.samples}"
        )
    return rows


def outer_shards(skeleton: Skeleton) -> list[list[str]]:
    """What lies outside the blocks (embeddings, norms, head), in runs of about a gigabyte."""
    shards: list[list[str]] = []
    room = 0
    for name in skeleton.names_outside_blocks():
        size = skeleton.checkpoint.tensors[skeleton.sources[name]].nbytes
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def bytes_needed(skeleton: Skeleton, plan: Plan, recipe: Recipe, calibration: Calibration | None) -> int:
    """Disk space for the result and, at the worst, for all activations of the run."""
    total = sum(skeleton.checkpoint.tensors[source].nbytes for source in skeleton.sources.values())
    dense = sum(weight.numel * weight.dtype.itemsize for weight in plan.weights.values())
    outliers = round(recipe.outlier_fraction * plan.numel) * 8 + sum(4 * w.shape[0] for w in plan.weights.values())
    activations = 0
    if calibration is not None:
        _, width = skeleton.embedding_shape
        lists = 4 + (len(skeleton.blocks) if recipe.needs_gradients else 0)
        activations = len(calibration.rows) * calibration.seq_len * width * 4 * lists
    return total - dense + plan.nbytes + outliers + activations


def pick_device(device: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU. Raises RecipeError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"unknown device {device!r}; choose auto, cpu, cuda, or cuda:1 and so on") from error
    if chosen.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {device!r} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen
