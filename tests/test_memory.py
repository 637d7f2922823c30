"""The peak memory of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import torch

from llmsqueeze.memory import peak_memory_mb


def test_a_process_does_not_count_the_memory_of_its_caller() -> None:
    """A forecast of memory comes from a child of `plan`, which needs more."""
    held = torch.ones(50_000_000)
    code = "from llmsqueeze.memory import peak_memory_mb; print(peak_memory_mb())"
    child = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak_memory_mb() > held.nbytes / 1e6
    assert 1 < child < 100
