"""What was written is read back from disk and compared with what was meant; what differs does not get its final name.

Bit by bit: every tensor of the file against the one that was handed to the writer, and every compressed linear's
weight, put together again from the file by what `config.json` says of it, against the weight that was computed with.
Then a short sample runs through the model that the folder describes, block by block, and every block's output is
compared with what the same block made of it while it was compressed. Digests stand for the tensors, so that nothing
but a few activations is kept. Memory: one decoder block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, UnsupportedError, VerificationError
from llmsqueeze.formats.check import check
from llmsqueeze.formats.entries import Entry, is_compressed, read_entries, read_parts
from llmsqueeze.formats.folder import Output, digest, settle
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton, compressed_skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.progress import Progress

TOKENS = 32  # of the sample
TOLERANCE = 1e-4  # of a block's largest output; the same operations on the same device give the same bits


@dataclass
class Meant:
    """What the folder is meant to hold: linear -> digest of its weight (float32, [rows, cols]); which of them are
    embeddings or head; blocks' outputs."""

    weights: dict[str, bytes] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    sample: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)


class Witness:
    """Sees every block while it is compressed: notes its weights, and what it makes of a short sample."""

    def __init__(self, walk: Walk, seed: int, progress: Progress) -> None:
        """`walk`: that of the run; the sample is the beginning of its first, or random tokens where it has none."""
        self.meant = Meant()
        vocabulary, _ = walk.skeleton.embedding_shape
        row = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        if walk.samples:
            row = walk.samples[0][:, :TOKENS]
        self._walk = Walk(walk.skeleton, [row], walk.spill, walk.dtype, walk.device)
        try:
            self._hidden = next(self._walk.embed().each(walk.device))
            self.meant.sample = row
        except UnsupportedError as error:  # rounding alone needs no walk
            progress.note(f"no forward pass in the verification: {error}")

    def see_ends(self, weights: Mapping[str, Tensor]) -> None:
        """Embeddings and head, by their modules' names, where they are compressed."""
        self.meant.weights |= {name: digest(weight) for name, weight in weights.items()}
        self.meant.ends = tuple(weights)

    def see(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Block `index` is resident and computes with `weights`, given as the modules store them."""
        for name, weight in weights.items():
            self.meant.weights[name] = digest(as_rows(self._walk.skeleton.module(name), weight))
        if self.meant.sample is not None:
            with self._walk.skeleton.using(weights), torch.no_grad():
                self._hidden = self._walk.run(index, 0, self._hidden)
            self.meant.outputs.append(self._hidden.cpu())


def verify(
    output: Output, meant: Meant, device: torch.device, trust_remote_code: bool, progress: Progress
) -> dict[str, float]:
    """Compares the finished folder with what was meant; returns how much was compared, and the largest difference of an
    output, relative to the block's largest. Raises VerificationError."""
    with doubts(output.partial):
        checkpoint = open_checkpoint(output.partial)
        read_back(checkpoint, output.digests)
        compare_weights(checkpoint, meant.weights, device)
        largest = 0.0
        if meant.sample is not None:
            skeleton = compressed_skeleton(checkpoint, trust_remote_code, compressed_ends(checkpoint, meant))
            largest = compare_outputs(skeleton, meant.sample, meant.outputs, device, output.partial, progress)
    return {
        "tensors": len(output.digests),
        "weights": len(meant.weights),
        "blocks": len(meant.outputs),
        "largest_difference": largest,
    }


def compressed_ends(checkpoint: Checkpoint, meant: Meant) -> dict[str, Callable[[], Tensor]]:
    """What makes the weights of compressed embeddings and head from the file."""
    entries = read_entries(checkpoint)
    return {
        f"{name}.weight": partial(_dense_weight, checkpoint, entries[name]) for name in meant.ends if name in entries
    }


def _dense_weight(checkpoint: Checkpoint, entry: Entry) -> Tensor:
    return parts.sum_of_parts(read_parts(checkpoint, entry))


def inspected(output: Output, trust_remote_code: bool = False) -> dict[str, str]:
    """What `check` says of the finished folder: target -> why it does not open, "" if it does.

    Raises VerificationError if the folder is not sound.
    """
    with doubts(output.partial):
        found = check(str(output.partial), trust_remote_code=trust_remote_code)
        if found["errors"]:
            raise VerificationError(f"what was written does not pass the check: {found['errors'][0]}")
    verdicts: dict[str, str] = found["verdicts"]
    return verdicts


@contextmanager
def doubts(folder: Path) -> Iterator[None]:
    """What cannot even be read back is a failed verification too."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        raise VerificationError(
            f"what was written cannot be read back: {error}; the result stays in {folder}"
        ) from error
    except VerificationError as error:
        raise VerificationError(f"{error}; the result stays in {folder}, and is not to be used") from error


@contextmanager
def named(weight: str) -> Iterator[None]:
    """A weight that fails while it is made is named."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"{weight}: {error}") from error


def read_back(checkpoint: Checkpoint, written: Mapping[str, bytes]) -> None:
    """Raises VerificationError unless the folder holds these tensors, bit by bit, and no others."""
    if different := sorted(set(written) ^ set(checkpoint.tensors)):
        raise VerificationError(f"{different[0]} was written, or can be read, but not both")
    for name, expected in written.items():
        if digest(checkpoint.read_raw(name)) != expected:
            raise VerificationError(
                f"{name} in {checkpoint.tensors[name].file.name} is not what was written: disk or memory are faulty"
            )


def same_tensors(file: Path, meant: Mapping[str, Tensor]) -> None:
    """Raises VerificationError unless the file holds these tensors, bit by bit."""
    settle(file)
    with safe_open(file, framework="pt") as held:
        names = set(held.keys())
        wrong = next((n for n in meant if n not in names or digest(held.get_tensor(n)) != digest(meant[n])), None)
    if wrong is not None:
        raise VerificationError(f"{wrong} in {file} is not what was written: disk or memory are faulty")


def compare_weights(checkpoint: Checkpoint, meant: Mapping[str, bytes], device: torch.device | str = "cpu") -> None:
    """Raises VerificationError unless the config describes these linears, and their parts sum to these weights."""
    entries = read_entries(checkpoint) if is_compressed(checkpoint) else {}
    if different := sorted(set(entries) ^ set(meant)):
        raise VerificationError(f"the config and what was compressed differ over {different[0]}")
    for name, entry in entries.items():
        if digest(parts.sum_of_parts(read_parts(checkpoint, entry, device))) != meant[name]:
            raise VerificationError(f"{name}, put together from the file, is not the weight that was meant")


def compare_outputs(
    skeleton: Skeleton, sample: Tensor, expected: list[Tensor], device: torch.device, work: Path, progress: Progress
) -> float:
    """The largest difference between a block's output and what is expected, relative to the block's largest output.

    Raises VerificationError for more than the tolerance.
    """
    entries, largest = read_entries(skeleton.checkpoint), 0.0
    if len(skeleton.blocks) != len(expected):
        raise VerificationError(f"the folder describes {len(skeleton.blocks)} blocks, not {len(expected)}")
    with Spill(parent=work) as spill, torch.no_grad():
        walk = Walk(skeleton, [sample], spill, torch.float32, device)
        hidden = next(walk.embed().each(device))
        for index in progress.over(range(len(expected)), "verify", len(expected)):
            with walk.resident_block(index):
                weights = {
                    name: as_rows(
                        skeleton.module(name),
                        parts.sum_of_parts(read_parts(skeleton.checkpoint, entries[name], device)),
                    ).contiguous()
                    for name in skeleton.linears[index]
                    if name in entries
                }
                with skeleton.using(weights):
                    hidden = walk.run(index, 0, hidden)
            wanted = expected[index].to(hidden)
            scale = float(wanted.abs().max().clamp(min=1e-30))
            difference = float((hidden - wanted).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise VerificationError(
                    f"the output of {skeleton.blocks[index]} differs by {difference:.2g} of its largest value from "
                    "what it was while it was compressed"
                )
            largest = max(largest, difference)
    return largest
