"""Tensors outside the blocks: embeddings and head, coded if the plan says so; linears of other towers, rounded if the
plan says so; and all others unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from llmsqueeze.allocation.plan import WeightPlan
from llmsqueeze.compress.weights.blocks import Run
from llmsqueeze.compress.weights.group import Compressed
from llmsqueeze.compress.weights.weight import WeightSettings, compress_weight
from llmsqueeze.formats import native
from llmsqueeze.formats.verify import Witness
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import Part
from llmsqueeze.quantizers.curvature import factorize

SHARD_BYTES = 1 << 30


def compress_ends(run: Run) -> dict[str, Compressed]:
    """Embeddings and head, if they are to be coded."""
    compressed: dict[str, Compressed] = {}
    coding, device = run.decision.coding, run.walk.device
    for name, planned in run.decision.plan.weights.items():
        if planned.end and coding is not None:
            group = {name: run.walk.skeleton.read(f"{name}.weight").to(device).float()}
            compressed |= run.compress(group, group, factorize(coding.moments[name].to(device).clone()))
    return compressed


def outside_shard(
    run: Run, names: Sequence[str], ends: Mapping[str, Compressed], witness: Witness | None
) -> dict[str, Tensor]:
    """The named tensors outside the blocks as the file has them; `witness` sees those that are rounded here."""
    skeleton, towers = run.walk.skeleton, run.decision.plan.towers
    shard: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module in ends:
            shard |= native.stored_tensors(module, ends[module].parts)
        elif module in towers and name != module:
            rounded, dense = round_tower(run, towers[module])
            shard |= native.stored_tensors(module, rounded)
            if witness is not None:
                witness.see_outside({module: dense})
        else:
            shard[name] = skeleton.read_stored(name)
    return shard


def round_tower(run: Run, planned: WeightPlan) -> tuple[list[Part], Tensor]:
    """The parts of a linear of another tower, and their sum [rows, cols]."""
    skeleton, device = run.walk.skeleton, run.walk.device
    stored = skeleton.read(f"{planned.name}.weight").to(device).float()
    weight = as_rows(skeleton.module(planned.name), stored)
    settings = replace(WeightSettings.of(run.recipe), pack=False, search=False)
    rounded, dense, _ = compress_weight(weight, weight, planned, None, None, None, settings)
    return rounded, dense


def outside_shards(skeleton: Skeleton) -> list[list[str]]:
    """The names of the tensors outside the blocks (embeddings, norms, head), in runs of about a gigabyte."""
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
