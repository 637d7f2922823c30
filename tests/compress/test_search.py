"""A search under a bound: the smallest size within it, sizes that are not possible, and what is opened how often."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TEXT

from llmsqueeze.compress import search
from llmsqueeze.compress.job import Job
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.compress.search import WIDTH, Round, bisect, split
from llmsqueeze.errors import BudgetError
from llmsqueeze.model import calibration, original
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import Source

FAST: dict[str, Any] = {**TEXT, "method": "budget", "quantizer": "rtn", "widths": [2, 3, 4]}


@pytest.fixture(scope="module")
def demo(demo_of: Callable[[int], Path]) -> Source:
    return Source(str(demo_of(1)))


@pytest.mark.parametrize("bound", [0.3, 0.02, 0.0011])
@pytest.mark.parametrize("off", [0.4, 1.0, 3.0])
def test_the_search_finds_the_smallest_size_within_a_bound(bound: float, off: float) -> None:
    """Measured losses that are `off` times the predicted ones."""
    points = [(1 + i / 20, 2.0 ** (-2 * i / 20)) for i in range(120)]

    def try_size(bits: float) -> Round:
        predicted = 2.0 ** (-2 * (bits - 1))
        measured = off * predicted
        return Round(bits, predicted, measured, measured, measured, measured, measured <= bound)

    rounds = bisect(try_size, points, bound)
    smallest = min(one.bits for one in rounds if one.kept)
    exact = 1 + torch.tensor(off / bound).log2().item() / 2
    assert exact - 1e-6 <= smallest <= exact + WIDTH
    assert len(rounds) <= 8


@pytest.mark.parametrize(("bound", "kept"), [(10.0, [True]), (1e-9, [False])])
def test_the_search_ends_where_no_other_size_is(bound: float, kept: list[bool]) -> None:
    points = [(2.0, 1.0), (3.0, 0.1), (4.0, 0.01)]

    def try_size(bits: float) -> Round:
        measured = 10.0 ** (2 - bits)
        return Round(bits, measured, measured, measured, measured, measured, measured <= bound)

    assert [one.kept for one in bisect(try_size, points, bound)] == kept


def test_sizes_that_cannot_be_had_bound_the_search_from_below() -> None:
    points = [(1 + i / 20, 2.0 ** (-2 * i / 20)) for i in range(120)]

    def try_size(bits: float) -> Round:
        if bits < 2.4:
            return Round(bits, 0.0, 0.0, 0.0, 0.0, math.inf, False)
        measured = 2.0 ** (-2 * (bits - 1))
        return Round(bits, measured, measured, measured, measured, measured, measured <= 0.9)

    rounds = bisect(try_size, points, 0.9)
    assert 2.4 <= min(one.bits for one in rounds if one.kept) <= 2.4 + WIDTH


@pytest.mark.parametrize("smallest", range(12))
def test_the_split_between_two_widths_is_found_by_bisection(smallest: int) -> None:
    """The least size within the bound; the largest is tried before none is said to be."""
    sizes = [2 + i / 5 for i in range(11)]

    def try_size(bits: float) -> Round:
        return Round(bits, 0.0, 0.0, 0.0, 0.0, 0.0, bits >= 2 + smallest / 5)

    rounds = split(try_size, sizes)
    kept = [one.bits for one in rounds if one.kept]
    assert min(kept, default=None) == (sizes[smallest] if smallest < 11 else None)
    assert len(rounds) <= 4
    assert len({one.bits for one in rounds}) == len(rounds), "no size twice"
    assert smallest < 11 or max(one.bits for one in rounds) == sizes[-1]


def test_blocks_on_two_widths_within_a_bound(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """By what their weights cost: between all on the low width, which is beyond the bound, and all on the high one."""
    settings = {**TEXT, "method": "layerwise", "importance": "cost", "quantizer": "rtn", "max_ppl_increase": 0.02}
    summary = quantize(Source(str(demo_of(2))), settings, tmp_path / "out", verify=False)
    assert summary["perplexity_increase"] <= 0.02
    beyond = [one["bits"] for one in summary["rounds"] if not one["kept"]]
    assert beyond, summary["rounds"]
    assert max(beyond) < summary["bits_per_weight"]
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in widths.values()} == {2, 4}


def test_a_size_that_is_not_possible_ends_no_search(
    demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, asked = search.compress, []

    def some(job: Job, *args: Any, **named: Any) -> Any:
        asked.append(job.recipe.bits)
        if len(asked) == 1:
            raise BudgetError("leaves 35 bytes")
        return compress(job, *args, **named)

    monkeypatch.setattr(search, "WIDTH", 9.0)
    monkeypatch.setattr(search, "compress", some)
    options = {**FAST, "max_kl": 5.0}
    summary = quantize(demo, options, tmp_path / "out", verify=False)
    assert len(summary["rounds"]) == 1
    assert summary["rounds"][0]["bits"] > asked[0]

    def none(*_args: Any, **_named: Any) -> Any:
        raise BudgetError("leaves 35 bytes")

    monkeypatch.setattr(search, "compress", none)
    with pytest.raises(BudgetError, match="leaves 35 bytes"):
        quantize(demo, options, tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def counting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Calls of a module's function, one entry each."""
    calls: list[str] = []
    function = getattr(module, name)

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*args, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_the_smallest_result_within_a_bound_is_measured(
    demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And over all rounds the model is laid out once, and generates its text once."""
    monkeypatch.setattr(search, "WIDTH", 0.6)
    opened = counting(monkeypatch, original, "build_skeleton")
    sampled = counting(monkeypatch, calibration, "sample_rows")
    settings = {**FAST, "widths": [1, 2, 3, 4], "calibration": "self", "samples": 4, "max_kl": 0.08}
    summary = quantize(demo, settings, tmp_path / "out", verify=False)
    assert len(summary["rounds"]) > 1
    assert (len(opened), len(sampled)) == (1, 1)
    assert summary["kl_mean"] <= 0.08
    beyond = [one for one in summary["rounds"] if not one["kept"]]
    assert beyond, "a smaller one was tried"
    assert max(one["bits"] for one in beyond) < summary["bits_per_weight"]
    assert open_checkpoint(tmp_path / "out").nbytes == summary["nbytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
