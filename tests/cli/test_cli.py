"""The command line as a stranger meets it: help at once, one JSON object, one clear line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmsqueeze.cli.app import app

ROOT = Path(__file__).parents[2]
FAST = ["--samples", "2", "--seq-len", "32", "--device", "cpu"]


def llmsqueeze(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command, run in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object) -> str:
    """stderr of a call that must end with code 2, one message, and no traceback."""
    code, out, err = llmsqueeze(*arguments)
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def test_help_needs_neither_torch_nor_transformers() -> None:
    watch = (
        "import sys; sys.argv = ['llmsqueeze', '--help']\n"
        "from llmsqueeze.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate', 'lm_eval'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for verb in ("quantize", "plan", "eval", "show", "push", "recipes"):
        assert verb in done.stdout


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "demo-3bit"
    code, stdout, _ = llmsqueeze("quantize", "demo", "--bits", 3, "--method", "gwq", "--out", out, "--json", *FAST)
    assert code == 0
    summary = json.loads(stdout)
    assert summary["out"] == str(out)
    assert summary["method"] == "gwq"
    assert {"bits_per_weight", "nbytes", "nbytes_original", "seconds", "peak_memory_mb"} <= set(summary)
    assert 3 < summary["bits_per_weight"] < 4
    assert summary["nbytes"] < summary["nbytes_original"]
    return out


def test_eval_json(compressed: Path) -> None:
    arguments = ["--baseline", "demo", "--limit", 8, "--tasks", "demo_stories", "--device", "cpu", "--json"]
    code, stdout, _ = llmsqueeze("eval", compressed, *arguments)
    assert code == 0
    result = json.loads(stdout)
    names = {"perplexity", "tokens", "kl_mean", "kl_p99", "tasks"}
    assert names <= set(result)
    assert names <= set(result["baseline"])
    assert result["perplexity"] > result["baseline"]["perplexity"] > 1
    assert 0 < result["kl_mean"] < result["kl_p99"]
    assert result["tokens"] == result["baseline"]["tokens"] > 0
    assert {"acc", "acc_stderr"} <= set(result["tasks"]["demo_stories"])
    assert not (compressed / "evaluation.json").exists(), "scores of a limited run are not for the card"


def test_show(compressed: Path) -> None:
    code, stdout, _ = llmsqueeze("show", compressed)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in stdout
    assert "3 bit g128 + 1 % outliers" in stdout
    assert "x4" in stdout
    assert max(map(len, stdout.splitlines())) <= 100
    shown = json.loads(llmsqueeze("show", compressed, "--json")[1])
    assert sum(row["count"] for row in shown["rows"]) == 28
    assert sum(row["nbytes"] for row in shown["rows"]) + shown["kept_nbytes"] == shown["nbytes"]
    on_disk = sum(f.stat().st_size for f in compressed.glob("*.safetensors"))
    assert 0 < on_disk - shown["nbytes"] < 0.2 * on_disk, "headers aside"


def test_progress_goes_to_stderr_and_results_to_stdout(tmp_path: Path) -> None:
    code, stdout, stderr = llmsqueeze("quantize", "demo", "--method", "rtn", "--out", tmp_path / "out")
    assert code == 0
    assert "bits per weight" in stdout
    assert "calibration" in stdout
    assert "none needed" in stdout
    assert "model.layers.0.self_attn.q_proj" in stderr
    assert "\x1b" not in stdout + stderr, "no colours where there is no terminal"
    assert max(map(len, (stdout + stderr).splitlines())) <= 100
    code, stdout, stderr = llmsqueeze("quantize", "demo", "--method", "rtn", "--out", tmp_path / "two", "--quiet")
    assert stderr == ""


def test_recipe_file_and_options_win_over_it(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: rtn\nbits: 4\ngroup_size: 64\n")
    arguments = ["--recipe", tmp_path / "r.yaml", "--bits", 2, "--out", tmp_path / "out", "--json"]
    code, stdout, _ = llmsqueeze("quantize", "demo", *arguments)
    assert code == 0
    assert json.loads(stdout)["bits"] == 2
    assert json.loads((tmp_path / "out" / "llmsqueeze.json").read_text())["recipe"]["group_size"] == 64


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    code, stdout, _ = llmsqueeze("quantize", "demo", "--recipe", recipe, "--out", tmp_path / "out", "--json", *FAST)
    assert code == 0
    assert json.loads(stdout)["nbytes"] > 0


BAD_OPTIONS = [
    (["--method", "gqw"], "unknown method 'gqw'; did you mean 'gwq'?"),
    (["--bits", 1], "bits 1 is no width that method descent has (2 to 8)"),
    (["--bits", 9], "bits is 9; it must be a number from 1 to 8"),
    (["--bits", "three"], "Invalid value for '--bits'"),
    (["--bits", 2.5, "--method", "gwq"], "fractional ones go with coded or budget"),
    (["--group-size", 0], "group size is 0; it must be a positive number of columns, or -1"),
    (["--group-size", -2], "group size is -2"),
    (["--outliers", 0.9], "outliers is 0.9; it must be a fraction from 0 to 0.5"),
    (["--outliers", "nan"], "outliers is nan"),
    (["--outlier-ranking", "gradients"], "did you mean 'gradient'?"),
    (["--outlier-scope", "model"], "choose from layer, global"),
    (["--method", "rtn", "--quantizer", "gptq"], "quantizer 'gptq' contradicts method rtn"),
    (["--bits", 3, "--size", "1MB"], "bits 3 contradicts size 1000000: name one budget"),
    (
        ["--method", "gwq", "--size", "1MB"],
        "size goes with method coded or layerwise or mixllm or budget, not with gwq",
    ),
    (["--bits", 2.5, "--size", "1MB"], "bits 2.5 contradicts size 1000000: name one budget"),
    (["--size", "1XB"], "size is '1XB'; write it as 4GB"),
    (["--size", "1kB"], "size 1000 bytes is too small: with steps and tables alone the linears take"),
    (["--size", "1kB", "--per-row"], "size 1000 bytes is too small: with 1-bit codes everywhere"),
    (["--size", "1GB"], "no less than the original's"),
    (["--method", "budget"], "method budget wants a budget"),
    (["--method", "coded"], "method coded wants a budget: bits 2.7, size 4GB"),
    (["--method", "coded", "--bits", 0.1], "bits is 0.1"),
    (["--method", "coded", "--bits", 2.5, "--widths", "2,3"], "widths says nothing of method coded"),
    (["--method", "coded", "--bits", 2.5, "--portable"], "portable contradicts method coded"),
    (["--bits", 3, "--pack", "zip"], "unknown pack 'zip'; choose from rans, none"),
    (["--method", "budget", "--bits", 3, "--per-row", "--per-group"], "--per-row contradicts --per-group"),
    (["--method", "budget", "--bits", 3, "--portable", "--per-row"], "portable contradicts per row"),
    (["--method", "mixllm", "--high-fraction", 1.5], "it must be a fraction from 0 to 1"),
    (["--method", "mixllm", "--high-fraction", 0.1, "--bits", 4.4], "high fraction 0.1 contradicts bits 4.4"),
    (["--method", "layerwise", "--importance", "salience"], "it knows lim, zd"),
    (["--method", "layerwise", "--low-bits", 4, "--high-bits", 2], "low bits 4 is not below high bits 2"),
    (["--plan", "nowhere.yaml"], "no plan file nowhere.yaml"),
    (["--plan", "plan.yaml", "--bits", 3], "--plan contradicts --bits"),
    (["--profile", "nowhere.safetensors", "--bits", 2.5], "there is no profile nowhere.safetensors"),
    (["--samples", 0], "samples is 0"),
    (["--seq-len", 1], "seq len is 1"),
    (["--seed", -1], "seed is -1"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--device", "cuda:99"], "is not there"),
    (["--recipe", "nowhere.yaml"], "no recipe file nowhere.yaml"),
    (["--calibration", "nowhere.txt"], "no text file nowhere.txt"),
    (["--skip", "nonsense"], "matches no linear"),
    (["--bit", 3], "No such option: --bit"),
]


@pytest.mark.parametrize(
    ("options", "said"), BAD_OPTIONS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_bad_options(options: list[object], said: str, tmp_path: Path) -> None:
    assert said in refused("quantize", "demo", "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("bit: 3", "unknown recipe key 'bit'; did you mean 'bits'?"),
        ("bits: '3'", "bits is '3'; it must be a number from 1 to 8"),
        ("bits: true", "bits is True"),
        ("bit: 3\nmethod: gqw", "did you mean 'gwq'?"),
        ("method: [gwq]", "unknown method"),
        ("symmetric: 1", "symmetric must be true or false"),
        ("- bits", "is no recipe"),
        ("bits: [", "not readable YAML"),
        ("", "is no recipe"),
        ("skip: 3", "skip must be a list"),
        ("calibration: 3", "must be the name of a file"),
    ],
)
def test_bad_recipes(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    assert said in refused("quantize", "demo", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"  \n", "is empty"),
        ("short.txt", b"too short", "too few for one sample of 32"),
        ("binary.txt", b"\xff\xfe\x00\x01", "is not text"),
        ("nul.txt", b"abc\0def", "NUL"),
        ("list.jsonl", b'["no object"]', "line 1 has no 'text' field"),
        ("other.jsonl", b'{"content": "abc"}', "it has: content"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
    ],
)
def test_bad_calibration_text(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused("quantize", "demo", "--calibration", tmp_path / name, "--out", tmp_path / "out", *FAST)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(demo_dir: Path, tmp_path: Path) -> Path:
    """A copy of the built-in model to spoil."""
    return Path(shutil.copytree(demo_dir, tmp_path / "model"))


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def spoil_weight(model: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def reshape_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


BAD_MODELS: list[tuple[Callable[[Path], object], str]] = [
    (lambda m: (m / "config.json").unlink(), "no config.json"),
    (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
    (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickle"),
    (lambda m: (m / "model.safetensors").rename(m / "weights.safetensors"), "renamed or lost"),
    (lambda m: os.truncate(m / "model.safetensors", 100_000), "damaged or cut short"),
    (lambda m: spoil_weight(m, torch.nan), "model.layers.2.mlp.up_proj.weight in model.safetensors contains NaN"),
    (lambda m: spoil_weight(m, torch.inf), "model.layers.2.mlp.up_proj.weight in model.safetensors contains Inf"),
    (drop_tensor, "has no weight model.layers.2.mlp.up_proj.weight"),
    (reshape_tensor, "model.norm.weight has shape [7]"),
    (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
    (lambda m: edit_config(m, model_type="nonsense"), "transformers cannot read"),
    (lambda m: edit_config(m, architectures=["BertModel"], model_type="bert"), "BertModel is not a causal"),
    (lambda m: edit_config(m, architectures=["T5ForConditionalGeneration"], model_type="t5"), "encoder-decoder"),
    (lambda m: edit_config(m, architectures=["LlamaForSequenceClassification"]), "is not a causal language model"),
    (lambda m: edit_config(m, quantization_config={"quant_method": "gptq"}), "already quantized (by gptq)"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_MODELS, ids=[said for _, said in BAD_MODELS])
def test_bad_models(spoil: Callable[[Path], object], said: str, model: Path, tmp_path: Path) -> None:
    spoil(model)
    message = refused("quantize", model, "--out", tmp_path / "out", "--calibration", "demo", "--quiet", *FAST)
    assert said in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing was left behind"


def test_a_vision_model_is_refused(model: Path, tmp_path: Path) -> None:
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(model)
    assert "is not a text-only model" in refused("quantize", model, "--out", tmp_path / "out")


def test_a_compressed_model_is_refused(compressed: Path, tmp_path: Path) -> None:
    assert "already quantized (by llmsqueeze)" in refused("quantize", compressed, "--out", tmp_path / "out")


def test_an_existing_folder_is_refused(compressed: Path, tmp_path: Path) -> None:
    assert "--overwrite" in refused("quantize", "demo", "--out", compressed)
    assert "file" in refused("quantize", "demo", "--out", __file__, "--overwrite")
    assert "not written by llmsqueeze" in refused("quantize", "demo", "--out", ROOT, "--overwrite")


def test_names_of_no_model(tmp_path: Path) -> None:
    assert "there is no folder ./nowhere" in refused("quantize", "./nowhere", "--out", tmp_path / "out")
    assert "name a local folder, a Hub id" in refused("show", "nowhere")
    assert "was not compressed by llmsqueeze" in refused("show", "demo")


def test_no_network_for_a_hub_id(tmp_path: Path) -> None:
    """In a process of its own, whose Hub refuses connections."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "llmsqueeze.cli"]
    for arguments in (["quantize", "owner/model"], ["eval", "demo", "--text", "owner/dataset"]):
        done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Hub" in done.stderr
        assert "Traceback" not in done.stderr


def test_bad_eval_options(compressed: Path, tmp_path: Path) -> None:
    assert "unknown task 'demo_story'; did you mean 'demo_stories'?" in refused("eval", "demo", "--tasks", "demo_story")
    assert "--tasks is empty" in refused("eval", "demo", "--tasks", ",")
    assert "is not a folder" in refused("eval", "demo", "--tasks", "x", "--include-path", tmp_path / "no")
    assert "there is no text file" in refused("eval", "demo", "--text", tmp_path / "no.txt")
    assert "there is no folder" in refused("eval", "demo", "--baseline", "./nowhere")
    damaged = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 10)
    for verb in ("eval", "show"):
        assert f"{shard.name} is damaged or cut short" in refused(verb, damaged)


def test_a_future_format_is_refused(compressed: Path, tmp_path: Path) -> None:
    future = Path(shutil.copytree(compressed, tmp_path / "future"))
    config = json.loads((future / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (future / "config.json").write_text(json.dumps(config))
    for verb in ("eval", "show"):
        assert "version 99 is not read" in refused(verb, future)


def test_ctrl_c_leaves_no_result(tmp_path: Path) -> None:
    """A real process, really interrupted while it compresses."""
    command = [sys.executable, "-u", "-m", "llmsqueeze.cli", "quantize", "demo", "--out", str(tmp_path / "out")]

    def listen() -> None:
        """What a shell starts in the background ignores Ctrl-C, and so would its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if "mlp.down_proj" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        out = process.stdout.read()
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path), "--debug"])
    assert type(result.exception).__name__ == "CheckpointError"


def test_plan_prints_one_json_object(tmp_path: Path) -> None:
    options = ["--bits", 3.5, "--widths", "3,4", "--no-trial", "--out", tmp_path / "plan", *FAST]
    code, stdout, _ = llmsqueeze("plan", "demo", "--json", *options)
    assert code == 0
    result = json.loads(stdout)
    assert 3.4 < result["bits_per_weight"] <= 3.5
    assert result["predicted_loss_increase"] > 0
    assert sum(row["nbytes"] for row in result["rows"]) < result["nbytes"] < result["nbytes_original"]
    written = {file.name for file in (tmp_path / "plan").iterdir()}
    assert {"plan.yaml", "profile.safetensors", "plan.png", "plan.svg", "cost.png", "cost.svg"} == written


def test_a_plan_is_shown_in_100_columns(tmp_path: Path) -> None:
    options = ["--bits", 3.5, "--weights", "none", "--out", tmp_path / "plan"]
    code, stdout, _ = llmsqueeze("plan", "demo", *options)
    assert code == 0
    assert max(map(len, stdout.splitlines()[:-1])) <= 100
    assert "model.layers.*.mlp.down_proj" in stdout
    assert f"--plan {tmp_path / 'plan'}/plan.yaml" in stdout


def test_a_trial_predicts_time_and_memory(tmp_path: Path) -> None:
    """In a process of its own, as `quantize --plan` will be."""
    options = ["--bits", 3.5, "--widths", "3,4", "--out", tmp_path / "plan", *FAST]
    code, stdout, stderr = llmsqueeze("plan", "demo", "--json", *options)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["predicted_seconds"] > 0
    assert 100 < result["predicted_peak_memory_mb"] < 5000


def test_recipes_are_listed_and_used_by_name(tmp_path: Path) -> None:
    code, stdout, _ = llmsqueeze("recipes", "--json")
    assert code == 0
    names = {recipe["name"] for recipe in json.loads(stdout)["recipes"]}
    assert {"budget-3bit", "gwq-3bit", "mixllm-4bit", "papers/lim"} <= names
    out = tmp_path / "out"
    code, stdout, _ = llmsqueeze("quantize", "demo", "--recipe", "budget-3bit", "--out", out, "--json", *FAST)
    assert code == 0
    assert 2.9 < json.loads(stdout)["bits_per_weight"] <= 3


@pytest.mark.parametrize("method", ["layerwise", "budget", "mixllm"])
def test_budgets_compose_with_outliers(method: str, tmp_path: Path) -> None:
    """GWQ's outliers are paid for out of the same budget."""
    options = ["--method", method, "--bits", 4.6, "--outliers", 0.01, "--out", tmp_path / "out", "--json", *FAST]
    code, stdout, stderr = llmsqueeze("quantize", "demo", *options)
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["outliers"] == pytest.approx(0.01 * 786_432, rel=0.01)
    assert 3.7 < result["bits_per_weight"] <= 4.6
