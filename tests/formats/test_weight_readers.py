"""Modules that read the weight of a linear themselves: their folders are native, for stock transformers fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import command
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, QianfanOCRConfig

from llmsqueeze.model.blockwise.dry_run import obstacle_in_stock, weight_read_by_others
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import find_blocks, find_linears
from llmsqueeze.model.skeleton import build_skeleton

RTN = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--quiet"]
READ = {
    "linears of its own": "self_attention.query_key_value",  # its forward is not nn.Linear's
    "state space": "mixer.dt_proj",  # the forward of the module around it
    "state space in heads": "mixer.out_proj",  # _init_weights of the module around it
    "initialized by its parent": "c_proj",
}


@pytest.mark.parametrize("architecture", [*READ, "llama", "hybrid", "stacked streams, keys handed on", "gemma2"])
def test_they_are_found_by_running(architecture: str, random_model: Callable[..., Path]) -> None:
    skeleton = build_skeleton(open_checkpoint(random_model(architecture)))
    linears = [name for names in skeleton.linears for name in names]
    kinds = [type(skeleton.module(name)) for name in linears]
    found = weight_read_by_others(skeleton.model, skeleton.blocks, linears)
    if architecture in READ:
        assert found is not None
        assert READ[architecture] in found
    else:
        assert found is None
    assert [type(skeleton.module(name)) for name in linears] == kinds
    assert all(skeleton.linear(name).weight.is_meta for name in linears), "the weights are back"


def test_the_default_is_native_and_portable_says_what_fails(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = random_model("initialized by its parent")
    code, out, err = command("quantize", folder, *RTN, "--out", tmp_path / "default", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["format"] == "llmsqueeze"
    assert "another module reads its weight" in summary["why_native"]
    code, out, err = command("quantize", folder, *RTN, "--portable", "--out", tmp_path / "portable", "--json")
    assert code == 0, err
    opens = json.loads(out)["opens"]
    assert opens["native"] == ""
    assert "another module reads its weight" in opens["transformers"]


def test_stock_transformers_fails_where_it_is_said(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """If this passes one day, the folders of these models can be portable again."""
    pytest.importorskip("compressed_tensors")
    folder = random_model("initialized by its parent")
    command("quantize", folder, *RTN, "--portable", "--out", tmp_path / "portable")
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "portable")


def test_a_conversion_that_transformers_cannot_prepare_is_an_obstacle() -> None:
    """Qianfan-OCR stores query, key and value of its vision tower in one tensor, which is split on loading."""
    blocks = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    text = {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, **blocks}
    config = QianfanOCRConfig(vision_config={"image_size": 16, "patch_size": 8, **blocks}, text_config=text)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    names = find_blocks(model)
    obstacle = obstacle_in_stock(model, names, find_linears(model, names[0]))
    assert obstacle is not None
    assert "cannot convert the model's stored tensors" in obstacle
    assert "attn.qkv.weight_packed" in obstacle
