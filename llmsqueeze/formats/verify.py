"""A folder is read back from disk after it is written; one that differs from what was meant does not get its name.

One reading (inspection/reading.py) compares every tensor with the tensor that was handed to the writer, and every
compressed linear's weight, put together from the file as `config.json` says, with the weight that was computed with.
A short sample runs through the blocks as they are read, and each block's output is compared with its output when it
was compressed. The same reading serves the checks of `check`. Digests stand for the tensors. Memory: one decoder block
and a few activations; at the start, the embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmsqueeze.errors import CheckpointError, UnsupportedError, VerificationError
from llmsqueeze.formats.check import check, form_errors
from llmsqueeze.formats.folder import Output, digest, flush
from llmsqueeze.formats.inspection.opening import TRIED, Given, Opened, open_as_user, tried
from llmsqueeze.formats.inspection.reading import (
    Expected,
    Findings,
    Reading,
    compare_names,
    failed_check,
)
from llmsqueeze.formats.inspection.rerun import rerun, skeleton_on
from llmsqueeze.formats.inspection.runtimes import add_obstacles
from llmsqueeze.formats.inspection.stock import Stock, waiting
from llmsqueeze.formats.opened import Folder, open_folder
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.recorder import Returns
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.config import vocabulary
from llmsqueeze.model.experts.linear import Weight, real
from llmsqueeze.model.linears import as_rows
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed

TOKENS = 32  # of the sample
CPU = torch.device("cpu")


@dataclass
class Computed:
    """What the run computed with. weights: linear -> digest of its weight (float32, [rows, cols]), None if not known;
    sample: tokens [1, length]; outputs: each block's output for the sample; returns: what blocks of each kind
    return; enclosed: whether the model had one block, which encloses all linears."""

    weights: dict[str, bytes] | None = field(default_factory=dict)
    sample: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    returns: dict[Hashable, Returns] = field(default_factory=dict)
    enclosed: bool = False


@dataclass(frozen=True)
class Verified:
    """compared: how many tensors, weights and blocks were compared, and the largest difference of an output, relative
    to the largest output of its block. opens: runtime -> why it does not open the folder, "" if it does. folder: as it
    was read. logits: of the sample, [1, length - 1, vocabulary], by the weights that were read; None if there is no
    forward pass."""

    compared: dict[str, float]
    opens: dict[str, str]
    folder: Folder
    logits: Tensor | None = None


class Witness:
    """Sees every block while it is compressed: notes its weights, and its output for a short sample."""

    @timed("verify")
    def __init__(self, walk: Walk, seed: int, progress: Progress) -> None:
        """`walk`: that of the run; the sample is the beginning of its first, or random tokens if it has none."""
        self.computed = Computed()
        self._weights: dict[str, bytes] = {}
        self.computed.weights = self._weights
        vocabulary, _ = walk.skeleton.embedding_shape
        row = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        if walk.samples:
            row = walk.samples[0][:, :TOKENS]
        self._walk = Walk(walk.skeleton, [row], walk.spill, walk.dtype, walk.device)
        try:
            self._hidden = next(self._walk.embed().each(walk.device))
            self.computed.sample, self.computed.returns = row, self._walk.returns
            self.computed.enclosed = walk.skeleton.is_enclosed
        except UnsupportedError as error:  # rounding alone needs no walk
            progress.note(f"no forward pass in the verification: {error}")

    @property
    def hidden(self) -> Tensor | None:
        """The sample's hidden states behind the last block that was seen; None if there is no forward pass."""
        return None if self.computed.sample is None else self._hidden

    def state(self, linears: Iterable[str]) -> dict[str, Any]:
        """For a journal: the digests of these linears, and how the hidden states are packed."""
        digests = {name: self._weights[name].hex() for name in linears}
        return {"weights": digests, "layouts": self._walk.layouts(len(self.computed.outputs))}

    def restore(self, state: Mapping[str, Any], hidden: Tensor | None, block: bool) -> None:
        """Takes over what the witness of a killed run has seen: weights and, behind a block or before the first, the
        hidden states."""
        self._weights |= {name: bytes.fromhex(one) for name, one in state["weights"].items()}
        if hidden is not None:
            self._hidden = hidden.to(self._walk.device)
            if block:
                self.computed.outputs.append(hidden)
            self._walk.restore_layouts(len(self.computed.outputs), state["layouts"])

    @timed("verify")
    def see_outside(self, weights: Mapping[str, Tensor]) -> None:
        """Compressed embeddings and head, and linears of other towers, by the names of their modules."""
        self._weights |= {name: digest(weight) for name, weight in weights.items()}

    @timed("verify")
    def see(self, index: int, weights: Mapping[str, Weight]) -> None:
        """Block `index` is resident and computes with `weights`, given as the modules store them."""
        for name, weight in weights.items():
            self._weights[name] = digest(as_rows(self._walk.skeleton.module(name), real(weight)))
        if self.computed.sample is not None:
            with self._walk.skeleton.using(weights), torch.no_grad():
                self._hidden = self._walk.run(index, 0, self._hidden)
            self.computed.outputs.append(self._hidden.cpu())


@timed("verify")
def verify(
    output: Output,
    computed: Computed,
    device: torch.device = CPU,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    complete: bool = True,
) -> Verified:
    """Reads the finished folder once, and compares and checks it. Raises VerificationError.

    complete: False for a folder of which only the first blocks were written, as a trial does.
    """
    with doubts(output.partial):
        folder = open_folder(open_checkpoint(output.partial), trust_remote_code)
        findings = Findings(form_errors(folder) if complete else [])
        expected = Expected(output.digests, computed.weights)
        compare_names(folder, expected)
        reading = Reading(folder, expected, device, sound=not findings.errors)
        largest, logits = 0.0, None
        if computed.sample is not None and not findings.errors:
            with Spill(parent=output.partial) as spill:
                walk = Walk(skeleton_on(folder, computed.enclosed), [computed.sample], spill, torch.float32, device)
                if complete and len(walk.modules) != len(computed.outputs):
                    raise VerificationError(
                        f"the folder describes {len(walk.modules)} blocks, not {len(computed.outputs)}"
                    )
                walk.returns |= computed.returns
                largest, logits = rerun(walk, folder, reading, computed.outputs, progress or Progress(), complete)
        reading.rest()
        findings.errors += reading.errors
        add_obstacles(folder, findings)
        if findings.errors:
            raise VerificationError(failed_check(findings.errors[0]))
    compared = {
        "tensors": len(output.digests),
        "weights": len(computed.weights or ()),
        "blocks": len(computed.outputs),
        "largest_difference": largest,
    }
    return Verified(compared, findings.verdicts(), folder, logits)


def verified_and_opened(
    output: Output,
    computed: Computed | None,
    device: torch.device,
    trust_remote_code: bool,
    portable: bool,
    progress: Progress,
) -> tuple[Verified, Opened] | None:
    """Verifies the finished folder, and opens it as its user will and compares the logits. portable: stock
    transformers, which probably open it, are imported meanwhile. Of several processes the second opens the folder while
    the first one reads it; only the first one gets the result, and has `computed`. Raises VerificationError."""
    sample = processes.told(None if computed is None else computed.sample)

    def read() -> Verified:
        assert computed is not None, "the first process has seen what was computed"
        return verify(output, computed, device, trust_remote_code, progress)

    def opened() -> Given:
        if sample is None:
            return {}
        with doubts(output.partial):
            return tried(open_folder(open_checkpoint(output.partial), trust_remote_code), sample, portable)

    if processes.count() == 1:
        with waiting() if portable else nullcontext() as stock:
            return _opened(output, read(), sample, progress, stock, None)
    verified, given = processes.side_by_side([read, opened])
    return _opened(output, verified, sample, progress, None, given) if processes.first() else None


def _opened(
    output: Output,
    verified: Verified,
    sample: Tensor | None,
    progress: Progress,
    stock: Stock | None,
    given: Given | None,
) -> tuple[Verified, Opened]:
    """The verified folder, and what opens it: in this process, or as another one has tried."""
    if sample is None or verified.logits is None:
        wanted = [runtime for runtime in TRIED if not verified.opens.get(runtime, "")]
        return verified, Opened([], dict.fromkeys(wanted, "the verification has no logits to compare with"))
    with doubts(output.partial):
        logits, opens = verified.logits, verified.opens
        return verified, open_as_user(verified.folder, sample, logits, opens, progress, stock, given)


def rewritten(
    output: Output, weights: dict[str, bytes] | None, trust_remote_code: bool, progress: Progress
) -> tuple[dict[str, str], Opened]:
    """Verifies and opens a folder that was made from another one: the verdicts, and what opened it. weights: as of
    `Computed`. Raises VerificationError."""
    verified = verify(output, Computed(weights), CPU, trust_remote_code)
    with doubts(output.partial):
        size = vocabulary(verified.folder.model.config)
        tokens = torch.randint(size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        return verified.opens, open_as_user(verified.folder, tokens, None, verified.opens, progress)


@timed("verify")
def inspected(output: Output, trust_remote_code: bool = False) -> dict[str, str]:
    """The verdicts of `check` on the finished folder: runtime -> why it does not open it, "" if it does.

    Raises VerificationError if the folder is not sound.
    """
    with doubts(output.partial):
        result = check(str(output.partial), trust_remote_code=trust_remote_code)
        if not result["sound"]:
            raise VerificationError(failed_check((result["errors"] or [result["unknown"]])[0]))
    verdicts: dict[str, str] = result["verdicts"]
    return verdicts


@contextmanager
def doubts(folder: Path) -> Iterator[None]:
    """A folder that cannot be read back has failed the verification too."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        raise VerificationError(
            f"the folder that was written cannot be read back: {error}; the result stays in {folder}"
        ) from error
    except VerificationError as error:
        raise VerificationError(f"{error}; the result stays in {folder}, and is not to be used") from error


@contextmanager
def named(weight: str) -> Iterator[None]:
    """The message of a weight's failure gets its name."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(f"{weight}: {error}") from error


def same_tensors(file: Path, expected: Mapping[str, Tensor]) -> None:
    """Raises VerificationError unless the file holds these tensors, bit by bit."""
    flush(file)
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        different = (n for n, t in expected.items() if n not in names or digest(stored.get_tensor(n)) != digest(t))
        wrong = next(different, None)
    if wrong is not None:
        raise VerificationError(f"{wrong} in {file} is not what was written: disk or memory are faulty")
