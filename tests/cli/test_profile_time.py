"""`--profile-time`: the stages in the JSON, the table, the record and the report; nothing of it without the option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import FAST, command

import llmsqueeze
from llmsqueeze.cli.tables.plans import print_plan
from llmsqueeze.progress import stopwatch
from llmsqueeze.progress.stopwatch import STAGES

OPTIONS = ["--calibration", "demo", *FAST]
EVERY_RUN = {"start", "read", "forward", "moments", "factorise", "round", "pack", "write", "verify", "other"}


def wall(times: dict[str, Any], *without: str) -> float:
    return sum(one["seconds"] for stage, one in times.items() if stage not in without)


@pytest.fixture(scope="module")
def profiled(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder whose run was timed, and the JSON of the run."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    code, stdout, stderr = command(
        "quantize", demo_of(2), "--bits", 3, *OPTIONS, "--out", out, "--profile-time", "--json"
    )
    assert code == 0, stderr
    return out, json.loads(stdout)


def test_quantize_prints_the_stages_as_json(profiled: tuple[Path, dict[str, Any]]) -> None:
    """The sum of those of the run is the run's time."""
    times = profiled[1]["time"]
    assert set(times) == EVERY_RUN | {"compensate"}  # in the JSON of descent, which corrects for drift
    assert set(times) <= set(STAGES)
    assert all(set(one) == {"seconds", "processor_seconds"} for one in times.values())
    assert wall(times, "start") == pytest.approx(profiled[1]["seconds"], abs=0.05)
    assert stopwatch.measured() is None


def test_the_record_has_them_and_the_report_shows_them(profiled: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = profiled
    recorded = json.loads((folder / "llmsqueeze.json").read_text())["time"]
    assert recorded.keys() == summary["time"].keys()
    assert recorded["round"] == summary["time"]["round"]
    assert command("report", folder, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Where the time went" in page
    assert f'data-label="Seconds">{recorded["round"]["seconds"]:.2f}</td>' in page
    assert command("check", folder)[0] == 0


def test_without_the_option_nothing_is_kept(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    folder = compressed("portable")
    assert "time" not in json.loads((folder / "llmsqueeze.json").read_text())
    assert command("report", folder, "--out", tmp_path / "page.html")[0] == 0
    assert "Where the time went" not in (tmp_path / "page.html").read_text()


@pytest.mark.thorough
def test_a_plan_shows_its_own_time_and_the_forecast(
    demo_of: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", demo_of(2), "--bits", 3.5, "--widths", "3,4", *OPTIONS, "--out", tmp_path, "--profile-time"]
    code, stdout, stderr = command(*arguments, "--json")
    assert code == 0, stderr
    result = json.loads(stdout)
    print_plan(result)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    assert "time of this plan" in shown
    assert "predicted time" in shown
    assert {"start", "read", "trial", "other"} <= set(result["time"])
    assert set(result["predicted_time"]) >= EVERY_RUN
    assert "trial" not in result["predicted_time"]
    assert wall(result["predicted_time"]) == pytest.approx(result["predicted_seconds"], abs=0.01)


def test_the_functions_of_the_package_measure_too(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """They start nobody's process, so there is no time before the run."""
    summary = llmsqueeze.quantize(demo_of(1), tmp_path / "out", method="rtn", bits=4, profile_time=True)
    assert {"round", "write", "verify", "other"} <= set(summary["time"])
    assert "start" not in summary["time"]
    planned = llmsqueeze.plan(demo_of(1), tmp_path / "plan", bits=3.5, weights=False)
    assert (planned["time"], planned["predicted_time"]) == (None, None)
