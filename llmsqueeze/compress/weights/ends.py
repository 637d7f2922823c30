"""Tensors outside the blocks: outer linears; embeddings and head, coded or rounded if the plan says so; linears of
other towers, rounded if the plan says so; and all others unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.compress.weights.blocks import Run, dense_of
from llmsqueeze.compress.weights.group import Compressed
from llmsqueeze.compress.weights.weight import WeightSettings, compress_weight, group_targets
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.folder import Output
from llmsqueeze.formats.verify import Witness
from llmsqueeze.measure.outer import outer_moments
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import Part
from llmsqueeze.quantizers.curvature import factorize

SHARD_BYTES = 1 << 30


def compress_ends(run: Run) -> dict[str, Compressed]:
    """Embeddings and head, if they are to be coded or rounded."""
    compressed: dict[str, Compressed] = {}
    coding, device = run.decision.coding, run.walk.device
    for name, planned in run.decision.plan.weights.items():
        if planned.end and coding is not None:
            group = {name: run.walk.skeleton.read(f"{name}.weight").to(device).float()}
            compressed |= run.compress(group, group, factorize(coding.moments[name].to(device).clone()))
    for name, planned in run.decision.plan.ends.items():
        compressed[name] = Compressed(*round_beside(run, planned), None)
        run.progress.weight(name, 8 * planned.nbytes / planned.numel, compressed[name].error)
    return compressed


def compress_outer(run: Run, inputs: Activations | None) -> dict[str, Compressed]:
    """The linears around the blocks, and those that several blocks share. `inputs`: of the first block, for every
    sample, if the method needs moments."""
    skeleton, planned = run.walk.skeleton, run.decision.plan.weights
    names = [name for name in skeleton.outer if name in planned]
    with_moments = names and inputs is not None and run.recipe.needs_moments
    moments = outer_moments(run.walk, inputs, names) if with_moments and inputs is not None else {}
    compressed: dict[str, Compressed] = {}
    for name in names:
        stored = skeleton.read(f"{name}.weight").to(run.walk.device).float()
        group, seen = {name: as_rows(skeleton.module(name), stored)}, moments.pop(name, None)
        chance = None if seen is None else seen.chance
        targets, curvature = group_targets(group, seen)
        (one,) = run.compress(group, targets, curvature).values()
        compressed[name] = one._replace(chance=chance)
    return compressed


def stored_parts(output: Output, plan: Plan, linears: Sequence[str]) -> dict[str, list[Part]]:
    """The parts of those of the linears that are planned, as they were written. Raises CheckpointError."""
    output.wait()
    restored = {}
    for name in (name for name in linears if name in plan.weights):
        planned = plan.weights[name]
        restored[name] = [
            parts.restore(planned.shape, spec, output.tensors_of(f"{name}.parts.{at}."))
            for at, spec in enumerate(planned.specs)
        ]
    return restored


def readers(
    skeleton: Skeleton, weights: Mapping[str, Sequence[Part]], device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Parameter -> what puts it together from its parts, as its module stores it. weights: linear -> its parts."""

    def dense(name: str) -> Tensor:
        return as_rows(skeleton.module(name), dense_of(weights[name], device)).contiguous()

    return {f"{name}.weight": partial(dense, name) for name in weights}


def outside_shard(
    run: Run, names: Sequence[str], ends: Mapping[str, Compressed], witness: Witness | None
) -> dict[str, Tensor]:
    """The named tensors outside the blocks as the file has them. ends: those that are compressed; `witness` sees those
    that are rounded here."""
    skeleton, towers = run.walk.skeleton, run.decision.plan.towers
    portable = run.decision.plan.portable
    shard: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module in ends and name != module:
            shard |= (compressed_tensors if portable else native).stored_tensors(module, ends[module].parts)
        elif module in towers and name != module:
            rounded, dense, _ = round_beside(run, towers[module])
            shard |= native.stored_tensors(module, rounded)
            if witness is not None:
                witness.see_outside({module: dense})
        else:
            shard[name] = skeleton.read_stored(name)
    return shard


def round_beside(run: Run, planned: WeightPlan) -> tuple[list[Part], Tensor, float]:
    """The parts of a weight that is rounded beside the budget, their sum [rows, cols], and its relative error. The
    scales of embeddings and head are searched."""
    skeleton, device = run.walk.skeleton, run.walk.device
    stored = skeleton.read(f"{planned.name}.weight").to(device).float()
    weight = as_rows(skeleton.module(planned.name), stored)
    settings = replace(WeightSettings.of(run.recipe), pack=False, search=planned.end)
    return compress_weight(weight, weight, planned, None, None, None, settings)


def outside_shards(skeleton: Skeleton) -> list[list[str]]:
    """The names of the tensors outside the blocks (embeddings, norms, head, outer linears), in runs of about a
    gigabyte."""
    shards: list[list[str]] = []
    room = 0
    for name in skeleton.names_outside_blocks():
        size = skeleton.nbytes(name)
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards
