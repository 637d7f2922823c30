"""Exports to gguf-map: the plan in llama.cpp's words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import refused
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.errors import UnsupportedError
from llmsqueeze.formats.entries import read_entries
from llmsqueeze.formats.export import export
from llmsqueeze.formats.exports import gguf_map as gguf
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.recipe.resolve import make_recipe

Exported = Callable[..., tuple[Path, dict[str, Any]]]

# bits per weight of what llama.cpp makes of 256 columns, and of 32
LARGE = {
    "IQ1_M": 1.75,
    "IQ2_XXS": 2.0625,
    "IQ2_S": 2.5625,
    "Q2_K": 2.625,
    "IQ3_XXS": 3.0625,
    "Q3_K": 3.4375,
    "IQ4_XS": 4.25,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
}
SMALL = {"IQ4_NL": 4.5, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}


@given(
    st.floats(0.5, 20, allow_nan=False),
    st.sampled_from([32, 96, 128, 256, 384, 512, 4096, 11008, 100, 33]),
)
def test_the_type_is_the_nearest_in_bits(bits: float, cols: int) -> None:
    fitting = {"F16": 16.0}
    if cols % 32 == 0:
        fitting |= SMALL
    if cols % 256 == 0:
        fitting |= LARGE
    name, taken = gguf.nearest_type(bits, cols)
    assert taken == fitting[name], "with its true size, and only where its blocks divide the columns"
    assert abs(taken - bits) == min(abs(one - bits) for one in fitting.values())


def test_every_type_is_one_that_llama_cpp_has() -> None:
    kinds = {kind.name for kind in llama_cpp.GGMLQuantizationType}
    assert {*LARGE, *SMALL, "F16"} == {*gguf.TYPES, *gguf.SMALL_TYPES, gguf.WHOLE} <= kinds


def mapped(out: Path) -> dict[str, str]:
    """Tensor -> type, as `llama-quantize --tensor-type-file` reads the file: split at white space, then at =."""
    types: dict[str, str] = {}
    for pair in (out / "tensor-types.txt").read_text().split():
        pattern, _, kind = pair.partition("=")
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
        assert re.search(pattern, name)
        assert name not in types, "named once"
        types[name] = kind
    return types


LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def test_every_linear_is_named_once(adaptable: Path, exported: Exported) -> None:
    folder, summary = exported("adaptable", "gguf-map")
    types = mapped(folder)
    table = llama_cpp.get_tensor_name_map(llama_cpp.MODEL_ARCH.LLAMA, 2)
    checkpoint = open_checkpoint(adaptable)
    taken = stored = numel = 0.0
    for linear, entry in read_entries(checkpoint).items():
        _, _, block, rest = linear.split(".", 3)
        name = f"blk.{block}.{LLAMA_NAMES[rest]}.weight"
        assert f"{table.get_name(linear)}.weight" == name
        weights = entry.shape[0] * entry.shape[1]
        bits = 8 * sum(checkpoint.tensors[tensor].nbytes for tensor in entry.tensors) / weights
        nearest = min(SMALL, key=lambda kind: abs(SMALL[kind] - bits))  # 128 and 384 columns
        assert types.pop(name) == nearest.lower()
        taken, stored, numel = taken + SMALL[nearest] * weights, stored + bits * weights, numel + weights
    assert types == {}, "and nothing else"
    assert summary["bits_per_weight"] == round(taken / numel, 4)
    assert summary["bits_per_weight_before"] == round(stored / numel, 4)
    assert sum(summary["types"].values()) == 14
    assert {path.name for path in folder.iterdir()} == {
        "tensor-types.txt",
        "quantize.sh",
        "llmsqueeze.json",
    }


def test_the_script_calls_llama_cpp_with_its_own_options(exported: Exported, tmp_path: Path) -> None:
    """Run by a shell, with programs that only print their arguments."""
    folder, summary = exported("adaptable", "gguf-map")
    (tmp_path / "bin").mkdir()
    for program in ("python", "llama-imatrix", "llama-quantize"):
        prints = f'#!/bin/sh\nfor word in {program} "$@"; do printf "%s " "$word"; done; echo\n'
        (tmp_path / "bin" / program).write_text(prints)
        (tmp_path / "bin" / program).chmod(0o755)
    called: dict[str, Any] = {"env": {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, "cwd": folder}
    for arguments, model in (((), "demo-2"), (("/some where/else",), "/some where/else")):
        command = ["sh", "quantize.sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, **called)
        convert, imatrix, quantized = (line.strip() for line in done.stdout.splitlines())
        assert convert == f"python convert_hf_to_gguf.py {model} --outtype f16 --outfile original.gguf"
        assert imatrix == summary["commands"][1]
        assert quantized == summary["commands"][2].replace("tensor-types", "./tensor-types"), "beside the script"
    assert "--tensor-type-file tensor-types.txt" in summary["commands"][2]
    assert summary["commands"][2].endswith("original.gguf model.gguf Q4_K_M")


def random_folder(config: Any, folder: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_k_types_go_where_their_blocks_fit(tmp_path: Path) -> None:
    """256 columns but for the gate and the way up and down through 384."""
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
    original = random_folder(LlamaConfig(**shape, vocab_size=96, max_position_embeddings=32), tmp_path / "in")
    recipe = make_recipe({"method": "rtn", "bits": 4, "group_size": 32})  # and 16 bits of scale: 4.5
    quantize(str(original), recipe, tmp_path / "out", verify=False)
    export(str(tmp_path / "out"), "gguf-map", tmp_path / "map")
    kinds = {name.split(".")[2]: kind for name, kind in mapped(tmp_path / "map").items()}
    narrow = kinds.pop("ffn_down")
    assert narrow.upper() in SMALL
    assert {kind.upper() for kind in kinds.values()} <= set(LARGE)


def test_linears_that_are_not_compressed_stay_whole(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """llama.cpp gives a tensor that the map does not name the type of the command, Q4_K_M."""
    quantize(
        str(demo_of(2)), make_recipe({"method": "rtn", "bits": 3, "skip": ["down_proj"]}), tmp_path / "in", verify=False
    )
    export(str(tmp_path / "in"), "gguf-map", tmp_path / "map")
    kinds = {name: kind for name, kind in mapped(tmp_path / "map").items() if "ffn_down" in name}
    assert kinds == {f"blk.{i}.ffn_down.weight": "f16" for i in range(2)}


@pytest.mark.parametrize("architecture", ["llama-bias", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_names_of_other_architectures(architecture: str, random_model: Callable[..., Path]) -> None:
    skeleton = build_skeleton(open_checkpoint(random_model(architecture)))
    linears = [name for block in skeleton.linears for name in block]
    mapped_names = gguf.tensor_names(skeleton.model.config.model_type, len(skeleton.blocks), linears)
    for linear, name in mapped_names.items():
        _, _, block, rest = linear.split(".", 3)
        assert name == f"blk.{block}.{LLAMA_NAMES[rest]}.weight"


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gpt2", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
        ("neox", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ],
)
def test_names_of_fused_projections(architecture: str, names: set[str], random_model: Callable[..., Path]) -> None:
    skeleton = build_skeleton(open_checkpoint(random_model(architecture)))
    linears = [name for block in skeleton.linears for name in block]
    mapped_names = gguf.tensor_names(skeleton.model.config.model_type, len(skeleton.blocks), linears)
    assert set(mapped_names.values()) == {f"blk.{i}.{name}.weight" for i in range(3) for name in names}


def test_an_architecture_that_llama_cpp_lacks_is_one_error(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OPTConfig(**shape, vocab_size=96, word_embed_proj_dim=64, max_position_embeddings=32)
    original = random_folder(config, tmp_path / "in")
    quantize(str(original), make_recipe({"method": "rtn", "bits": 4, "group_size": 16}), tmp_path / "out", verify=False)
    (tmp_path / "there").mkdir()
    arguments = ["export", tmp_path / "out", "--to", "gguf-map", "--out", tmp_path / "there" / "map", "-q"]
    assert "llama.cpp has no architecture opt" in refused(*arguments)
    assert list((tmp_path / "there").iterdir()) == []


def test_without_the_package_one_error_names_it(
    adaptable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = ["export", adaptable, "--to", "gguf-map", "--out", tmp_path / "map", "-q"]
    assert "pip install 'llmsqueeze[gguf]'" in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_linear_without_a_counterpart_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.mystery has no counterpart in llama\.cpp's"):
        gguf.tensor_names("llama", 2, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.mystery"])
