"""A byte that changed after a folder was written is found: in tensors, headers and what config.json says of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmsqueeze
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import INDEX
from llmsqueeze.formats.check import check
from llmsqueeze.formats.inspection.damage import changed_config
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.tensors import shard

Compressed = Callable[[str], Path]
STORED = ["outliers", "coded", "portable"]


def flip(file: Path, at: int, bit: int = 0) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1 << bit]))


def data_begins(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("kind", STORED)
def test_every_flipped_byte_of_a_shard_is_found(kind: str, compressed: Compressed, tmp_path: Path) -> None:
    rng = random.Random(0)
    for original in shards(compressed(kind)):
        file = Path(shutil.copy(original, tmp_path))
        written = shard.read(original)
        size, begin = file.stat().st_size, data_begins(file)
        for at in [*range(0, begin, 1 + begin // 25), *range(begin, size, 1 + (size - begin) // 25), size - 1]:
            bit = rng.randrange(8)
            flip(file, at, bit)
            read = read_or_none(file)
            same = read is not None and read.keys() == written.keys()
            same = same and all(torch.equal(read[name], written[name]) for name in written)
            assert read is None or (same and at < begin), f"byte {at} of {file.name}, whose tensors begin at {begin}"
            flip(file, at, bit)


def read_or_none(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file; None if it is refused."""
    try:
        return shard.read(file)
    except CheckpointError:
        return None


@pytest.mark.parametrize("kind", [*STORED, "dense"])
def test_check_and_load_name_the_tensor_and_the_file(
    kind: str, compressed: Compressed, exported: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    source = exported("outliers", "dense")[0] if kind == "dense" else compressed(kind)
    folder = Path(shutil.copytree(source, tmp_path / "folder"))
    file = shards(folder)[1]
    header = json.loads(file.read_bytes()[8 : data_begins(file)])
    name = next(name for name, entry in header.items() if entry.get("data_offsets", [9])[0] == 0)
    flip(file, data_begins(file))
    wrong = f"{name} in {file} is not what was written"
    assert [error[: len(wrong)] for error in check(str(folder))["errors"]] == [wrong]
    with pytest.raises(CheckpointError) as raised:
        llmsqueeze.load(str(folder))
    assert wrong in str(raised.value)


def test_transformers_finds_it_in_a_native_folder(compressed: Compressed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(compressed("native"), tmp_path / "folder"))
    flip(shards(folder)[0], data_begins(shards(folder)[0]))
    with pytest.raises(CheckpointError, match="is not what was written"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", STORED)
def test_every_flipped_byte_of_a_config_is_found(kind: str, compressed: Compressed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed(kind), tmp_path / "folder"))
    config = folder / "config.json"
    text = config.read_bytes()
    for at in range(0, len(text), 1 + len(text) // 150):
        flip(config, at, 1)
        with suppress(CheckpointError):  # it is not JSON now
            assert changed_config(folder) is not None, f"byte {at}"
        flip(config, at, 1)
    assert changed_config(folder) is None


def test_other_groups_with_the_same_shapes_are_found(compressed: Compressed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed("native"), tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    for entry in config["quantization_config"]["weights"].values():
        if entry["shape"][1] % 64 == 0:
            entry["parts"][0]["group_size"] = entry["parts"][0]["group_size"] + 1
    (folder / "config.json").write_text(json.dumps(config))
    result = check(str(folder))
    assert not result["sound"]
    with pytest.raises(CheckpointError):
        llmsqueeze.load(str(folder))


def test_an_edited_config_is_a_note(compressed: Compressed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed("native"), tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    result = check(str(folder))
    assert result["sound"], result["errors"]
    assert any("config.json is not what was written" in note for note in result["notes"])


def test_a_folder_of_an_earlier_version_opens_and_check_cannot_tell(compressed: Compressed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed("outliers"), tmp_path / "folder"))
    for file in shards(folder):
        save_file(load_file(file), file, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["metadata"] = {"total_size": index["metadata"]["total_size"]}
    (folder / INDEX).write_text(json.dumps(index))
    result = check(str(folder))
    assert result["sound"], result["errors"]
    assert [note for note in result["notes"] if "cannot tell whether a byte changed" in note]
    assert llmsqueeze.load(str(folder)) is not None
    assert not open_checkpoint(folder).checksums


def test_a_writer_aligns_tensors_and_reads_them_one_by_one(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1, 2, 3], dtype=torch.uint8), "b": torch.tensor([0.5], dtype=torch.float64)}
    later = shard.Later((2,), torch.bfloat16, lambda: torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    shard.write(
        tmp_path / "one.safetensors", {**tensors, "c": later, "empty": torch.zeros(0, 3), "one": torch.tensor(4)}
    )
    read = shard.read(tmp_path / "one.safetensors")
    stock = load_file(tmp_path / "one.safetensors")
    assert read.keys() == stock.keys() == {"a", "b", "c", "empty", "one"}
    assert all(torch.equal(read[name], stock[name]) for name in read)
    assert torch.equal(read["c"], torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert torch.equal(read["a"], tensors["a"])
    assert int(read["one"]) == 4
