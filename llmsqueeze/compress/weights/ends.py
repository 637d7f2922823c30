"""Tensors outside the blocks: embeddings and head, coded if the plan says so, and all others unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmsqueeze.compress.weights.blocks import Run
from llmsqueeze.compress.weights.group import Compressed
from llmsqueeze.formats import native
from llmsqueeze.model.skeleton import Skeleton
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


def outside_shard(skeleton: Skeleton, names: Sequence[str], ends: Mapping[str, Compressed]) -> dict[str, Tensor]:
    """The named tensors outside the blocks as the file has them."""
    shard: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module in ends:
            shard |= native.stored_tensors(module, ends[module].parts)
        else:
            shard[name] = skeleton.read_stored(name)
    return shard


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
