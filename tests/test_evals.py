"""The scripts in evals/ import, and the names that they patch exist; how speed.py takes turns, measures and judges."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import sys
from argparse import Namespace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from llmsqueeze.allocation.prediction import likely
from llmsqueeze.recipe.resolve import make_recipe

EVALS = Path(__file__).parents[1] / "evals"


@pytest.mark.parametrize("script", sorted(path.name for path in EVALS.glob("*.py")))
def test_the_script_imports(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    spec = spec_from_file_location(f"evals_{script.removesuffix('.py')}", EVALS / script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    text = (EVALS / script).read_text()
    assert callable(module.main) if "__main__" in text else module.__doc__
    patched = re.findall(r"""mock\.patch\(\s*"([\w.]+)\"""", text)
    assert all(pkgutil.resolve_name(name) is not None for name in patched)


def test_the_recipes_of_the_scripts_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    methods, coded, matrix, below_three, allocation, two_bits, self_calibration = map(
        import_module, ("methods", "coded", "matrix", "below_three", "allocation", "two_bits", "self_calibration")
    )
    text = Namespace(calibration="demo", samples=2, window=32)
    rows = [{"bits": 3, **settings} for settings in methods.ROWS.values()]
    rows += [{"method": "descent", "bits": 2, **settings} for settings in two_bits.GRIDS.values()]
    rows += [{"bits": coded.SIZES.get(name, (2.5,))[0], **settings} for name, settings in coded.ROWS.items()]
    rows += [settings for table in allocation.TABLES.values() for settings in table([2.5, 4.5]).values()]
    rows += [settings for bits in (2.25, 2.5, 3.25) for settings, _ in below_three.rows(bits).values()]
    rows += self_calibration.ROWS.values()
    for settings in rows:
        assert methods.recipe_of(settings, text).method == settings["method"]
    for settings in (*matrix.RECIPES.values(), *matrix.REAL_RECIPES.values()):
        assert make_recipe(settings).method == settings["method"]


def test_the_choices_resolve_and_what_they_replace_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    choices, methods = import_module("choices"), import_module("methods")
    text = Namespace(calibration="demo", samples=2, window=32)
    for settings, replacements in choices.ROWS.values():
        assert methods.recipe_of(settings, text).method == settings["method"]
        for name, value in replacements:
            assert callable(value) == callable(pkgutil.resolve_name(name)), name


def test_nine_of_ten_measured_losses_lie_in_the_interval_of_their_promise() -> None:
    """What `quantize` prints beside a promise holds for the rows on record."""
    rows = [row for file in (EVALS / "results").glob("real-*.json") for row in json.loads(file.read_text())]
    promised = [row for row in rows if row.get("predicted")]
    assert len({row["model"] for row in promised}) >= 4
    within = [least <= row["nll_difference"] <= most for row in promised for least, most in [likely(row["predicted"])]]
    assert sum(within) >= 0.9 * len(within)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """evals/speed.py with contenders a and b, one core each, that say which turn and core they had."""
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    module = import_module("speed")
    turns = iter(range(100))

    def at_once(_: Namespace, runs: list[Any]) -> list[dict[str, Any]]:
        return [
            {"wall": 1.0, "user": 1.0, "kernel": 0.0, "peak_mb": 9.0, "turn": next(turns), "core": core}
            for core, _ in enumerate(runs)
        ]

    monkeypatch.setattr(module, "at_once", at_once)
    monkeypatch.setattr(module, "warm_up", lambda *_: None)
    monkeypatch.setattr(module, "machine", lambda *_: {"processor": "any", "cores": 2, "units": []})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    rows = {"descent": lambda _: {name: module.Run([name], None, 1) for name in ("tree", "before")}}
    monkeypatch.setattr(module, "ROWS", rows)
    return module


def timed(speed: Any, tmp_path: Path, *options: str) -> dict[str, Any]:
    files = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "speed.json")]
    speed.main(["model", "text.txt", "text.txt", "--rows", "descent", *files, *options])
    kept: dict[str, Any] = json.loads((tmp_path / "speed.json").read_text())
    return kept["rows"]["descent"]


def test_contenders_take_turns_and_a_later_call_goes_on(speed: Any, tmp_path: Path) -> None:
    timed(speed, tmp_path, "--repeats", "1")
    runs = timed(speed, tmp_path, "--repeats", "3")
    assert [run["turn"] for run in runs["tree"]] == [0, 3, 4]
    assert [run["turn"] for run in runs["before"]] == [1, 2, 5]
    with pytest.raises(SystemExit, match="--fresh"):
        timed(speed, tmp_path, "--samples", "7")
    assert len(timed(speed, tmp_path, "--samples", "7", "--fresh", "--repeats", "1")["tree"]) == 1


def test_contenders_at_the_same_time_swap_their_cores(speed: Any, tmp_path: Path) -> None:
    runs = timed(speed, tmp_path, "--repeats", "2", "--side-by-side")
    assert [run["core"] for run in runs["tree"]] == [0, 1]
    assert [run["core"] for run in runs["before"]] == [1, 0]


def test_a_process_is_pinned_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    processes = import_module("speed_processes")
    core = max(os.sched_getaffinity(0))
    code = """
import json, os
memory = b"1" * 300_000_000
print("words")
print(json.dumps({"seconds": len(os.sched_getaffinity(0))}))
"""
    run = processes.measured([sys.executable, "-c", code], {}, tmp_path, [core])
    assert run["seconds"] == run["cores"] == 1
    assert run["peak_mb"] > 300
    with pytest.raises(SystemExit, match="no such thing"):
        processes.measured([sys.executable, "-c", "raise ValueError('no such thing')"], {}, tmp_path, [core])


def test_the_table_says_what_is_met_and_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EVALS), *sys.path])
    table = import_module("speed_table")

    def runs(*walls: float, kernel: float = 1.0, beside: bool = False) -> list[dict[str, float]]:
        each = {"kernel": kernel, "peak_mb": 100.0, "side_by_side": beside}
        return [{"wall": wall, "user": wall - kernel, **each} for wall in walls]

    rows = {
        "descent": {"tree": runs(30, 90, 33), "before": runs(99, 100, 101)},
        "eval": {"tree": runs(30, 30, 30, kernel=5, beside=True), "before": runs(100, 100, 100, beside=True)},
        "gptq": {"tree": runs(10, 10, 10)},
        "threads": {"tree": runs(32), "two threads": runs(20)},
    }
    names = ("samples", "seq_len", "windows", "threads", "isa", "model", "calibration", "text")
    results = {"settings": dict.fromkeys(names), "machine": {"processor": "", "cores": 2, "units": []}, "rows": rows}
    page = table.markdown(results | {"quality": {}, "left_out": {"plan": "no time"}}, [])
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| 33.0 | 100.0 | 0.33 | 33.0 | 100.0 | 0.33 | 0.33 | yes |" in lines["`quantize --bits 3` (descent)"]
    assert "| 0.30 | 0.2 | **no** |" in lines["`eval --baseline` of the descent folder"]
    assert "not measured: no run of peer" in lines["`quantize --method gptq --bits 3`"]
    assert "not measured: no time" in lines["`plan --method coded --bits 3.25`"]
    assert "| 0.200 | **no** |" in lines["eval, tree"]
    assert "| 0.031 | yes |" in lines["descent, tree"]
    assert "| 1.00 | yes |" in lines["descent against before"]
    assert "1.60 times as fast (at least 1.6: yes)" in page
    assert "The contenders took turns in descent, gptq. The contenders ran side by side in eval." in page

    wait = {"setting": "two threads", "load": "no load", "realtime": True, "load_average": 2.4}
    page = table.markdown({}, [wait | {"wall_ms": 8.0, "processor_ms": 15.96}])
    assert "| two threads | 8.0 / 16.0 |" in page
    assert "no load 2; the runs without load had real-time priority" in page
