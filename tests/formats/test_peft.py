"""Exports that are not the whole model: a LoRA adapter beside a portable base, and a plan in llama.cpp's words."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as llama_cpp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig
from typer.testing import CliRunner

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.cli.app import app
from llmsqueeze.compress import weight
from llmsqueeze.compress.blocks import quantize
from llmsqueeze.compress.decide import Decision
from llmsqueeze.compress.job import prepare
from llmsqueeze.errors import RecipeError, UnsupportedError, VerificationError
from llmsqueeze.formats import export as exporting
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.exports import gguf, peft
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import Source
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.parts import LowRank
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe

LORC = {"method": "rtn", "bits": 3, "group_size": 64, "lorc_rank": 2, "lorc": "plain"}
# stands where llmsqueeze would be found, so that importing it fails; then base alone, and with each adapter
STOCK = """
import sys, json
sys.modules["llmsqueeze"] = None
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, tokens, made, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokens = torch.tensor(json.loads(tokens))
with torch.no_grad():
    logits = [model(input_ids=tokens).logits]
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for i, adapter in enumerate(adapters):
        if i:
            model.load_adapter(adapter, adapter_name=str(i))
        model.set_adapter(str(i))
        logits.append(model(input_ids=tokens).logits)
torch.save(logits, made)
"""


def dropped(name: str) -> bool:
    """Whether the fixture has it that compensation does not help a linear."""
    return name.endswith("k_proj")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With factors of rank 1 to 10, none for the value projections, and dropped ones for the key projections."""
    recipe = make_recipe(LORC)
    job = prepare(Source("demo"), recipe, Progress())
    ranks = itertools.cycle(range(1, 11))
    weights = {
        name: replace(w, rank=0 if name.endswith("v_proj") else next(ranks)) for name, w in job.plan.weights.items()
    }
    compensation = weight.compensation

    def some(target: Tensor, made: Any, planned: WeightPlan, *rest: Any) -> Any:
        return [] if dropped(planned.name) else compensation(target, made, planned, *rest)

    out = tmp_path_factory.mktemp("native") / "native"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weight, "compensation", some)
        quantize("demo", recipe, out, decided=Decision(Plan(weights)))
    return out


@pytest.fixture(scope="module")
def adapted(native: Path) -> tuple[Path, dict[str, Any]]:
    out = native.with_name("adapted")
    return out, export(str(native), "peft", out)


@pytest.fixture(scope="module")
def factors(native: Path) -> dict[str, LowRank]:
    """linear -> its low-rank part, from the native folder."""
    checkpoint = open_checkpoint(native)
    held = {name: read_parts(checkpoint, entry) for name, entry in read_entries(checkpoint).items()}
    return {name: part for name, made in held.items() for part in made if isinstance(part, LowRank)}


def adapter_of(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return config, load_file(out / "adapter" / "adapter_model.safetensors")


def tokens() -> Tensor:
    return torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))


def empty(folder: Path) -> bool:
    return list(folder.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- the adapter


def test_stock_transformers_and_peft_compute_what_the_parts_do(
    native: Path, adapted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = adapted
    export(str(native), "peft", tmp_path / "bf16", dtype="bf16")
    adapters = [str(folder / "adapter") for folder in (out, tmp_path / "bf16")]
    made = tmp_path / "logits.pt"
    arguments = [str(out / "base"), json.dumps(tokens().tolist()), str(made), *adapters]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, capture_output=True, cwd=tmp_path)
    alone, with_adapter, with_bf16 = torch.load(made)
    with torch.no_grad():
        expected = llmsqueeze.load(str(native), dtype=torch.float32)(input_ids=tokens()).logits
    assert torch.allclose(with_adapter, expected, atol=1e-4)
    missing = float((alone - expected).abs().max())
    assert missing > 0.1, "the adapter is what makes the difference"
    assert 0 < float((with_bf16 - expected).abs().max()) < 0.05 * missing


def test_the_adapters_products_are_the_factors(
    adapted: tuple[Path, dict[str, Any]], factors: dict[str, LowRank], tmp_path: Path
) -> None:
    """Filled up with zeros to one rank; linears without factors, planned so or dropped, are no targets."""
    out, summary = adapted
    assert {len(part.scale) for part in factors.values()} == set(range(1, 11)), "of many ranks"
    assert not any(name.endswith(("v_proj", "k_proj")) for name in factors)
    config, tensors = adapter_of(out)
    assert sorted(config["target_modules"]) == sorted(factors)
    assert config["r"] == config["lora_alpha"] == summary["rank"] == 16
    assert config["base_model_name_or_path"] == f"{out.name}/base"
    assert summary["adapted"] == len(factors) == 20
    prefix = "base_model.model."
    named = {f"{prefix}{name}.lora_{side}.weight" for name in factors for side in "AB"}
    assert set(tensors) == named
    for name, part in factors.items():
        a, b = (tensors[f"{prefix}{name}.lora_{side}.weight"] for side in "AB")
        rows, cols = part.left.shape[0], part.right.shape[1]
        assert (a.shape, b.shape) == ((16, cols), (rows, 16))
        assert a.dtype == b.dtype == torch.float32
        rank = len(part.scale)
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        # column by column, from the 8-bit codes
        slow = torch.zeros(rows, cols, dtype=torch.float64)
        for k in range(rank):
            scale = float(part.scale[k]) / 127**2
            slow += torch.outer(part.left[:, k].double(), part.right[k].double()) * scale
        assert torch.allclose(b.double() @ a.double(), slow, rtol=0, atol=1e-6 * float(slow.abs().max()))
    assert summary["adapter_nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    base = open_checkpoint(out / "base")
    assert summary["nbytes"] == base.nbytes + summary["adapter_nbytes"]
    assert json.loads((out / "llmsqueeze.json").read_text())["format"] == "peft"


def test_the_base_holds_everything_else(native: Path, adapted: tuple[Path, dict[str, Any]]) -> None:
    out, summary = adapted
    assert {path.name for path in out.iterdir()} == {"base", "adapter", "llmsqueeze.json"}
    assert not any(summary["opens"].values()), "the base opens everywhere"
    before, after = open_checkpoint(native), open_checkpoint(out / "base")
    assert after.config["quantization_config"]["quant_method"] == "compressed-tensors"
    entries = read_entries(after)
    for name, entry in read_entries(before).items():
        without = [part for part in read_parts(before, entry) if not isinstance(part, LowRank)]
        assert torch.equal(parts.sum_of_parts(without), parts.sum_of_parts(read_parts(after, entries[name])))
    kept = [name for name in before.tensors if ".parts." not in name]
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)


def test_adapters_in_half_the_bytes(native: Path, adapted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    summary = export(str(native), "peft", tmp_path / "out", dtype="bf16")
    whole = adapter_of(adapted[0])[1]
    half = adapter_of(tmp_path / "out")[1]
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert summary["adapter_nbytes"] * 2 == adapted[1]["adapter_nbytes"]


@pytest.mark.parametrize(
    ("rank", "padded"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128)],
)
def test_ranks_are_those_that_servers_accept(rank: int, padded: int) -> None:
    assert peft.adapter_rank({"small": 1, "large": rank}) == padded
    made = LowRank(
        torch.randint(-9, 9, (6, rank), dtype=torch.int8),
        torch.randint(-9, 9, (rank, 5), dtype=torch.int8),
        torch.rand(rank).bfloat16(),
    )
    held = peft.adapter_tensors("x", made, padded, torch.float32)
    a, b = (held[f"base_model.model.x.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((padded, 5), (6, padded))
    assert torch.allclose(b @ a, made.dense(), rtol=1e-4, atol=1e-6)


def test_a_rank_above_what_servers_accept_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the factors of big have rank 129; servers accept"):
        peft.adapter_rank({"small": 1, "big": 129})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "rtn", "bits": 3}, "holds no low-rank parts, so there is nothing to adapt"),
    (
        {**LORC, "method": "gwq", "quantizer": "rtn", "outlier_ranking": "magnitude"},
        "holds outliers, which compressed-tensors cannot represent",
    ),
    ({**LORC, "symmetric": False}, "holds zeros"),
]


@pytest.mark.parametrize(("recipe", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_has_no_adapter_is_refused(recipe: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    quantize("demo", make_recipe(recipe), tmp_path / "in", verify=False)
    with pytest.raises(UnsupportedError, match=said) as refusal:
        export(str(tmp_path / "in"), "peft", tmp_path / "there" / "out")
    assert str(tmp_path / "in") in str(refusal.value)
    assert empty(tmp_path / "there"), "nothing is left behind"


def test_an_interrupted_export_leaves_nothing(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.peft, "adapter_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(str(native), "peft", tmp_path / "out")
    assert empty(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_a_corrupt_adapter_is_found(damage: str, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disk had not kept what was written; then it does not get its name."""
    spoilt = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"

    def spoils(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        held = {name: tensor.clone() for name, tensor in tensors.items()}
        if damage == "lost":
            del held[spoilt]
        else:
            held[spoilt].view(-1).view(torch.int32)[5] ^= 1
        save_file(held, file, metadata)

    monkeypatch.setattr(exporting, "save_file", spoils)
    with pytest.raises(VerificationError, match=re.escape(spoilt)):
        export(str(native), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_serve_it(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    arguments = ["export", str(native), "--to", "peft", "--dtype", "bf16", "--out", str(out), "-q"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["command"] == (
        f"vllm serve '{out}/base' --enable-lora --max-lora-rank 16 --lora-modules 'lorc={out}/adapter'"
    )
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my out"]
    with pytest.raises(RecipeError, match="--dtype bf16 applies to --to dense and --to peft"):
        export(str(native), "gguf-map", tmp_path / "map", dtype="bf16")


# --------------------------------------------------------------------------------------------------- llama.cpp's map

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
    known = {kind.name for kind in llama_cpp.GGMLQuantizationType}
    assert {*LARGE, *SMALL, "F16"} == {*gguf.TYPES, *gguf.SMALL_TYPES, gguf.WHOLE} <= known


def mapped(out: Path) -> dict[str, str]:
    """Tensor -> type, as `llama-quantize --tensor-type-file` reads the file: split at white space, then at =."""
    found: dict[str, str] = {}
    for pair in (out / "tensor-types.txt").read_text().split():
        pattern, _, kind = pair.partition("=")
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
        assert re.search(pattern, name)
        assert name not in found, "named once"
        found[name] = kind
    return found


LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def test_every_linear_is_named_once(native: Path, tmp_path: Path) -> None:
    summary = export(str(native), "gguf-map", tmp_path / "map")
    found = mapped(tmp_path / "map")
    table = llama_cpp.get_tensor_name_map(llama_cpp.MODEL_ARCH.LLAMA, 4)
    checkpoint = open_checkpoint(native)
    spent = wanted = numel = 0.0
    for linear, entry in read_entries(checkpoint).items():
        _, _, block, rest = linear.split(".", 3)
        name = f"blk.{block}.{LLAMA_NAMES[rest]}.weight"
        assert f"{table.get_name(linear)}.weight" == name
        weights = entry.shape[0] * entry.shape[1]
        bits = 8 * sum(checkpoint.tensors[tensor].nbytes for tensor in entry.tensors) / weights
        nearest = min(SMALL, key=lambda kind: abs(SMALL[kind] - bits))  # 128 and 384 columns
        assert found.pop(name) == nearest.lower()
        spent, wanted, numel = spent + SMALL[nearest] * weights, wanted + bits * weights, numel + weights
    assert found == {}, "and nothing else"
    assert summary["bits_per_weight"] == round(spent / numel, 4)
    assert summary["bits_per_weight_before"] == round(wanted / numel, 4)
    assert sum(summary["types"].values()) == 28
    assert {path.name for path in (tmp_path / "map").iterdir()} == {
        "tensor-types.txt",
        "quantize.sh",
        "llmsqueeze.json",
    }


def test_the_script_is_what_llama_cpp_wants(native: Path, tmp_path: Path) -> None:
    """Run by a shell, with programs that only say how they were called."""
    summary = export(str(native), "gguf-map", tmp_path / "map")
    (tmp_path / "bin").mkdir()
    for program in ("python", "llama-imatrix", "llama-quantize"):
        said = f'#!/bin/sh\nfor word in {program} "$@"; do printf "%s " "$word"; done; echo\n'
        (tmp_path / "bin" / program).write_text(said)
        (tmp_path / "bin" / program).chmod(0o755)
    called: dict[str, Any] = {"env": {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}, "cwd": tmp_path / "map"}
    for arguments, model in (((), "demo"), (("/some where/else",), "/some where/else")):
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


def test_linears_left_alone_stay_whole_in_llama_cpp_too(tmp_path: Path) -> None:
    """What the map does not name gets the type of the command, Q4_K_M."""
    quantize("demo", make_recipe({"method": "rtn", "bits": 3, "skip": ["down_proj"]}), tmp_path / "in", verify=False)
    export(str(tmp_path / "in"), "gguf-map", tmp_path / "map")
    kinds = {name: kind for name, kind in mapped(tmp_path / "map").items() if "ffn_down" in name}
    assert kinds == {f"blk.{i}.ffn_down.weight": "f16" for i in range(4)}


@pytest.mark.parametrize("architecture", ["llama-bias", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_names_of_other_architectures(architecture: str, random_model: Callable[..., Path]) -> None:
    skeleton = build_skeleton(open_checkpoint(random_model(architecture)))
    linears = [name for block in skeleton.linears for name in block]
    found = gguf.tensor_names(skeleton.model.config.model_type, len(skeleton.blocks), linears)
    for linear, name in found.items():
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
    found = gguf.tensor_names(skeleton.model.config.model_type, len(skeleton.blocks), linears)
    assert set(found.values()) == {f"blk.{i}.{name}.weight" for i in range(3) for name in names}


def refused(*arguments: object) -> str:
    """stderr of a call that must end with code 2, one line, and no traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr.strip()


def test_an_architecture_that_llama_cpp_lacks_is_one_error(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = OPTConfig(**shape, vocab_size=96, word_embed_proj_dim=64, max_position_embeddings=32)
    original = random_folder(config, tmp_path / "in")
    quantize(str(original), make_recipe({"method": "rtn", "bits": 4, "group_size": 16}), tmp_path / "out", verify=False)
    (tmp_path / "there").mkdir()
    arguments = ["export", tmp_path / "out", "--to", "gguf-map", "--out", tmp_path / "there" / "map", "-q"]
    assert "llama.cpp has no architecture opt" in refused(*arguments)
    assert empty(tmp_path / "there")


def test_without_the_package_one_error_names_it(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = ["export", native, "--to", "gguf-map", "--out", tmp_path / "map", "-q"]
    assert "pip install 'llmsqueeze[gguf]'" in refused(*arguments)
    assert empty(tmp_path)


def test_a_linear_without_a_counterpart_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.mystery has no counterpart in llama\.cpp's"):
        gguf.tensor_names("llama", 2, ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.mystery"])
