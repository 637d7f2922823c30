"""Experts in compressed-tensors: under the names of the Hub's files, as stock transformers opens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import logits
from safetensors import safe_open
from support import FAST, command, refused, tensors_of, thorough

import llmsqueeze

Mixture = Callable[[str], tuple[Path, torch.nn.Module]]


def summary_of(*arguments: object) -> dict[str, Any]:
    code, printed, err = command(*arguments, "--json", "-q")
    assert code == 0, err
    result: dict[str, Any] = json.loads(printed)
    return result


@pytest.mark.parametrize(("name", "bits"), [("mixtral", 3), ("qwen3_moe", 4)])
def test_stock_transformers_opens_portable_experts(name: str, bits: int, mixture: Mixture, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    flags, out = ("--method", "rtn", "--bits", bits), tmp_path / "out"
    summary = summary_of("quantize", mixture(name)[0], *flags, "--out", out)
    assert (summary["format"], summary["why_native"]) == ("compressed-tensors", None)
    assert summary["opens"]["transformers"] == ""
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert list(groups.values())[-1]["targets"] == ["re:.*experts.*"]
    expected = logits(llmsqueeze.load(str(out), dtype=torch.float32))
    for how in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        stock: Any = AutoModelForCausalLM
        assert torch.allclose(
            logits(stock.from_pretrained(out, dtype=torch.float32, **how).eval()), expected, atol=1e-5
        )
    assert command("check", out)[0] == 0
    native = summary_of("quantize", mixture(name)[0], *flags, "--native", "--out", tmp_path / "native")
    assert native["why_native"] == "--native"
    assert torch.equal(logits(llmsqueeze.load(str(tmp_path / "native"), dtype=torch.float32)), expected)


def test_a_native_folder_of_experts_is_exported_as_it_would_have_been_written(mixture: Mixture, tmp_path: Path) -> None:
    flags = ("quantize", mixture("mixtral")[0], "--method", "rtn", "--bits", 4, "-q", "--out")
    assert command(*flags, tmp_path / "portable")[0] == 0
    assert command(*flags, tmp_path / "native", "--native")[0] == 0
    code, _, err = command(
        "export", tmp_path / "native", "--to", "compressed-tensors", "--out", tmp_path / "exported", "-q"
    )
    assert code == 0, err
    written, exported = tensors_of(tmp_path / "portable"), tensors_of(tmp_path / "exported")
    assert "model.layers.1.block_sparse_moe.experts.3.w3.weight_packed" in written
    assert written.keys() == exported.keys()
    assert all(torch.equal(written[name], exported[name]) for name in written)
    assert command("export", tmp_path / "portable", "--to", "dense", "--out", tmp_path / "dense", "-q")[0] == 0
    opened, dense = (llmsqueeze.load(str(tmp_path / name), dtype=torch.float32) for name in ("portable", "dense"))
    assert torch.allclose(logits(dense), logits(opened), atol=1e-5)
    assert torch.allclose(logits(opened.dequantize()), logits(dense), atol=1e-5)


def test_a_piece_that_is_lost_or_damaged_is_found(mixture: Mixture, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    assert command("quantize", mixture("qwen3_moe")[0], "--method", "rtn", "--bits", 4, "-q", "--out", out)[0] == 0
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    file = out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(file, "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)
    assert "not finite" in command("check", out)[1]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert "up_proj.weight_scale" in command("check", out)[1]


@pytest.mark.parametrize(
    ("name", "flags", "why"),
    [
        ("gpt_oss", ("rtn", "--bits", 4), "hold its experts together, or their rows in another order"),
        thorough("mixtral", ("rtn", "--bits", 4, "--skip", "down_proj"), "an expert that stays dense"),
        thorough("mixtral", ("rtn", "--bits", 4, "--asymmetric"), "--asymmetric"),
        thorough(
            "mixtral", ("budget", "--bits", 3, "--per-group", "--levels", "integer", "--widths", "2,3,4"), "one width"
        ),
    ],
)
def test_experts_that_are_not_portable_are_native_and_it_says_why(
    name: str, flags: tuple[Any, ...], why: str, mixture: Mixture, tmp_path: Path
) -> None:
    folder, _ = mixture(name)
    text = (*FAST, "--calibration", "demo") if flags[0] == "budget" else ()
    summary = summary_of("quantize", folder, "--method", *flags, *text, "--out", tmp_path / "out")
    assert summary["format"] == "llmsqueeze"
    assert why in summary["why_native"]
    if flags[-1] != "--asymmetric":
        refusal = refused("export", tmp_path / "out", "--to", "compressed-tensors", "--out", tmp_path / "portable")
        assert "export --to dense" in refusal
    message = refused("quantize", folder, "--method", *flags, *text, "--portable", "--out", tmp_path / "b", "-q")
    assert "contradicts" in message
