"""A finished folder opened as its user will open it, and its logits for a sample.

`llmsqueeze.load` opens it in this process, in float32. Stock transformers open a folder that they are said to open, in
a process that has no llmsqueeze. Both need the whole model in memory, so a model that would not leave a tenth of what
is free is not opened, and the summary says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.errors import SqueezeError, VerificationError, first_line
from llmsqueeze.formats.inspection.stock import Stock, by_transformers, waiting
from llmsqueeze.formats.load import load
from llmsqueeze.formats.opened import Folder
from llmsqueeze.memory import fits, free_memory, give_back
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed

TOLERANCE = 1e-3  # of the largest logit: sums in float32, added in another order
TRIED = NATIVE, STOCK = "native", "transformers"
Given = Mapping[str, tuple[Tensor | None, str]]  # runtime -> logits [1, length, vocabulary], or why there are none


@dataclass(frozen=True)
class Opened:
    """runtimes: those that opened the folder here, with the logits that were computed with; why_not: runtime -> why one
    that should open it was not tried, or did not."""

    runtimes: list[str] = field(default_factory=list)
    why_not: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For a summary."""
        return {"opened": self.runtimes, "not_opened": self.why_not}


@timed("verify")
def open_as_user(
    folder: Folder,
    sample: Tensor,
    logits: Tensor | None,
    opens: Mapping[str, str],
    progress: Progress,
    stock: Stock | None = None,
    given: Given | None = None,
) -> Opened:
    """Opens the folder by each runtime that `opens` names without a reason against it.

    sample: tokens [1, length]; logits: those that were computed with, [1, length - 1, vocabulary], or None: then those
    of the first runtime count. stock: the process of stock transformers, if one is waiting; given: what `tried` gave,
    if another process was to open the folder. Raises VerificationError if `llmsqueeze.load` does not open the folder,
    or gives other logits.
    """
    wanted = [runtime for runtime in TRIED if not opens.get(runtime, "")]
    result = Opened()
    for runtime in progress.over(wanted, "open", len(wanted)):
        own, why = given[runtime] if given and runtime in given else opened_by(runtime, folder, sample, stock)
        if own is not None:
            logits = own if logits is None else logits
            why = compared(own[:, : logits.shape[1]], logits)
        if not why:
            result.runtimes.append(runtime)
        elif runtime == NATIVE and own is not None:
            raise VerificationError(f"opened by llmsqueeze.load, the folder gives other logits: {why}")
        else:
            result.why_not[runtime] = why
    return result


def tried(folder: Folder, sample: Tensor, portable: bool) -> Given:
    """What the runtimes give that probably open the folder; portable: stock transformers among them."""
    with waiting() if portable else nullcontext() as stock:
        return {runtime: opened_by(runtime, folder, sample, stock) for runtime in TRIED[: 1 + portable]}


def opened_by(runtime: str, folder: Folder, sample: Tensor, stock: Stock | None = None) -> tuple[Tensor | None, str]:
    """The logits [1, length, vocabulary] of the model that a runtime opens, or why there are none."""
    if why := too_large(folder, runtime):
        return None, why
    try:
        return by_load(folder, sample) if runtime == NATIVE else by_transformers(folder, sample, stock)
    except OSError as error:  # no other process, no disk: the result is as good without
        return None, f"opening it here failed: {first_line(error)}"


def too_large(folder: Folder, runtime: str) -> str:
    """Why the folder is not opened here, if it takes too much memory; "" if it does not, or if nobody knows."""
    free, needed = free_memory(), memory_needed(folder, runtime)
    if free is None or fits(needed, free):
        return ""
    return f"opening it takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def memory_needed(folder: Folder, runtime: str) -> int:
    """Bytes of the model in memory in float32: transformers, and coded weights, have every weight dense."""
    dense: int = 4 * sum(tensor.numel() for tensor in folder.model.state_dict().values())
    if runtime == STOCK:
        return dense + folder.checkpoint.nbytes
    small = [one for one in folder.entries.values() if not any(spec["part"] == parts.Coded.kind for spec in one.specs)]
    largest = max((entry.numel for entry in small), default=0)
    stored = sum(folder.checkpoint.tensors[name].nbytes for entry in small for name in entry.tensors)
    return dense - 4 * sum(entry.numel for entry in small) + stored + 4 * largest


def by_load(folder: Folder, sample: Tensor) -> tuple[Tensor | None, str]:
    """The logits [1, length, vocabulary] of the model that `llmsqueeze.load` opens, or why there are none. Raises
    VerificationError if it does not open the folder."""
    try:
        with redirect_stderr(StringIO()):  # bars of other libraries
            model: Any = load(str(folder.path), dtype=torch.float32, trust_remote_code=folder.trust_remote_code)
        with torch.no_grad():
            return model(input_ids=sample.cpu(), use_cache=False).logits.float(), ""
    except MemoryError:
        return None, "out of memory"
    except SqueezeError as error:
        raise VerificationError(f"llmsqueeze.load does not open the folder: {error}") from error
    except Exception as error:  # whatever the model's own code raises
        raise VerificationError(f"opened by llmsqueeze.load, the model does not run: {first_line(error)}") from error
    finally:
        give_back()


def compared(given: Tensor, logits: Tensor) -> str:
    """By how much logits differ, if it is too much; "" if they do not."""
    if given.shape != logits.shape:
        return f"they are {list(given.shape)}, not {list(logits.shape)}"
    relative = float((given - logits).abs().max() / logits.abs().max().clamp(min=1e-30))
    return "" if relative <= TOLERANCE else f"they differ by {relative:.2g} of the largest"
