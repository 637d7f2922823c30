"""The forward pass of a folder while it is read: block by block, each tensor once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError, VerificationError
from llmsqueeze.formats.inspection.reading import Reading
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.linear import Weight
from llmsqueeze.model.linears import as_rows, find_blocks, find_linears
from llmsqueeze.model.skeleton import Skeleton, compressed_skeleton
from llmsqueeze.progress import Progress

TOLERANCE = 1e-4  # of a block's largest output; the same operations on the same device give the same bits


def rerun(
    walk: Walk, folder: Folder, reading: Reading, outputs: Sequence[Tensor], progress: Progress, complete: bool
) -> tuple[float, Tensor | None]:
    """Runs the walk's sample through the blocks while they are read; returns the largest difference between a block's
    output and the given one, relative to the block's largest output, and of a `complete` folder the logits. Raises
    VerificationError above the tolerance."""
    skeleton, largest = walk.skeleton, 0.0
    with torch.no_grad():
        outside = outside_blocks(skeleton, folder, reading)
        with skeleton.overriding(outside):
            hidden = next(walk.embed().each(walk.device))
        for index in progress.over(range(len(outputs)), "verify", len(outputs)):
            kept, at_use = kept_in(skeleton, index, folder, reading), walk.read_at_use(index)
            weights: dict[str, Weight] = {
                name: partial(reading.weight, name)
                if name in at_use
                else as_rows(skeleton.module(name), reading.weight(name)).contiguous()
                for name in skeleton.linears[index]
                if name in folder.entries
            }
            with skeleton.overriding(kept), walk.resident_block(index), skeleton.using(weights):
                hidden = walk.run(index, 0, hidden)
            output, computed = (walk.hidden_in(index + 1, 0, one) for one in (hidden, outputs[index].to(hidden)))
            largest = max(largest, difference(output, computed, skeleton.blocks[index]))
        if not complete:
            return largest, None
        with skeleton.overriding(heads(skeleton, folder, reading) | outside):
            return largest, logits_of(walk, hidden)


def logits_of(walk: Walk, hidden: Tensor) -> Tensor | None:
    """[1, length - 1, vocabulary] on the CPU: the next-token logits of the walk's sample; None if the head gets more
    than one vector for each token."""
    try:
        with walk.head.resident():
            slices = walk.head.logits(hidden, walk.samples[0])
            copies = [logits.to("cpu", torch.float32, copy=True) for _, logits in slices]
    except UnsupportedError:
        return None
    return torch.cat(copies, dim=-1)[None]


def skeleton_on(folder: Folder, enclosed: bool = False) -> Skeleton:
    """The folder's model, with one block if it is `enclosed`. All tensors have to be given: none of them is read from
    the checkpoint a second time."""

    def not_given() -> Tensor:
        raise VerificationError("a tensor was needed before it was read")

    own = {name for block in find_blocks(folder.model) for name in find_linears(folder.model, block)}
    shared = {*(ties := folder.model.all_tied_weights_keys), *ties.values()}
    outside = [f"{name}.weight" for name in folder.entries if name not in own or f"{name}.weight" in shared]
    sources = dict.fromkeys([*folder.checkpoint.tensors, *outside], not_given)
    skeleton = compressed_skeleton(folder.checkpoint, folder.trust_remote_code, sources)
    return skeleton.enclosed() if enclosed else skeleton


def outside_blocks(skeleton: Skeleton, folder: Folder, reading: Reading) -> dict[str, Tensor]:
    """The parameters outside the blocks that embedding needs: all but an untied head."""
    untied = {f"{name}.weight" for name in skeleton.ends[1:]}
    names = [name for name in skeleton.names_around_blocks() if name not in untied]
    return {name: whole(name, folder, reading) for name in names}


def heads(skeleton: Skeleton, folder: Folder, reading: Reading) -> dict[str, Tensor]:
    """The weight of an untied head, or of all ends if they are inside the one block that encloses all."""
    ends = skeleton.ends if skeleton.is_enclosed else skeleton.ends[1:]
    return {f"{name}.weight": whole(f"{name}.weight", folder, reading) for name in ends}


def whole(name: str, folder: Folder, reading: Reading) -> Tensor:
    """A parameter outside the blocks, or shared by several: the sum of its parts, if it has some."""
    linear = name.removesuffix(".weight")
    if linear not in folder.entries or linear == name:
        return reading.kept(name)
    return as_rows(folder.model.get_submodule(linear), reading.weight(linear)).contiguous()


def kept_in(skeleton: Skeleton, index: int, folder: Folder, reading: Reading) -> dict[str, Tensor]:
    """The tensors of a block that are not those of its own compressed linears."""
    return {name: whole(name, folder, reading) for name in skeleton.names_used_by(skeleton.blocks[index])}


def difference(output: Tensor, computed: Tensor, block: str) -> float:
    """Relative to the largest computed value. Raises VerificationError above the tolerance."""
    scale = float(computed.abs().max().clamp(min=1e-30))
    relative = float((output - computed).abs().max()) / scale
    if not relative <= TOLERANCE:
        raise VerificationError(
            f"the output of {block} differs by {relative:.2g} of its largest value from its output when it was "
            "compressed"
        )
    return relative
