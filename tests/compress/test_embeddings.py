"""`--embeddings 8|4`: embeddings and head are rounded on grids, beside the budget of bits, and open like everything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import command, refused, tensors_of
from transformers import XLMConfig, XLMWithLMHeadModel

import llmsqueeze
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.rtn import rtn


@pytest.fixture(scope="module")
def untied(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one-block model with a head of its own."""
    folder = Path(shutil.copytree(demo_of(1), tmp_path_factory.mktemp("untied") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    head = embeddings.float() * (1 + 0.1 * torch.randn(embeddings.shape, generator=generator))
    save_file(tensors | {"lm_head.weight": head.to(embeddings.dtype)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 32)])
@pytest.mark.parametrize("ties", [True, False], ids=["tied", "untied"])
def test_they_are_rounded_and_the_linears_are_as_without(
    bits: int, group: int, ties: bool, demo_of: Callable[[int], Path], untied: Path, tmp_path: Path
) -> None:
    model, out = demo_of(1) if ties else untied, tmp_path / "out"
    asked = ["quantize", model, "--method", "rtn", "--native", "--bits", 3]
    code, stdout, stderr = command(*asked, "--embeddings", bits, "--out", out, "--json")
    assert code == 0, stderr
    summary = json.loads(stdout)
    code, stdout, _ = command(*asked, "--out", tmp_path / "plain", "--json")
    plain = json.loads(stdout)
    assert summary["bits_per_weight"] == plain["bits_per_weight"]
    ends = ["model.embed_tokens"] if ties else ["model.embed_tokens", "lm_head"]
    assert summary["embeddings"]["linears"] == len(ends)
    assert (
        summary["nbytes"]
        == plain["nbytes"] - summary["embeddings"]["nbytes_original"] + summary["embeddings"]["nbytes"]
    )
    assert summary["ends_nbytes"] == 0

    opened, original = llmsqueeze.load(out), tensors_of(model)
    grid = Grid(bits, group if original["model.embed_tokens.weight"].shape[1] % group == 0 else -1, True)
    for name in ends:
        stored = original[f"{name}.weight"]
        rounded = rtn(stored.float(), grid, stored.dtype, search=True).dense()
        weight = opened.get_submodule(name).weight
        assert weight.equal(rounded.to(weight.dtype))
    assert (opened.lm_head.weight is opened.model.embed_tokens.weight) == ties

    shown = json.loads(command("show", out, "--json")[1])
    assert [row["pattern"] for row in shown["rows"] if row["beside"]] == ends
    assert round(shown["bits_per_weight"], 6) == plain["bits_per_weight"]
    assert json.loads(command("check", out, "--json")[1])["sound"]
    code, _, stderr = command("export", out, "--to", "dense", "--out", tmp_path / "dense")
    assert code == 0, stderr
    dense = tensors_of(tmp_path / "dense")["model.embed_tokens.weight"]
    assert dense.equal(opened.model.embed_tokens.weight.to(dense.dtype))


def test_a_size_counts_them(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in tensors_of(demo_of(1)).values()) // 4
    assert "is too small" in refused("plan", demo_of(1), "--method", "rtn", "--size", size, "--no-trial")
    out = tmp_path / "out"
    asked = ["--method", "rtn", "--size", size, "--embeddings", 4, "--out", out]
    code, _, stderr = command("quantize", demo_of(1), *asked)
    assert code == 0, stderr
    assert sum(tensor.nbytes for tensor in tensors_of(out).values()) <= size


def test_one_of_two_decides_them(demo_of: Callable[[int], Path]) -> None:
    asked = ["quantize", demo_of(1), "--method", "coded", "--bits", 3.0, "--embeddings", 8]
    assert "--code-embeddings contradicts --embeddings 8" in refused(*asked, "--code-embeddings")
    asked[-1] = 5
    assert "--embeddings is 5; choose from 8, 4" in refused(*asked)


def test_exports_have_them_dense(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    asked = ["--method", "rtn", "--bits", 4, "--embeddings", 8, "--out", tmp_path / "folder"]
    assert command("quantize", demo_of(1), *asked)[0] == 0
    for to in ("compressed-tensors", "gguf-map"):
        code, _, stderr = command("export", tmp_path / "folder", "--to", to, "--out", tmp_path / to)
        assert code == 0, stderr
    exported, folder = llmsqueeze.load(tmp_path / "compressed-tensors"), llmsqueeze.load(tmp_path / "folder")
    assert exported.model.embed_tokens.weight.equal(folder.model.embed_tokens.weight)


def test_a_model_of_one_block_keeps_them(tmp_path: Path) -> None:
    config = XLMConfig(vocab_size=626, emb_dim=32, n_layers=2, n_heads=2, causal=True, bos_index=1, eos_index=2)
    XLMWithLMHeadModel(config).save_pretrained(tmp_path / "model")
    asked = [
        "quantize",
        tmp_path / "model",
        "--bits",
        3.0,
        "--calibration",
        "demo",
        "--out",
        tmp_path / "out",
    ]
    for options in (["--method", "gptq", "--embeddings", 8], ["--method", "coded", "--code-embeddings"]):
        assert "this model is compressed as one block" in refused(*asked, *options)
