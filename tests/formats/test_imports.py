"""Models of other tools: quantized already, or packed as compressed-tensors once did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from support import command, refused, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmsqueeze
from llmsqueeze.formats.check import check
from llmsqueeze.formats.entries import read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.imports import padded
from llmsqueeze.formats.imports.quantized import dense_folder
from llmsqueeze.formats.opened import open_compressed
from llmsqueeze.parts import bitpack, sum_of_parts
from llmsqueeze.progress import Progress

RTN = ["--method", "rtn", "--bits", 8, "--group-size", 64]


def weights(folder: Path) -> dict[str, Tensor]:
    model = llmsqueeze.load(str(folder), dtype=torch.float32)
    return dict((model.dequantize() if getattr(model, "hf_quantizer", None) else model).state_dict())


@pytest.mark.parametrize("kind", ["portable", "native", "coded"])
def test_a_quantized_model_is_taken_if_the_user_says_so(
    kind: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its dense weights are rounded again; the folder that holds them meanwhile is removed."""
    folder = compressed(kind)
    message = refused("quantize", folder, *RTN, "--out", tmp_path / "out")
    assert "--from-quantized" in message
    code, _, stderr = command("quantize", folder, *RTN, "--from-quantized", "--out", tmp_path / "out")
    assert code == 0, stderr
    assert "is quantized" in stderr
    assert "stays lost" in " ".join(stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name] - tensor).norm() <= 0.01 * tensor.norm(), name
    record = json.loads((tmp_path / "out" / "llmsqueeze.json").read_text())
    assert record["model"] == folder.name
    assert record["read_from"].startswith("compressed-tensors" if kind == "portable" else "llmsqueeze")


def test_what_lies_where_the_dense_weights_are_to_lie_stays(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out.original").mkdir()
    (tmp_path / "out.original" / "mine").write_text("mine")
    message = refused("quantize", compressed("native"), *RTN, "--from-quantized", "--out", tmp_path / "out")
    assert "out.original exists already" in message
    assert (tmp_path / "out.original" / "mine").read_text() == "mine"


def test_what_was_written_meanwhile_is_removed_after_an_error_too(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    """A text that is not there is told before."""
    options = ["--method", "gptq", "--from-quantized", "--out", tmp_path / "out", "--calibration"]
    (tmp_path / "empty.txt").write_text("")
    message = refused("quantize", compressed("native"), *options, tmp_path / "empty.txt")
    assert "empty.txt is empty" in message
    assert "is quantized (" in message
    message = refused("quantize", compressed("native"), *options, "nothing.txt")
    assert "no text file" in message
    assert "is quantized (" not in message
    assert [file.name for file in tmp_path.iterdir()] == ["empty.txt"]


def test_a_model_that_is_not_quantized_needs_no_such_option(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    message = refused("quantize", demo_of(1), *RTN, "--from-quantized", "--out", tmp_path / "out")
    assert "is not quantized; leave the option out" in message


BLOCK = 32  # of fp8: rows and columns that share a scale


def in_blocks(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As fine-grained fp8 stores a weight: its tensors by what their names end with, and what it is then."""
    rows, cols = weight.shape
    tiles = weight.float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scale[:, None, :, None]).reshape(rows, cols)
    return {"weight": codes.reshape(rows, cols), "weight_scale_inv": scale}, dense


def by_rows(dtype: torch.dtype, largest: float, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors stores a weight of 8 bits with a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / largest).to(weight.dtype)
    scaled = weight.float() / scale.float()
    codes = (scaled if dtype.is_floating_point else scaled.round().clamp(-largest, largest)).to(dtype)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def naive(form: str, kind: str) -> dict[str, Any]:
    """A config of compressed-tensors for 8 bits of weights and of inputs."""
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": weights | {"strategy": "token", "dynamic": True},
    }
    about = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return about | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
BY_HAND: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]]] = {
    "fp8": (FP8, in_blocks),
    "compressed-tensors fp8": (naive("float-quantized", "float"), partial(by_rows, torch.float8_e4m3fn, 448)),
    "compressed-tensors int8": (naive("int-quantized", "int"), partial(by_rows, torch.int8, 127)),
}


def stored(folder: Path, out: Path, kind: str) -> dict[str, Tensor]:
    """Writes the model as another tool stores it; what its linears are then."""
    about, store = BY_HAND[kind]
    shutil.copytree(folder, out)
    write_config(out, about)
    file = out / "model.safetensors"
    tensors, dense = load_file(file), {}
    linears = [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]
    for name in [name for name in linears if not name.endswith(".gate.weight")]:  # of routers, which tools leave
        parts, dense[name] = store(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return dense


def write_config(folder: Path, about: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))


def assert_taken(folder: Path, dense: dict[str, Tensor], out: Path) -> None:
    """The folder is made dense, and rounded to 8 bits."""
    code, _, stderr = command("quantize", folder, *RTN, "--from-quantized", "--no-verify", "--out", out)
    assert code == 0, stderr
    after = weights(out)
    assert dense
    for name, tensor in dense.items():
        assert (after[name] - tensor).norm() <= 0.01 * tensor.norm(), name


@pytest.mark.parametrize("kind", BY_HAND)
def test_models_of_8_bits_of_other_tools(kind: str, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    assert_taken(tmp_path / "in", stored(demo_of(1), tmp_path / "in", kind), tmp_path / "out")
    assert "--from-quantized" in refused("quantize", tmp_path / "in", *RTN, "--out", tmp_path / "again")


def test_experts_of_fp8_are_written_one_by_one(
    mixture: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    """As the files had them; transformers stack them while they are read."""
    dense = stored(mixture("mixtral")[0], tmp_path / "in", "fp8")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in dense
    dense_folder(tmp_path / "in", tmp_path / "out", False, Progress())
    written = tensors_of(tmp_path / "out")
    for name, tensor in dense.items():
        assert (written[name].float() - tensor).norm() <= 0.004 * tensor.norm(), name


@pytest.mark.parametrize("bits", [4, 8])
def test_models_of_bitsandbytes(bits: int, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    """Against bitsandbytes' own values, or the codes and scales of the file."""
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(demo_of(1), quantization_config=how, device_map="cpu")
    model.save_pretrained(tmp_path / "in")
    for file in demo_of(1).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "in")
    linears = {
        name: module for name, module in model.named_modules() if ".layers." in name and hasattr(module, "weight")
    }
    linears = {name: module for name, module in linears.items() if module.weight.dtype in (torch.uint8, torch.int8)}
    assert len(linears) == 7
    if bits == 4:
        dense = {n: dequantize_4bit(m.weight.data, m.weight.quant_state).float() for n, m in linears.items()}
    else:
        file = load_file(tmp_path / "in" / "model.safetensors")
        dense = {n: file[f"{n}.weight"].float() * file[f"{n}.SCB"][:, None] / 127 for n in linears}
    assert_taken(tmp_path / "in", {f"{name}.weight": value for name, value in dense.items()}, tmp_path / "out")


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_what_transformers_cannot_open_is_one_line(
    method: str, package: str, demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without the packages that they need."""
    for name in ("is_optimum_available", "is_gptqmodel_available"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_{method}.{name}", lambda: False, raising=False)
    shutil.copytree(demo_of(1), tmp_path / "in")
    write_config(tmp_path / "in", {"quant_method": method, "bits": 4, "group_size": 64})
    message = refused("quantize", tmp_path / "in", *RTN, "--from-quantized", "--out", tmp_path / "out")
    assert "transformers cannot open" in message
    assert package in message
    assert "start from the original weights" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_codes_that_lie_padded() -> None:
    """Against a slow twin: one code after the other."""
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        codes = torch.randint(0, 1 << bits, (3, 50), generator=generator)
        per = 32 // bits
        packed = torch.zeros(3, padded.padded_words(50, bits), dtype=torch.int64)
        for row in range(3):
            for i in range(50):
                packed[row, i // per] |= int(codes[row, i]) << (i % per * bits)
        words = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
        dense = padded.unpadded(words, bits, 50)
        assert torch.equal(bitpack.unpack(dense, bits, 50).long(), codes)
        assert torch.equal(dense, bitpack.pack(codes, bits))


@pytest.fixture(scope="module")
def old(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A portable folder of 3 bits, and the same as compressed-tensors 0.17 has it: padded, one target for all."""
    root = tmp_path_factory.mktemp("old")
    code, _, stderr = command(
        "quantize", demo_of(2), "--method", "rtn", "--bits", 3, "--group-size", 64, "--out", root / "new"
    )
    assert code == 0, stderr
    shutil.copytree(root / "new", root / "old")
    (root / "old" / "llmsqueeze.json").unlink()
    for file in (root / "old").glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            _, cols = tensors[name.replace("packed", "shape")].tolist()
            tensors[name] = packed_padded(bitpack.unpack(tensors[name], 3, cols))
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((root / "old" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    group["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ["re:.*lm_head"]
    (root / "old" / "config.json").write_text(json.dumps(config))
    index = json.loads((root / "old" / "model.safetensors.index.json").read_text())
    index["metadata"] = {}  # others write no checksums
    (root / "old" / "model.safetensors.index.json").write_text(json.dumps(index))
    return root / "new", root / "old"


def packed_padded(codes: Tensor) -> Tensor:
    """uint8 [rows, cols] of 3 bits, ten to a word."""
    padding = -codes.shape[1] % 10
    groups = torch.nn.functional.pad(codes, (0, padding)).long().unflatten(1, (-1, 10))
    return (groups << (3 * torch.arange(10))).sum(-1).to(torch.int32)


def test_the_old_packing_is_recognised_and_read_right(old: tuple[Path, Path], tmp_path: Path) -> None:
    new, folder = old
    found = check(str(folder))
    assert found["errors"] == []
    assert "up to 0.17" in found["verdicts"]["transformers"]
    assert any("export --to compressed-tensors" in note for note in found["notes"])
    dense = {}
    for path in old:
        opened = open_compressed(str(path), "", False)
        dense[path] = {
            name: sum_of_parts(read_parts(opened.checkpoint, entry)) for name, entry in opened.entries.items()
        }
    assert dense[new].keys() == dense[folder].keys()
    assert all(torch.equal(dense[new][name], dense[folder][name]) for name in dense[new])
    assert "export" in refused("generate", folder, "Once")
    export(str(folder), "compressed-tensors", tmp_path / "again")
    first, second = (weights(path) for path in (new, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
