"""The forecast of a run's time from given stages: blocks that are alike, that differ, that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmsqueeze.allocation.plan import base_plan
from llmsqueeze.compress.forecast.needs import (
    Tried,
    added,
    between,
    block_work,
    forecast,
    seconds,
    with_opening,
    work_of,
)
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.recipe.resolve import make_recipe


def times(**stages: float) -> dict[str, dict[str, float]]:
    """Stages that take so many seconds, and half of that of the processor."""
    return {stage: {"seconds": taken, "processor_seconds": taken / 2} for stage, taken in stages.items()}


def wall(stages: dict[str, dict[str, float]]) -> dict[str, float]:
    return {stage: one["seconds"] for stage, one in stages.items()}


def test_blocks_that_are_alike_take_as_long_as_the_second() -> None:
    tried = Tried(times(start=5, read=1), [times(read=2, round=40), times(read=3, round=30)])
    work = [block_work([(64, 32)], [(64, 32)])] * 30
    foretold = forecast(tried, work)
    assert wall(foretold) == {"start": 5, "read": 1 + 2 + 29 * 3, "round": 40 + 29 * 30}
    assert seconds(foretold) == 5 + 90 + 910
    assert seconds(foretold, "processor_seconds") == (5 + 90 + 910) / 2


def test_the_opening_of_the_result_is_in_its_verification() -> None:
    """By `load` it takes what the verification took, by stock transformers a start of Python beside."""
    before = times(start=8, round=30, verify=2)
    assert wall(with_opening(before, stock=False)) == {"start": 8, "round": 30, "verify": 4}
    assert wall(with_opening(before, stock=True)) == {"start": 8, "round": 30, "verify": 8 - 4 + 2 + 2 + 2}
    assert seconds(with_opening(before, stock=True), "processor_seconds") == (8 + 30 + 14) / 2


def test_each_stage_grows_with_its_own_work() -> None:
    """The third block has twice the rows, the fourth twice the columns."""
    shapes = [[(64, 32)], [(64, 32)], [(128, 32)], [(64, 64)]]
    one = times(read=1, forward=1, moments=1, factorise=1, round=1, compensate=1, pack=1, write=1, verify=1, other=1)
    foretold = forecast(Tried({}, [one, one]), [block_work(block, block) for block in shapes])
    linear = dict.fromkeys(("read", "forward", "round", "pack", "write", "verify"), 2 + 2 + 2.0)
    assert wall(foretold) == {
        **linear,
        "moments": 2 + 1 + 4,
        "factorise": 2 + 1 + 8,
        "compensate": 2 + 2 + 4,
        "other": 4,
    }


def test_linears_that_stay_are_run_and_not_rounded() -> None:
    work = [block_work([(8, 8), (8, 8)], planned) for planned in ([(8, 8), (8, 8)], [(8, 8)], [], [(8, 8), (8, 8)])]
    tried = Tried({}, [times(forward=2, round=10), times(forward=2, round=5)])
    assert wall(forecast(tried, work)) == {"forward": 8, "round": 10 + 5 + 0 + 10}


def test_a_tried_block_without_work_is_no_measure() -> None:
    """If all of the second block is skipped, the others are like the first."""
    whole, none = block_work([(8, 8)], [(8, 8)]), block_work([(8, 8)], [])
    tried = Tried({}, [times(forward=1, round=10), times(forward=1, round=0)])
    assert wall(forecast(tried, [whole, none, whole, none])) == {"forward": 4, "round": 20}
    assert wall(forecast(tried, [none, none, whole])) == {"forward": 3, "round": 10}  # nobody knows


def test_a_model_of_one_block() -> None:
    tried = Tried(times(start=5), [times(round=7)])
    assert wall(forecast(tried, [block_work([(8, 8)], [(8, 8)])])) == {"start": 5, "round": 7}


def test_times_are_added_and_subtracted_by_stage() -> None:
    earlier, later = times(read=1), times(read=4, round=2)
    assert between(earlier, later) == times(read=3, round=2)
    assert added([earlier, between(earlier, later)]) == later
    assert between({}, later) == later


@pytest.mark.parametrize("skip", [[], ["*.layers.1.*"]])
def test_the_work_of_a_models_blocks(skip: list[str], random_model: Callable[..., Path]) -> None:
    skeleton = build_skeleton(open_checkpoint(random_model("llama")))
    plan = base_plan(skeleton, make_recipe({"method": "gptq", "bits": 4, "group_size": 32, "skip": skip}))
    first, second, third = work_of(skeleton, plan)
    assert first == third
    assert first["forward"] == second["forward"] == 64 * 64 * 3 + 96 * 64 * 3
    assert second["round"] == (0 if skip else first["round"])
    assert first["factorise"] == 6 * 64**3 + 96**3
