"""Originals whose files and configs do not agree in everything: ties, tensors that no model uses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import refused, tensors_of, thorough
from torch import Tensor

import llmsqueeze

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture
def changed(demo_of: Callable[[int], Path], tmp_path: Path) -> Callable[[Change], Path]:
    """change -> the built-in model with one block, its config and its tensors changed. The config ties the head."""

    def make(change: Change) -> Path:
        folder = Path(shutil.copytree(demo_of(1), tmp_path / "model"))
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def likeness(one: Path, other: Path) -> float:
    """The correlation of two models' logits, each opened the public way."""
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits = [llmsqueeze.load(folder, dtype=torch.float32)(tokens).logits.flatten() for folder in (one, other)]
    return float(torch.corrcoef(torch.stack(logits))[0, 1])


def another_head(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDINGS].flip(0).contiguous()


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"method": "coded", "code_embeddings": True}])
def test_a_head_that_differs_from_what_it_is_tied_to_keeps_its_own_weight(
    changed: Callable[[Change], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    text = {"calibration": "demo", "samples": 2, "seq_len": 32} if settings["method"] == "coded" else {}
    model, out = changed(another_head), tmp_path / "out"
    llmsqueeze.quantize(model, out, bits=4, **settings, **text)
    assert likeness(model, out) > 0.98
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("both", [True, False])
def test_tied_weights_are_stored_once_under_the_name_that_others_read(
    changed: Callable[[Change], Path], tmp_path: Path, both: bool
) -> None:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDINGS].clone() if both else tensors.pop(EMBEDDINGS)

    model, out = changed(change), tmp_path / "out"
    summary = llmsqueeze.quantize(model, out, bits=4, method="rtn")
    assert likeness(model, out) > 0.98
    assert {EMBEDDINGS, HEAD} & tensors_of(out).keys() == {EMBEDDINGS}
    assert summary["left_out"] is None
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_tensors_that_the_model_does_not_use_are_told_and_not_counted(
    changed: Callable[[Change], Path], demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.bias"] = torch.ones(700, 700, dtype=torch.uint8)
        tensors["mtp.layers.0.weight"] = torch.ones(8, 8)

    size = sum(tensor.nbytes for tensor in tensors_of(demo_of(1)).values())
    settings = {"method": "budget", "quantizer": "rtn", "calibration": "demo", "samples": 2, "seq_len": 32}
    summary = llmsqueeze.quantize(changed(change), tmp_path / "out", size=size // 2, **settings)
    assert summary["left_out"] == {"tensors": 2, "nbytes": 700 * 700 + 8 * 8 * 4}
    assert summary["nbytes_original"] == size
    assert summary["nbytes"] <= size // 2


@pytest.mark.parametrize("budget", [thorough({"bits": 8.0}), thorough({"size": 0.95}), {"size": 0.99}])
def test_a_budget_near_the_originals_size_is_kept(
    demo_of: Callable[[int], Path], tmp_path: Path, budget: dict[str, float]
) -> None:
    size = sum(tensor.nbytes for tensor in tensors_of(demo_of(1)).values())
    asked: Any = {"size": int(budget["size"] * size)} if "size" in budget else budget
    settings = {"method": "coded", "calibration": "demo", "samples": 2, "seq_len": 32}
    summary = llmsqueeze.quantize(demo_of(1), tmp_path / "out", **settings, **asked)
    assert summary["nbytes"] <= asked.get("size", size)
    assert summary["bits_per_weight"] <= asked.get("bits", 16)
    assert likeness(demo_of(1), tmp_path / "out") > 0.999


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention"] * 3}, "num_hidden_layers"),
        ({"num_attention_heads": 5, "head_dim": None}, "heads"),
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_act": "nope"}, "nope"),
    ],
)
def test_a_config_that_transformers_refuse_is_refused_with_their_reason(
    changed: Callable[[Change], Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    message = refused("quantize", changed(lambda config, _: config.update(change)), "--out", tmp_path / "out")
    assert "transformers cannot" in message
    assert reason in message
    assert "trust-remote-code" not in message


@pytest.mark.parametrize("command_", ["eval", "quantize", "self"])
def test_tokens_beyond_the_embeddings_are_refused(
    changed: Callable[[Change], Path], tmp_path: Path, command_: str
) -> None:
    """As after tokens were added, without a resize."""

    def fewer(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["vocab_size"] = 1 if command_ == "self" else 300
        tensors[EMBEDDINGS] = tensors[EMBEDDINGS][: config["vocab_size"]].clone()

    model = changed(fewer)
    asked = {
        "eval": ["eval", model, "--text", "demo", "--limit", 2],
        "quantize": ["quantize", model, "--bits", 4, "--calibration", "demo", "--samples", 2, "--seq-len", 32],
        "self": ["quantize", model, "--bits", 4, "--calibration", "self", "--samples", 2, "--seq-len", 32],
    }[command_]
    assert "rows of the model's embeddings" in refused(
        *asked, *([] if "eval" in asked else ["--out", tmp_path / "out"])
    )
