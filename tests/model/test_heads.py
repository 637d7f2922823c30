"""Matrices of heads that lie in one parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import COMMON
from support import command
from torch import nn
from transformers import AutoModelForCausalLM, RecurrentGemmaConfig, ZambaConfig

import llmsqueeze
from llmsqueeze.measure.moments import fusion_groups
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.heads import put_stack, stack_heads
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import find_blocks
from llmsqueeze.model.skeleton import build_skeleton


def in_heads() -> Any:
    return ZambaConfig(
        **COMMON,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        intermediate_size=96,
        num_key_value_heads=4,
        attention_hidden_size=128,
        attention_head_dim=32,
        n_mamba_heads=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        pad_token_id=0,
    )


def gated() -> Any:
    """Its gates are added to in the same operation that multiplies."""
    return RecurrentGemmaConfig(**COMMON, num_hidden_layers=2, intermediate_size=96, num_key_value_heads=1)


@pytest.mark.parametrize(("config", "taken"), [(in_heads(), {"x_proj_weight", "dt_proj_weight"}), (gated(), set())])
def test_only_what_is_multiplied_alone_is_taken(config: Any, taken: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in stack_heads(model, find_blocks(model))} == taken


def test_the_products_are_those_of_the_parameter() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(weight := torch.randn(3, 8, 16))
    stack = put_stack(module, "weight")
    for linear, matrix in zip(stack.linears, weight, strict=True):
        linear.weight = nn.Parameter(matrix)
    x = torch.randn(3, 2, 16, 5)
    torch.testing.assert_close(stack[:, None] @ x, weight[:, None] @ x)
    assert torch.equal(stack[:, None].transpose(0, 1), weight[:, None].transpose(0, 1))


def test_each_head_sees_its_own_inputs_and_is_compressed(tmp_path: Path, rows: list[torch.Tensor]) -> None:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(in_heads()).save_pretrained(folder := tmp_path / "model")
    skeleton = build_skeleton(open_checkpoint(folder))
    with Spill() as spill:
        walk = Walk(skeleton, rows, spill, torch.float32, torch.device("cpu"))
        hidden = walk.embed().get(0, torch.device("cpu"))
        with walk.resident_block(0):
            groups = [group.names for group in fusion_groups(walk, 0, hidden)]
    heads = [tuple(f"model.layers.0.mamba.{kind}_proj_weight.{head}" for head in (0,)) for kind in ("x", "dt")]
    assert [names for names in groups if names[0].endswith("_weight.0")] == heads
    code, _, err = command(
        "quantize", folder, "--method", "rtn", "--bits", "8", "--group-size", "8", "--out", tmp_path / "out"
    )
    assert code == 0, err
    loaded, original = llmsqueeze.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(folder)
    assert heads[0][0] in loaded.config.quantization_config.weights
    with torch.no_grad():
        before, after = (model(rows[0], use_cache=False).logits for model in (original, loaded))
    assert 0 < (after - before).norm() < 0.02 * before.norm()
