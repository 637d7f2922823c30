"""A budget for a method whose result has a size of its own: one option bends to it, and nothing better fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import FAST, command, refused, tensors_of
from transformers import LlamaConfig, LlamaForCausalLM

from llmsqueeze.allocation.plan import base_plan
from llmsqueeze.compress.decision import bend
from llmsqueeze.compress.decision.target import asked_nbytes
from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe

BUDGETS: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 3.3},
    {"method": "rtn", "bits": 4.0},
    {"method": "rtn", "bits": 2.3, "portable": False, "symmetric": False},
    {"method": "dbllm", "bits": 3.1},
    {"method": "rtn", "bits": 3.4, "lorc_rank": "auto", "lorc": "plain"},
    {"method": "gwq", "bits": 2.6},
    {"method": "gwq", "bits": 3.6, "outlier_scope": "global"},
    {"method": "gwq", "size": 290_000},
    {"method": "gwq", "bits": 3.0, "lorc_rank": "auto"},
]


@pytest.fixture(scope="module")
def opened(demo_of: Callable[[int], Path]) -> Job:
    """The two-block model, with a recipe that does not matter."""
    return open_job(Source(str(demo_of(2))), make_recipe({"method": "rtn"}), Progress(), text=False)


def slow_twin(recipe: Recipe, job: Job) -> Recipe:
    """Every width and value, from the best on; the first that fits."""
    target = asked_nbytes(recipe, base_plan(job.skeleton, recipe), job.kept_nbytes, job.nbytes_original)
    shapes = {name: weight.shape for name, weight in job.plan.weights.items()}
    values = list(bend.values_of(recipe, shapes))
    if recipe.bends == "outliers":
        values = values[: len(values) // 5 : 10]  # a coarser grid is enough, and quick
    for width in bend.widths(recipe):
        for value in reversed(values):
            whole: dict[str, Any] = {"bits": width, "size": None, "group_size_open": False, recipe.bends: value}
            one = replace(recipe, **whole)
            if bend.most(one, job.skeleton).nbytes <= target:
                return one
    raise AssertionError("nothing fits")


@pytest.mark.parametrize("settings", BUDGETS, ids=str)
def test_the_best_that_fits(settings: dict[str, Any], opened: Job) -> None:
    recipe = make_recipe(settings)
    best, note = bend.bent(recipe, opened.skeleton, opened.kept_nbytes, opened.nbytes_original)
    expected = slow_twin(recipe, opened)
    if recipe.bends == "outliers":
        assert best.bits == expected.bits
        assert 0 <= best.outliers - expected.outliers < 10 / bend.SHARES, "the finest share at or above the coarse one"
    else:
        assert best == expected
    assert not best.bends
    assert f"codes of {best.bits} bits" in note


@pytest.mark.parametrize("settings", [BUDGETS[0], BUDGETS[3], BUDGETS[4], BUDGETS[6]], ids=str)
def test_the_result_has_the_bytes(settings: dict[str, Any], demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings | ({"quantizer": "rtn"} if settings["method"] == "gwq" else {})))
    text = FAST if settings["method"] == "gwq" else []
    code, stdout, stderr = command("quantize", demo_of(2), "--recipe", recipe, *text, "--out", tmp_path / "a", "--json")
    assert code == 0, stderr
    first = json.loads(stdout)
    assert 0.9 * settings["bits"] < first["bits_per_weight"] <= settings["bits"]
    assert f"--bits {settings['bits']}: codes of" in " ".join(stderr.split())
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(json.loads((tmp_path / "a" / "llmsqueeze.json").read_text())["recipe"]))
    code, _, stderr = command("quantize", demo_of(2), "--recipe", again, *text, "--out", tmp_path / "b", "--quiet")
    assert code == 0, stderr
    tensors = tensors_of(tmp_path / "b")
    assert all(tensor.equal(tensors[name]) for name, tensor in tensors_of(tmp_path / "a").items())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "gptq", "--bits", "3.3", "--group-size", "64"], "--group-size 64 contradicts --bits 3.3"),
        (["--method", "gwq", "--bits", "2.6", "--outliers", "0.02"], "--outliers 0.02 contradicts --bits 2.6"),
        (["--method", "gwq", "--bits", "2.0"], "--bits 2.0 is too small: with 2-bit codes everywhere"),
        (["--method", "gptq", "--size", "1kB"], "--size 1000 bytes is too small: with 2-bit codes everywhere"),
        (["--method", "rtn", "--lorc-rank", "auto"], "with --method rtn it needs --size or fractional --bits"),
        (["--method", "descent", "--lorc-rank", "auto", "--bits", "2.2"], "--bits 2.2 is too small: with 2-bit codes"),
        (["--method", "gwq", "--lorc-rank", "auto", "--bits", "2.4"], "--bits 2.4 is too small: with 2-bit codes"),
        (["--method", "dbllm", "--bits", "4"], "--bits 4 does not apply to --method dbllm"),
    ],
    ids=str,
)
def test_what_cannot_be(options: list[str], expected: str, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    assert expected in refused("quantize", demo_of(2), *options, *FAST, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "portable", "expected"),
    [
        ((64, 256), None, [-1, 128, 64, 32, 16, 8]),
        ((64, 172), None, [-1, 128, 96, 64, 48, 32, 24, 16, 8]),
        ((64, 172), True, [-1]),
        ((172, 344), True, [-1, 172, 86, 43]),
        ((100, 60), True, [-1, 20, 10]),
    ],
    ids=str,
)
def test_group_sizes_that_a_budget_may_take(
    columns: tuple[int, ...], portable: bool | None, expected: list[int]
) -> None:
    """Those that divide all columns; else, in our own format, any."""
    recipe = make_recipe({"method": "rtn", "bits": 3.3, "portable": portable})
    assert bend.values_of(recipe, {str(cols): (8, cols) for cols in columns}) == expected


def test_columns_that_the_default_does_not_divide(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """A model 100 columns wide, in both formats."""
    config = LlamaConfig(
        hidden_size=100,
        intermediate_size=60,
        num_attention_heads=5,
        num_key_value_heads=5,
        num_hidden_layers=1,
        vocab_size=626,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    for how in ("--portable", "--native"):
        out = tmp_path / how
        code, stdout, stderr = command(
            *("quantize", tmp_path / "model", "--method", "rtn", "--bits", 4.3, how, "--out", out, "--json")
        )
        assert code == 0, stderr
        assert 3.9 < json.loads(stdout)["bits_per_weight"] <= 4.3


def test_low_rows_get_a_width_that_fits(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    asked = ["quantize", demo_of(2), "--method", "mixllm", "--bits", 3.0, *FAST]
    code, stdout, stderr = command(*asked, "--out", tmp_path / "out", "--json")
    assert code == 0, stderr
    assert 2.9 < json.loads(stdout)["bits_per_weight"] <= 3.0
    assert "is too small" in refused(*asked, "--low-bits", 3, "--out", tmp_path / "other")


def test_outliers_need_weights_to_be_planned(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    asked = ["plan", demo_of(1), "--method", "gwq", "--bits", 2.6, "--weights", "none", "--out", tmp_path / "plan"]
    assert "--weights none does not apply to outliers (--method gwq)" in refused(*asked)
