"""Models of other tools: quantized already, or packed as compressed-tensors once did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import command, refused
from torch import Tensor

import llmsqueeze
from llmsqueeze.formats.check import check
from llmsqueeze.formats.entries import read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.imports import padded
from llmsqueeze.formats.opened import open_compressed
from llmsqueeze.parts import bitpack, sum_of_parts

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
