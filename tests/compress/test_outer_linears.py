"""Linears that several blocks share, and models that are compressed as one block."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import COMMON, unusual
from support import command, tensors_of, thorough
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextConfig, XLMConfig

import llmsqueeze
from llmsqueeze.compress.weights import blocks
from llmsqueeze.compress.weights.blocks import needed_streams
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.recipe.resolve import make_recipe

SAMPLE = torch.arange(4, 28)[None]
SHORT = ("--calibration", "demo", "--samples", "2", "--seq-len", "16", "--quiet")
GPTQ = ("--method", "gptq", "--bits", "4", "--group-size", "16", *SHORT)
CODED = ("--method", "coded", "--bits", "4.0", *SHORT)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Any], Path]:
    """Config -> folder of a random model with the tokenizer of the demo."""

    def make(config: Any) -> Path:
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(MODEL_DIR / file, tmp_path / "model" / file)
        return tmp_path / "model"

    return make


@pytest.fixture
def hybrid(made: Callable[[Any], Path]) -> Path:
    config = unusual()["linears in several blocks"]
    config.vocab_size = 640
    return made(config)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=SAMPLE, use_cache=False).logits
    return logits


def quantized(*arguments: object) -> None:
    code, _, err = command("quantize", *arguments)
    assert code == 0, err


@pytest.mark.parametrize("method", [GPTQ, thorough(CODED)])
def test_what_several_blocks_share_is_compressed_once(method: tuple[str, ...], hybrid: Path, tmp_path: Path) -> None:
    quantized(hybrid, *method, "--out", tmp_path / "out")
    names = [name for name in tensors_of(tmp_path / "out") if ".shared_transformer.self_attn.q_proj." in name]
    assert {name.split(".parts.")[0] for name in names} == {"model.layers.1.shared_transformer.self_attn.q_proj"}
    loaded = llmsqueeze.load(tmp_path / "out", dtype=torch.float32)
    first, second = (loaded.model.layers[i].shared_transformer.self_attn.q_proj for i in (1, 3))
    assert first is second
    assert isinstance(first, SumOfParts) == (method is GPTQ)
    before = logits_of(loaded)
    loaded.dequantize() if method is GPTQ else None
    loaded.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), before)
    original = logits_of(AutoModelForCausalLM.from_pretrained(hybrid))
    assert 1e-4 < (before - original).norm() / original.norm() < 0.5


@pytest.mark.thorough
def test_a_run_goes_on_with_what_is_shared(hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(hybrid, *GPTQ, "--out", tmp_path / "whole")
    compress_block = blocks.compress_block

    def stopping(run: Any, index: int, *rest: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return compress_block(run, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "compress_block", stopping)
        assert command("quantize", hybrid, *GPTQ, "--out", tmp_path / "out")[0] == 130
    quantized(hybrid, *GPTQ, "--out", tmp_path / "out")
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(torch.equal(out[name], whole[name]) for name in whole)


def between_blocks() -> dict[str, Any]:
    """Attention and feed-forward parts are two lists, called in turn; two lists of blocks are called in cycles."""
    cycles = {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [1]}
    return {
        "two lists": XLMConfig(n_words=640, emb_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64),
        "cycles": HrmTextConfig(
            **COMMON | {"vocab_size": 640}, **cycles, intermediate_size=96, num_key_value_heads=4, head_dim=16
        ),
    }


@pytest.mark.parametrize("method", [CODED, thorough(GPTQ)])
@pytest.mark.parametrize("kind", between_blocks())
def test_blocks_that_are_not_called_in_turn_are_one(
    kind: str, method: tuple[str, ...], made: Callable[[Any], Path], tmp_path: Path
) -> None:
    folder = made(between_blocks()[kind])
    code, _, err = command("quantize", folder, *method[:-1], "--out", tmp_path / "out")
    assert code == 0, err
    assert "the model is compressed as one block" in " ".join(err.split())
    original = AutoModelForCausalLM.from_pretrained(folder)
    loaded = llmsqueeze.load(tmp_path / "out", dtype=torch.float32)
    before, after = logits_of(original), logits_of(loaded)
    assert (after - before).norm() < 0.5 * before.norm()
    linears = [n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    kept = set(tensors_of(tmp_path / "out"))
    assert not any(f"{name}.weight" in kept for name in linears if "pred_layer" not in name)


def test_streams_of_other_lengths_are_not_compared(hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compressed before the blocks may cut the text otherwise."""
    recipe = make_recipe({"method": "descent", "bits": 3, "calibration": "demo"})
    skeleton = build_skeleton(open_checkpoint(hybrid))
    with Spill() as spill:
        walk = Walk(skeleton, [SAMPLE, SAMPLE], spill, torch.float32, torch.device("cpu"))
        shorter = Activations(spill)
        for hidden in (inputs := walk.embed()).each(walk.device):
            shorter.append(hidden[:, :-1])
        both = needed_streams(walk, inputs, recipe, True)
        assert both.original is inputs
        assert both.compressed is not inputs
        monkeypatch.setattr(walk, "embed", lambda: shorter)
        assert needed_streams(walk, inputs, recipe, True).all == [shorter]
