"""What lies outside the blocks: embeddings and head, coded where they are to be, and everything else as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.multiplier import Pace
from llmsqueeze.compress.decide import Decision
from llmsqueeze.compress.group import Compressed, compress_group, compressed_nbytes
from llmsqueeze.compress.job import Job
from llmsqueeze.formats import native
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.curvature import Curvature, factorize
from llmsqueeze.recipe.recipe import Recipe

SHARD_BYTES = 1 << 30


def compress_ends(
    skeleton: Skeleton, decided: Decision, recipe: Recipe, place: torch.device, progress: Progress, pace: Pace | None
) -> dict[str, Compressed]:
    """Embeddings and head, where they are to be coded."""
    found: dict[str, Compressed] = {}
    for name in (name for name, weight in decided.plan.weights.items() if weight.outer):
        assert decided.coding is not None
        assert pace is not None
        weight = skeleton.read(f"{name}.weight").to(place).float()
        curvature = factorize(decided.coding.moments[name].to(place).clone())

        def attempt(
            shift: float, name: str = name, weight: Tensor = weight, curvature: Curvature = curvature
        ) -> dict[str, Compressed]:
            return compress_group({name: weight}, {name: weight}, curvature, decided, recipe, shift)

        made = pace.settle([name], attempt, compressed_nbytes)
        found[name] = made[name]
        bits = parts.nbytes(found[name].parts) * 8 / decided.plan.weights[name].numel
        progress.weight(name, bits, found[name].error)
    return found


def outer_shard(job: Job, names: Sequence[str], ends: dict[str, Compressed]) -> dict[str, Tensor]:
    """Tensors outside the blocks as the file has them."""
    shard: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module in ends:
            shard |= native.stored_tensors(module, ends[module].parts)
        else:
            shard[name] = job.checkpoint.read(job.skeleton.sources[name])
    return shard


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
