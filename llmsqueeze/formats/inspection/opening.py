"""A finished folder opened as its user will open it, and its logits for a sample.

`llmsqueeze.load` opens it in this process, in float32. Stock transformers open a folder that they are said to open, in
a process that has no llmsqueeze. Both need the whole model in memory, so a model that would not leave a tenth of what
is free is not opened, and the summary says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.errors import SqueezeError, VerificationError, first_line
from llmsqueeze.formats.load import load
from llmsqueeze.formats.opened import Folder
from llmsqueeze.memory import free_memory, give_back
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed

TOLERANCE = 1e-3  # of the largest logit: sums in float32, added in another order
SPARE = 0.1  # of the free memory that stays free
TRIED = NATIVE, STOCK = "native", "transformers"

# what the entry in sys.modules does: an import of llmsqueeze fails
OPEN_STOCK = """
import json, sys
sys.modules["llmsqueeze"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
task = json.loads(sys.argv[1])
auto = getattr(transformers, task["auto"])
model = auto.from_pretrained(task["folder"], dtype=torch.float32, trust_remote_code=task["trust"]).eval()
tokens = load_file(task["sample"])["tokens"]
with torch.no_grad():
    logits = model(input_ids=tokens, use_cache=False).logits
save_file({"logits": logits.float().contiguous()}, task["out"])
"""


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
    folder: Folder, sample: Tensor, logits: Tensor | None, opens: Mapping[str, str], progress: Progress
) -> Opened:
    """Opens the folder by each runtime that `opens` names without a reason against it.

    sample: tokens [1, length]; logits: those that were computed with, [1, length - 1, vocabulary], or None: then those
    of the first runtime count. Raises VerificationError if `llmsqueeze.load` does not open the folder, or gives other
    logits.
    """
    wanted = [runtime for runtime in TRIED if not opens.get(runtime, "")]
    result = Opened()
    for runtime in progress.over(wanted, "open", len(wanted)):
        if why := too_large(folder, runtime):
            result.why_not[runtime] = why
            continue
        try:
            given, why = by_load(folder, sample) if runtime == NATIVE else by_transformers(folder, sample)
        except OSError as error:  # no other process, no disk: the result is as good without
            given, why = None, f"opening it here failed: {first_line(error)}"
        if given is not None:
            logits = given if logits is None else logits
            why = compared(given[:, : logits.shape[1]], logits)
        if not why:
            result.runtimes.append(runtime)
        elif runtime == NATIVE and given is not None:
            raise VerificationError(f"opened by llmsqueeze.load, the folder gives other logits: {why}")
        else:
            result.why_not[runtime] = why
    return result


def too_large(folder: Folder, runtime: str) -> str:
    """Why the folder is not opened here, if it takes too much memory; "" if it does not, or if nobody knows."""
    free, needed = free_memory(), memory_needed(folder, runtime)
    if free is None or needed <= (1 - SPARE) * free:
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


def by_transformers(folder: Folder, sample: Tensor) -> tuple[Tensor | None, str]:
    """The same of stock transformers in a process of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "sample.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": sample.cpu()}, given)
        task = {
            "folder": str(folder.path.resolve()),
            "auto": folder.auto_class,
            "trust": folder.trust_remote_code,
            "sample": str(given),
            "out": str(out),
        }
        command = [sys.executable, "-I", "-c", OPEN_STOCK, json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return None, f"opening it here failed: {lines[-1] if lines else f'code {done.returncode}'}"
        return load_file(out)["logits"], ""


def compared(given: Tensor, logits: Tensor) -> str:
    """By how much logits differ, if it is too much; "" if they do not."""
    if given.shape != logits.shape:
        return f"they are {list(given.shape)}, not {list(logits.shape)}"
    relative = float((given - logits).abs().max() / logits.abs().max().clamp(min=1e-30))
    return "" if relative <= TOLERANCE else f"they differ by {relative:.2g} of the largest"
