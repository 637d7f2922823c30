"""A run that names no method and no size: as many bits as fit the memory at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import FAST, command

from llmsqueeze.allocation.plan import base_plan
from llmsqueeze.compress.decision.default import ROOM, chosen
from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe


@pytest.fixture(scope="module")
def job(demo_of: Callable[[int], Path]) -> Job:
    return open_job(Source(str(demo_of(2))), make_recipe({}), Progress(), text=False)


def test_the_most_bits_that_fit(job: Job) -> None:
    four, three = (job.kept_nbytes + base_plan(job.skeleton, make_recipe({"bits": width})).nbytes for width in (4, 3))

    def with_room(nbytes: float) -> dict[str, Any]:
        return chosen(job, {}, int(nbytes / ROOM) + 1)[0]

    assert with_room(four) == {"bits": 4}
    assert with_room(four - 8) == {"bits": 3}
    assert with_room(three) == {"bits": 3}
    smaller = with_room(three - 8)
    assert smaller["method"] == "coded"
    assert three - 16 < smaller["size"] < three
    assert with_room(job.kept_nbytes) == {"bits": 3}, "not even coded weights fit"
    assert chosen(job, {}, None)[0] == {"bits": 4}
    factors = job.asking(make_recipe({"lorc_rank": 4}))
    assert chosen(factors, {"lorc_rank": 4}, int(four / ROOM) + 1)[0] != {"bits": 4}, "factors count"
    groups = chosen(job, {"group_size": 64}, int(job.kept_nbytes / ROOM))
    assert groups[0] == {"bits": 3}
    assert "--method coded with --size goes lower" in groups[1]


def test_it_is_said_and_written(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = command("quantize", demo_of(1), "--calibration", "demo", *FAST, "--json")
    assert code == 0, stderr
    assert "no method and no size are named: descent with 4 bits" in " ".join(stderr.split())
    assert "--bits 3 takes fewer bytes" in " ".join(stderr.split())
    assert json.loads(stdout)["bits"] == 4
    assert (tmp_path / "demo-1-4bit").is_dir()
