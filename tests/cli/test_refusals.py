"""Bad input: one clear line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from support import FAST, refused

from llmsqueeze.evaluation.tasks import definitions

ROOT = Path(__file__).parents[2]

BAD_OPTIONS = [
    (["--method", "gqw"], "unknown --method 'gqw'; did you mean 'gwq'?"),
    (["--bits", 1], "--bits 1 is too narrow for --method descent: its codes have 2 to 8 bits"),
    (["--bits", 9], "--bits is 9; it must be a number from 1 to 8"),
    (["--bits", "three"], "--bits is 'three'; it must be a number from 1 to 8"),
    (["--group-size", 0], "--group-size is 0; it must be a positive number of columns, or -1"),
    (["--group-size", -2], "--group-size is -2"),
    (["--outliers", 0.9], "--outliers is 0.9; it must be a fraction from 0 to 0.5"),
    (["--outliers", "nan"], "--outliers is nan"),
    (["--outlier-ranking", "gradients"], "did you mean 'gradient'?"),
    (["--outlier-scope", "model"], "choose from layer, global"),
    (["--method", "rtn", "--quantizer", "gptq"], "--quantizer gptq contradicts --method rtn"),
    (["--bits", 3, "--size", "1MB"], "--bits 3 contradicts --size 1000000: name one budget"),
    (["--bits", 2.5, "--size", "1MB"], "--bits 2.5 contradicts --size 1000000: name one budget"),
    (["--size", "1XB"], "--size is '1XB'; write it as 4GB"),
    (["--size", "1kB"], "--size 1000 bytes is too small: with steps and tables alone the linears take"),
    (["--size", "1kB", "--per-row"], "--size 1000 bytes is too small: with 1-bit codes everywhere"),
    (["--size", "1GB"], "no less than the original's"),
    (["--method", "budget"], "--method budget needs a budget"),
    (["--method", "coded"], "--method coded needs a budget: --bits 2.7, --size 4GB"),
    (["--method", "coded", "--bits", 0.1], "--bits is 0.1"),
    (["--method", "coded", "--bits", 2.5, "--widths", "2,3"], "--widths 2,3 does not apply to --method coded"),
    (["--method", "coded", "--bits", 2.5, "--portable"], "--portable contradicts --method coded"),
    (["--bits", 3, "--pack", "zip"], "unknown --pack 'zip'; choose from rans, none"),
    (["--method", "budget", "--bits", 3, "--per-row", "--per-group"], "--per-row contradicts --per-group"),
    (["--method", "budget", "--bits", 3, "--portable", "--per-row"], "--portable contradicts --per-row"),
    (["--method", "mixllm", "--high-fraction", 1.5], "it must be a fraction from 0 to 1"),
    (["--method", "mixllm", "--high-fraction", 0.1, "--bits", 4.4], "--high-fraction 0.1 contradicts --bits 4.4"),
    (["--method", "layerwise", "--importance", "salience"], "it takes lim, zd"),
    (["--method", "layerwise", "--low-bits", 4, "--high-bits", 2], "--low-bits 4 is not below --high-bits 2"),
    (["--plan", "nowhere.yaml"], "no plan file nowhere.yaml"),
    (["--plan", "plan.yaml", "--bits", 3], "--plan contradicts --bits"),
    (["--profile", "nowhere.safetensors", "--bits", 2.5], "there is no profile nowhere.safetensors"),
    (["--samples", 0], "--samples is 0"),
    (["--seq-len", 1], "--seq-len is 1"),
    (["--seed", -1], "--seed is -1"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--device", "cuda:99"], "does not exist"),
    (["--recipe", "nowhere.yaml"], "no recipe file nowhere.yaml"),
    (["--calibration", "nowhere.txt"], "no text file nowhere.txt"),
    (["--skip", "nonsense"], "matches no linear"),
    (["--bit", 3], "quantize has no option --bit; did you mean '--bits'?"),
    (["--method", "lim"], "--method lim is no method but a ranking: --method layerwise --importance lim"),
    (
        ["--size", "400kB", "--method", "coded", "--group-size", 128],
        "--group-size 128 does not apply to --method coded",
    ),
    (["--method", "rtn", "--samples", 2], "--samples 2 does not apply to --method rtn, which reads no text"),
    (["--outlier-ranking", "magnitude", "--bits", 2.5], "--outlier-ranking magnitude needs --outliers above 0"),
]


@pytest.mark.parametrize(
    ("options", "expected"), BAD_OPTIONS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_bad_options(options: list[object], expected: str, tmp_path: Path) -> None:
    assert expected in refused("quantize", "demo", "--out", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("bit: 3", "unknown recipe key 'bit'; did you mean 'bits'?"),
        ("bits: x", "--bits is 'x'; it must be a number from 1 to 8"),
        ("bits: true", "--bits is True"),
        ("bit: 3\nmethod: gqw", "did you mean 'gwq'?"),
        ("method: [gwq]", "unknown --method"),
        ("symmetric: 1", "--symmetric must be true or false"),
        ("- bits", "is no recipe"),
        ("bits: 4\nskip: [", "line 2 is not readable YAML: expected the node content"),
        ("bits: 3\nbits: 4", "line 2: bits is there twice"),
        ("", "is no recipe"),
        ("skip: 3", "--skip must be a list"),
        ("calibration: 3", "must be the name of a file"),
    ],
)
def test_bad_recipes(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    assert expected in refused("quantize", "demo", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")


def test_a_folder_is_no_recipe_and_a_file_no_result(tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder; name a recipe" in refused("quantize", "demo", "--recipe", tmp_path)
    assert f"{__file__} is a file; --out names a folder" in refused("quantize", "demo", "--out", __file__)
    given = refused("quantize", "demo", "--plan", tmp_path, *FAST, "--out", tmp_path / "out")
    assert "--plan contradicts --samples, --seq-len: the plan has its own recipe" in given


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"  \n", "is empty"),
        ("short.txt", b"too short", "too few for one sample of 32"),
        ("binary.txt", b"\xff\xfe\x00\x01", "is not text"),
        ("nul.txt", b"abc\0def", "NUL"),
        ("numbers.jsonl", b'{"n": 1}', "name it with --text-field (it has: n)"),
        ("other.jsonl", b'{"title": "abc", "summary": "d"}', "--text-field (it has: title, summary)"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
    ],
)
def test_bad_calibration_text(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refused("quantize", "demo", "--calibration", tmp_path / name, "--out", tmp_path / "out", *FAST)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def native(compressed: Callable[[str], Path]) -> Path:
    return compressed("native")


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


@pytest.mark.parametrize(("spoil", "expected"), BAD_MODELS, ids=[expected for _, expected in BAD_MODELS])
def test_bad_models(spoil: Callable[[Path], object], expected: str, model: Path, tmp_path: Path) -> None:
    spoil(model)
    message = refused("quantize", model, "--out", tmp_path / "out", "--calibration", "demo", "--quiet", *FAST)
    assert expected in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing was left behind"


def test_a_vision_model_is_refused(model: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig

    CLIPVisionConfig(architectures=["CLIPVisionModel"]).save_pretrained(model)
    assert "CLIPVisionModel is not a causal language model" in refused("quantize", model, "--out", tmp_path / "out")


def test_a_compressed_model_is_refused(native: Path, tmp_path: Path) -> None:
    assert "already quantized (by llmsqueeze)" in refused("quantize", native, "--out", tmp_path / "out")


def test_an_existing_folder_is_refused(native: Path, tmp_path: Path) -> None:
    assert "--overwrite" in refused("quantize", "demo", "--out", native)
    assert "file" in refused("quantize", "demo", "--out", __file__, "--overwrite")
    assert "not written by llmsqueeze" in refused("quantize", "demo", "--out", ROOT, "--overwrite")


def test_names_of_no_model(tmp_path: Path) -> None:
    assert "there is no folder ./nowhere" in refused("quantize", "./nowhere", "--out", tmp_path / "out")
    assert "name a local folder, a Hub id" in refused("show", "nowhere")
    assert "was not compressed by llmsqueeze" in refused("show", "demo")


@pytest.mark.parametrize(
    "call", [("quantize", "owner/model"), ("eval", "demo", "--text", "owner/dataset")], ids=["model", "data set"]
)
def test_a_hub_that_cannot_be_reached(call: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses connections."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the command sets it; it is put back afterwards
    message = refused(*call)
    assert "Hub" in message
    assert list(tmp_path.iterdir()) == []


def test_bad_eval_options(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # without the thousands of definitions that lm-eval has itself; tests of `compare` read them
    index = TaskManager(include_defaults=False)
    monkeypatch.setattr(definitions, "task_index", lambda *_: index)
    assert "unknown task 'demo_story'; did you mean 'demo_stories'?" in refused("eval", "demo", "--tasks", "demo_story")
    assert "--tasks is empty" in refused("eval", "demo", "--tasks", ",")
    assert "is not a folder" in refused("eval", "demo", "--tasks", "x", "--include-path", tmp_path / "no")
    assert "there is no text file" in refused("eval", "demo", "--text", tmp_path / "no.txt")
    assert "there is no folder" in refused("eval", "demo", "--baseline", "./nowhere")
    damaged = Path(shutil.copytree(native, tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 10)
    for verb in (["eval", "--text", "demo"], ["show"]):
        assert f"{shard.name} is damaged or cut short" in refused(*verb, damaged)


def test_a_future_format_is_refused(native: Path, tmp_path: Path) -> None:
    future = Path(shutil.copytree(native, tmp_path / "future"))
    config = json.loads((future / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (future / "config.json").write_text(json.dumps(config))
    for verb in (["eval", "--text", "demo"], ["show"]):
        assert "version 99 is not read" in refused(*verb, future)
