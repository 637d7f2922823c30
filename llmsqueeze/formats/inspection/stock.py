"""Stock transformers in a process of their own, which has no llmsqueeze.

Such a process takes seconds to import them, so it can start while this one does other work, and waits for its task.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsqueeze.formats.opened import Folder

# what the entry in sys.modules does: an import of llmsqueeze fails
OPEN_STOCK = """
import json, sys
sys.modules["llmsqueeze"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
task = json.loads(sys.stdin.readline() or "null")
if task is None:
    sys.exit()
auto = getattr(transformers, task["auto"])
model = auto.from_pretrained(task["folder"], dtype=torch.float32, trust_remote_code=task["trust"]).eval()
tokens = load_file(task["sample"])["tokens"]
with torch.no_grad():
    logits = model(input_ids=tokens, use_cache=False).logits
save_file({"logits": logits.float().contiguous()}, task["out"])
"""


@dataclass(frozen=True)
class Stock:
    """The process, and a folder of its own, in which it runs."""

    process: subprocess.Popen[str]
    scratch: Path


@contextmanager
def waiting() -> Iterator[Stock]:
    """In the context a process imports stock transformers and waits for a task. Raises OSError if none starts."""
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", OPEN_STOCK],
            text=True,
            cwd=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with process:
            try:
                yield Stock(process, Path(scratch))
            finally:
                process.kill()


def by_transformers(folder: Folder, sample: Tensor, stock: Stock | None = None) -> tuple[Tensor | None, str]:
    """The logits [1, length, vocabulary] of the model that stock transformers open, or why there are none. sample:
    tokens [1, length]; stock: the process, if one is waiting. Raises OSError if none starts."""
    if stock is None:
        with waiting() as stock:
            return by_transformers(folder, sample, stock)
    given, out = stock.scratch / "sample.safetensors", stock.scratch / "logits.safetensors"
    save_file({"tokens": sample.cpu()}, given)
    task = {
        "folder": str(folder.path.resolve()),
        "auto": folder.auto_class,
        "trust": folder.trust_remote_code,
        "sample": str(given),
        "out": str(out),
    }
    _, errors = stock.process.communicate(json.dumps(task) + "\n")
    if stock.process.returncode:
        lines = errors.strip().splitlines()
        return None, f"opening it here failed: {lines[-1] if lines else f'code {stock.process.returncode}'}"
    return load_file(out)["logits"], ""
