"""Memory and disk that cannot suffice are noticed before any work; `--force` tries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import command, refused

from llmsqueeze.compress.forecast import needs, room
from llmsqueeze.compress.job import open_job
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe


def test_the_least_memory_is_that_of_a_block_and_its_moments(demo_of: Callable[[int], Path]) -> None:
    """The demo: width 128, 344 columns at most in a linear, 197 632 weights in a block."""
    job = open_job(Source(str(demo_of(2))), make_recipe({"method": "gptq", "bits": 3}), Progress(), text=False)
    weights = [job.skeleton.shape(name) for name in job.skeleton.linears[0]]
    widest = max(cols for _, cols in weights)
    expected = 8 * sum(rows * cols for rows, cols in weights) + 12 * widest**2
    assert room.least_memory(job) == room.LIBRARIES + expected
    without = open_job(Source(str(demo_of(2))), make_recipe({"method": "rtn", "bits": 3}), Progress(), text=False)
    assert room.least_memory(without) == room.LIBRARIES + expected - 12 * widest**2


def test_too_little_memory_is_refused(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.memory, "free_memory", lambda: 100_000_000)
    run = ["quantize", demo_of(2), "--method", "rtn", "--device", "cpu", "--out", tmp_path / "out"]
    assert "needs at least 0.3 GB of memory on cpu, and 0.1 GB are free" in refused(*run)
    assert list(tmp_path.iterdir()) == []
    assert command(*run, "--force", "--quiet")[0] == 0


def test_too_small_a_disk_is_refused(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    run = ["quantize", demo_of(2), "--method", "rtn", "--device", "cpu", "--out", tmp_path / "out"]
    assert "GB are free on that disk" in refused(*run)
    assert list(tmp_path.iterdir()) == []
    assert command(*run, "--force", "--quiet")[0] == 0


def test_processes_share_the_stages_that_have_samples_or_rows() -> None:
    times = {stage: {"seconds": 8.0, "processor_seconds": 4.0} for stage in ("forward", "round", "verify")}
    shared = needs.shared(times, 4)
    assert [one["seconds"] for one in shared.values()] == [2.0, 2.0, 8.0]
    assert needs.shared(times, 1) == times
