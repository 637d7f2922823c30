"""Portable by default: which recipes compressed-tensors can represent, why others are native, and what that costs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TEXT, command

from llmsqueeze import parts
from llmsqueeze.allocation.options import request_of
from llmsqueeze.allocation.plan import Rows, why_native
from llmsqueeze.compress.decision.decide import Decision, decide
from llmsqueeze.compress.decision.target import target_nbytes
from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import Source
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe


@pytest.fixture
def planned(demo_of: Callable[[int], Path]) -> Callable[..., tuple[Job, Recipe]]:
    """settings -> the plan of a one-block model (7 linears), and the recipe."""

    def plan(settings: dict[str, Any], model: Path | None = None) -> tuple[Job, Recipe]:
        recipe = make_recipe(settings)
        return open_job(Source(str(model or demo_of(1))), recipe, Progress(), text=False), recipe

    return plan


Planned = Callable[..., tuple[Job, Recipe]]
AUTO = {"method": "budget", "bits": 3.5, "granularity": "group", "levels": "integer"}
PORTABLE: list[dict[str, Any]] = [
    {},
    {"method": "rtn", "bits": 8},
    {"method": "gptq", "bits": 2, "group_size": -1},
    {"group_size": 32},
    {"group_size": 1000},  # which is whole rows here
    {"method": "layerwise", "bits": 3.2},
    {"skip": ["down_proj"]},
    AUTO,
    {**AUTO, "group_sizes": [32, 64, -1]},
    {"method": "budget", "size": "150kB", "portable": True},
]
NATIVE_BECAUSE = [
    ({"method": "gwq"}, "method gwq: no other runtime opens outliers"),
    ({**AUTO, "outliers": 0.01}, "outliers: no other runtime opens outliers"),
    ({**AUTO, "row_outliers": [0.01]}, "outliers: no other runtime opens outliers"),
    ({"method": "dbllm"}, ": no other runtime opens two planes"),
    ({**AUTO, "dual": True}, "dual: no other runtime opens two planes"),
    ({"method": "mixllm"}, "--method mixllm: runtimes need one width per fusion group"),
    ({"bits": 2.5, "granularity": "row"}, "--per-row: runtimes need one width per fusion group"),
    ({**AUTO, "granularity": "linear"}, "--per-linear: runtimes need one width per fusion group"),
    ({"lorc_rank": 4}, "--lorc-rank 4: the low-rank factors need an adapter beside the model"),
    ({**AUTO, "lorc_rank": "auto"}, "--lorc-rank auto: the low-rank factors need an adapter beside the model"),
    ({"levels": "half"}, "levels half: compressed-tensors has integer levels"),
    ({**AUTO, "levels": "by-width"}, "levels by-width: compressed-tensors has integer levels"),
    ({"symmetric": False}, "asymmetric: transformers does not open zeros"),
    ({"method": "layerwise", "low_bits": 1}, "compressed-tensors has 2 to 8"),
    (
        {"method": "descent", "group_size": 100},
        "group size 100: it does not divide the 128 columns of ",
    ),
    (
        {"method": "descent", "group_size": 256},
        "group size 256: it does not divide the 384 columns of ",
    ),
    ({**AUTO, "group_sizes": [64, 96]}, "group size 96: it does not divide the 128 columns"),
]


@pytest.mark.parametrize("settings", PORTABLE, ids=str)
def test_a_plan_that_compressed_tensors_can_represent_is_portable(settings: dict[str, Any], planned: Planned) -> None:
    job, recipe = planned(settings)
    assert job.plan.portable
    assert why_native(recipe, job.skeleton, job.plan.weights) is None
    entries = [(weight.shape, weight.specs) for weight in job.plan.weights.values()]
    assert not any(compressed_tensors.lost(*entry) for entry in entries)
    native, recipe = planned({**settings, "portable": False})
    assert not native.plan.portable
    bare = list(native.plan.weights.values())
    assert job.plan.nbytes == sum(parts.layout_nbytes(w.shape, w.specs) for w in bare) + 16 * len(bare)
    assert native.plan.nbytes == job.plan.nbytes - 16 * len(bare)


@pytest.mark.parametrize(("settings", "why"), NATIVE_BECAUSE, ids=[f"{s}" for s, _ in NATIVE_BECAUSE])
def test_any_other_plan_is_native_and_says_why(settings: dict[str, Any], why: str, planned: Planned) -> None:
    job, recipe = planned(settings)
    assert not job.plan.portable
    assert why in str(why_native(recipe, job.skeleton, job.plan.weights))
    with pytest.raises(RecipeError, match=f"portable contradicts .*{re.escape(why)}"):
        planned({**settings, "portable": True})


def test_a_budget_alone_buys_rows_natively(planned: Planned) -> None:
    """Portable, the same budget goes by groups."""
    for settings, why in (({"bits": 2.5, "widths": "2,3"}, "--per-row: "), ({"size": "150kB"}, "--method coded: ")):
        job, recipe = planned(settings)
        assert not job.plan.portable
        assert str(why_native(recipe, job.skeleton, job.plan.weights)).startswith(why)
        assert planned({**settings, "portable": True})[0].plan.portable


def test_transposed_weights_are_native(random_model: Callable[..., Path], planned: Planned) -> None:
    job, recipe = planned({"method": "rtn", "bits": 4, "group_size": 16}, random_model("gpt2"))
    assert not job.plan.portable
    assert "c_attn: a weight that is stored transposed" in str(why_native(recipe, job.skeleton, job.plan.weights))


def test_the_command_says_the_format_and_why(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    def quantized(name: str, *options: object) -> dict[str, Any]:
        arguments = ["quantize", demo_of(1), "--method", "rtn", "--bits", "4", "--out", tmp_path / name, "--json", "-q"]
        code, stdout, stderr = command(*arguments, *options)
        assert code == 0, stderr
        summary: dict[str, Any] = json.loads(stdout)
        return summary

    portable, native = quantized("a"), quantized("b", "--native")
    uneven = quantized("c", "--group-size", 100)
    assert [one["format"] for one in (portable, native, uneven)] == ["compressed-tensors", "llmsqueeze", "llmsqueeze"]
    assert portable["why_native"] is None
    assert native["why_native"] == "--native"
    assert uneven["why_native"].startswith("group size 100: it does not divide the 128 columns")
    assert all(one["predicted_portable"] is None for one in (portable, native, uneven))
    assert portable["nbytes"] == native["nbytes"] + 16 * 7
    assert portable["opens"] == {"native": "", "transformers": "", "vllm": ""}
    assert native["opens"]["native"] == ""
    assert native["opens"]["transformers"]
    records = [json.loads((tmp_path / name / "llmsqueeze.json").read_text())["format"] for name in "abc"]
    assert records == [one["format"] for one in (portable, native, uneven)]


def test_a_budget_has_room_for_the_shapes(planned: Planned, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """Two bits everywhere and not a byte more is native; portable it needs 16 bytes for each of the 7 linears."""
    settings = {**AUTO, "bits": None, "widths": [2, 3]}
    native, _ = planned({**settings, "size": "500kB", "portable": False})
    grid = Grid(2, 128, symmetric=True)
    narrow = native.plan.on({name: (Rows(grid, w.shape[0]),) for name, w in native.plan.weights.items()})
    least = native.kept_nbytes + narrow.nbytes

    def target(size: int, portable: bool) -> int | None:
        job, recipe = planned({**settings, "size": size, "portable": portable})
        return target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)

    assert target(least, False) == narrow.nbytes
    assert target(least + 16 * 7, True) == narrow.nbytes + 16 * 7
    with pytest.raises(RecipeError, match=f"size {least + 16 * 7 - 1} bytes is too small"):
        target(least + 16 * 7 - 1, True)
    with pytest.raises(RecipeError, match=f"size {least - 1} bytes is too small"):
        target(least - 1, False)
    recipe = make_recipe({"method": "budget", "size": least + 4000, "portable": True, "quantizer": "rtn", **TEXT})
    summary = quantize(str(demo_of(1)), recipe, tmp_path / "out")
    on_disk = open_checkpoint(tmp_path / "out").nbytes
    assert least - 1000 < summary.nbytes == on_disk <= least + 4000


def test_the_predicted_cost_of_a_portable_result_is_its_cost(planned: Planned, demo_of: Callable[[int], Path]) -> None:
    """With the same bytes and fewer choices the loss increase is no smaller; one profile serves both."""
    settings = {"method": "budget", "bits": 2.6, "quantizer": "rtn"}
    text = make_recipe({**settings, **TEXT})
    free, recipe = planned(settings)
    free = replace(free, calibration=open_job(Source(str(demo_of(1))), text, Progress()).calibration)
    assert free.calibration is not None
    with Spill() as spill:
        walk = Walk(free.skeleton, free.calibration.rows, spill, torch.float32, torch.device("cpu"))
        profile = measure(walk, walk.embed(), free.plan.dtypes, request_of(recipe), Progress())

    def decided(settings: dict[str, Any]) -> Decision:
        job, recipe = planned(settings)
        target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
        decision = decide(job.plan, profile, recipe, job.skeleton.linears, target)
        assert target is not None
        assert 0.9 * target < decision.plan.nbytes <= target
        return decision

    native, portable = decided(settings), decided({**settings, "portable": True})
    assert not native.plan.portable
    assert portable.plan.portable
    assert portable.predicted_portable is native.predicted_native is None
    assert portable.predicted is not None
    assert portable.predicted_native is not None
    assert 0 < portable.predicted_native <= portable.predicted
    by_rows = decided({**settings, "portable": False, "granularity": "row", "levels": "integer"})
    assert portable.predicted_native == pytest.approx(by_rows.predicted, rel=1e-9)
    assert native.predicted is not None
    assert native.predicted_portable is not None
    assert native.predicted_portable >= native.predicted > 0
    assert native.predicted_portable == pytest.approx(portable.predicted, rel=1e-9)
    assert decided({**settings, "importance": "uniform"}).predicted_portable is None, "nothing was measured for it"


def test_a_uniform_budget_is_native(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """Its rows are on two widths, which compressed-tensors cannot represent."""
    settings = {"method": "budget", "bits": 3.5, "importance": "uniform", "quantizer": "rtn"}
    assert quantize(str(demo_of(1)), make_recipe(settings), tmp_path / "out").format == "llmsqueeze"
    with pytest.raises(RecipeError, match="portable contradicts"):
        make_recipe({**settings, "portable": True})
