"""The verbs as a stranger meets them: one JSON object, tables in 100 columns, results on stdout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import FAST, command, thorough
from typer.testing import CliRunner

from llmsqueeze.cli.app import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outliers(compressed: Callable[[str], Path]) -> Path:
    return compressed("outliers")


def test_eval_json(compressed: Callable[[str], Path], tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    outliers = Path(shutil.copytree(compressed("outliers"), tmp_path / "outliers"))
    options = ["--text", "demo", "--limit", 4, "--tasks", "demo_stories", "--device", "cpu", "--json"]
    code, stdout, _ = command("eval", outliers, "--baseline", demo_of(2), *options)
    assert code == 0
    result = json.loads(stdout)
    names = {"perplexity", "tokens", "kl_mean", "kl_p99", "tasks"}
    assert names <= set(result)
    assert names <= set(result["baseline"])
    assert result["perplexity"] > 1
    assert 0 < result["kl_mean"] < result["kl_p99"]
    assert result["tokens"] == result["baseline"]["tokens"] > 0
    assert {"acc", "acc_stderr"} <= set(result["tasks"]["demo_stories"])
    kept = json.loads((outliers / "evaluation.json").read_text())
    assert kept.keys() == {"limited"}, "scores of a part of the data are kept apart"
    assert kept["limited"]["4"]["limit"] == result["limit"] == 4


def test_show(outliers: Path) -> None:
    code, stdout, _ = command("show", outliers)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in stdout
    assert "3 bit g128 + 1 % outliers" in stdout
    assert "x2" in stdout
    assert max(map(len, stdout.splitlines())) <= 100
    shown = json.loads(command("show", outliers, "--json")[1])
    assert sum(row["count"] for row in shown["rows"]) == 14
    assert sum(row["nbytes"] for row in shown["rows"]) + shown["kept_nbytes"] == shown["nbytes"]
    on_disk = sum(f.stat().st_size for f in outliers.glob("*.safetensors"))
    assert 0 < on_disk - shown["nbytes"] < 0.2 * on_disk, "headers aside"


def test_quantize_json_and_its_summary(tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    """Progress goes to stderr and results to stdout; options replace the keys of a recipe file."""
    (tmp_path / "r.yaml").write_text("method: rtn\nbits: 4\ngroup_size: 64\n")
    recipe = ["--recipe", tmp_path / "r.yaml", "--bits", 2]
    code, stdout, stderr = command("quantize", demo_of(1), *recipe, "--out", tmp_path / "out")
    assert code == 0
    assert "bits per weight" in stdout
    assert "none needed" in stdout
    assert "\x1b" not in stdout + stderr, "no colours without a terminal"
    assert max(map(len, (stdout + stderr).splitlines())) <= 100
    code, stdout, stderr = command("quantize", demo_of(1), *recipe, "--out", tmp_path / "two", "--quiet", "--json")
    assert stderr == ""
    summary = json.loads(stdout)
    assert (summary["method"], summary["bits"], summary["out"]) == ("rtn", 2, str(tmp_path / "two"))
    assert {"bits_per_weight", "nbytes", "nbytes_original", "seconds", "peak_memory_mb"} <= set(summary)
    assert json.loads((tmp_path / "two" / "llmsqueeze.json").read_text())["recipe"]["group_size"] == 64


RECIPES = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
FEW_RECIPES = ("budget-4bit-portable", "coded-3bit", "gptq-4bit", "mixllm-4bit")


@pytest.mark.parametrize("name", [name if name in FEW_RECIPES else thorough(name) for name in RECIPES])
def test_every_recipe_runs(name: str, tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    fast = ["--calibration", "demo", *FAST, *(["--distill-steps", 2] if "dbllm" in name else [])]
    fast += ["--widths", "2,4"] if "budget" in name else []
    recipe = ROOT / "recipes" / f"{name}.yaml"
    code, stdout, stderr = command("quantize", demo_of(1), "--recipe", recipe, "--out", tmp_path / "o", "--json", *fast)
    assert code == 0, stderr
    assert json.loads(stdout)["nbytes"] > 0


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose 192 and 320 columns 64 divides, and 128 does not; as the 576 of SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=192, intermediate_size=320, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    folder = tmp_path_factory.mktemp("uneven") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_default_group_size_bends_to_the_model(uneven: Path, tmp_path: Path) -> None:
    code, stdout, stderr = command(
        "quantize", uneven, "--method", "rtn", "--bits", 4, "--out", tmp_path / "out", "--json"
    )
    assert code == 0
    assert json.loads(stdout)["format"] == "compressed-tensors", "which stock transformers opens"
    assert "groups of 64 columns: 128 does not divide the 192 columns" in " ".join(stderr.split())
    asked = ["--group-size", 128, "--out", tmp_path / "asked", "--json"]
    assert json.loads(command("quantize", uneven, "--method", "rtn", "--bits", 4, *asked)[1])["format"] == "llmsqueeze"


@pytest.mark.parametrize("method", ["layerwise", "budget", "coded"])
def test_a_whole_number_of_bits_buys_what_codes_of_that_width_take(
    method: str, tmp_path: Path, demo_of: Callable[[int], Path]
) -> None:
    options = ["--bits", 3, "--json", "--out"]
    uniform = json.loads(command("quantize", demo_of(1), "--method", "rtn", *options, tmp_path / "rtn")[1])
    widths = ["--widths", "2,4"] if method == "budget" else []
    mixed = ["--method", method, *widths, *FAST, "--calibration", "demo", *options, tmp_path / "mixed"]
    code, stdout, stderr = command("quantize", demo_of(1), *mixed)
    assert code == 0, stderr
    assert 0.9 * uniform["bits_per_weight"] < json.loads(stdout)["bits_per_weight"] <= uniform["bits_per_weight"]


def test_a_whole_number_of_bits_is_a_width_also_of_a_portable_result(
    demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = ["--bits", 2, "--portable", "--calibration", "demo", "--out", tmp_path / "out", "--json", *FAST]
    code, stdout, stderr = command("quantize", demo_of(1), *arguments)
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert (summary["bits"], summary["method"], summary["format"]) == (2, "descent", "compressed-tensors")


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--debug"])
    assert type(result.exception).__name__ == "CheckpointError"


def test_plan_prints_one_json_object(tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    """With a forecast of time and memory, from a trial in a process of its own."""
    options = ["--bits", 3.5, "--widths", "3,4", "--calibration", "demo", "--out", tmp_path / "plan", *FAST]
    code, stdout, stderr = command("plan", demo_of(2), "--json", *options)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert 3.4 < result["bits_per_weight"] <= 3.5
    assert result["predicted_loss_increase"] > 0
    assert result["predicted_loss_interval"] == [times * result["predicted_loss_increase"] for times in (0.4, 2.0)]
    assert sum(row["nbytes"] for row in result["rows"]) < result["nbytes"] < result["nbytes_original"]
    assert result["predicted_seconds"] > 0
    assert 100 < result["predicted_peak_memory_mb"] < 5000
    written = {file.name for file in (tmp_path / "plan").iterdir()}
    assert {"plan.yaml", "profile.safetensors", "plan.png", "plan.svg", "cost.png", "cost.svg"} == written


def test_a_plan_is_shown_in_100_columns(tmp_path: Path) -> None:
    options = ["--bits", 3.5, "--weights", "none", "--out", tmp_path / "plan"]
    code, stdout, _ = command("plan", "demo", *options)
    assert code == 0
    assert max(map(len, stdout.splitlines()[:-1])) <= 100
    assert "model.layers.*.mlp.down_proj" in stdout
    assert f"--plan {tmp_path / 'plan'}/plan.yaml" in stdout


def test_a_run_for_llama_cpp_ends_with_the_export(tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    out, arguments = tmp_path / "out", ["--for", "llama.cpp", "--method", "rtn", "--out"]
    code, stdout, stderr = command("quantize", demo_of(1), *arguments, out)
    assert code == 0, stderr
    _, _, last = stdout.partition("next ")
    assert f"llmsqueeze export {out} --to gguf" in " ".join(last.split())


def test_what_compressed_tensors_costs_is_said_where_it_is_known(
    tmp_path: Path, demo_of: Callable[[int], Path]
) -> None:
    options = ["--widths", "3,4", "--calibration", "demo", "--no-trial", "--out", tmp_path / "plan", *FAST]
    for how, other in (("--portable", "--native --per-row"), ("--per-row", "--portable")):
        code, stdout, stderr = command("plan", demo_of(1), "--method", "budget", "--bits", 3.5, how, *options)
        assert code == 0, stderr
        known = r"compressed-tensors at this size: predicted loss (0\.\d+) instead of (0\.\d+) nats; (.*?) takes the"
        portable, native, offered = re.search(known, " ".join(stdout.split())).groups()  # type: ignore[union-attr]
        assert 0 < float(native) < float(portable)
        assert offered == other


def test_recipes_are_listed_and_used_by_name(tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    code, stdout, _ = command("recipes", "--json")
    assert code == 0
    names = {recipe["name"] for recipe in json.loads(stdout)["recipes"]}
    assert {"budget-3bit", "gwq-3bit", "mixllm-4bit", "papers/lim"} <= names
    arguments = ["--recipe", "coded-3bit", "--calibration", "demo", "--out", tmp_path / "out", "--json", *FAST]
    code, stdout, _ = command("quantize", demo_of(1), *arguments)
    assert code == 0
    assert 2.9 < json.loads(stdout)["bits_per_weight"] <= 3


@pytest.mark.parametrize("method", ["layerwise", "budget", "mixllm"])
def test_budgets_compose_with_outliers(method: str, tmp_path: Path, demo_of: Callable[[int], Path]) -> None:
    """GWQ's outliers are paid for out of the same budget."""
    options = [
        "--method",
        method,
        "--bits",
        4.6,
        "--outliers",
        0.01,
        "--calibration",
        "demo",
        "--out",
        tmp_path / "out",
    ]
    options += ["--widths", "3,5"] if method == "budget" else []
    code, stdout, stderr = command("quantize", demo_of(1), *options, "--json", *FAST)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["outliers"] == pytest.approx(0.01 * 786_432 / 4, rel=0.02)
    assert 3.7 < result["bits_per_weight"] <= 4.6


def test_completion_is_on() -> None:
    assert "--install-completion" in command("--help")[1]
