"""Reading: every way in which a folder can be unusable, found from headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import INDEX, SINGLE
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import locate


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).half()}, folder / "one.safetensors")
    save_file({"c": torch.zeros(5, dtype=torch.bfloat16)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_reads_shards_tensor_by_tensor(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == {"a": (2, 3), "b": (4,), "c": (5,)}
    assert checkpoint.nbytes == 6 * 4 + 4 * 2 + 5 * 2
    assert torch.equal(checkpoint.read("a"), torch.arange(6.0).view(2, 3))
    assert checkpoint.read("c").dtype == torch.bfloat16


def cut_short(folder: Path) -> None:
    data = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(data[:-3])


def cut_in_header(folder: Path) -> None:
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:5])


def drop_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()


def rename_shard(folder: Path) -> None:
    (folder / "two.safetensors").rename(folder / "three.safetensors")


def lose_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def point_outside(folder: Path) -> None:
    shutil.copy(folder / "two.safetensors", folder.parent / "two.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["c"] = "../two.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def pointer(folder: Path) -> None:
    (folder / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def pointed_config(folder: Path) -> None:
    pointer(folder)
    shutil.copy(folder / "two.safetensors", folder / "config.json")


def pickle_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def foreign_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "something else"}')


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": [1]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "one.safetensors is damaged or cut short"),
        (cut_in_header, "two.safetensors is damaged or cut short"),
        (drop_shard, "lacks the shard two.safetensors"),
        (rename_shard, "lacks the shard two.safetensors"),
        (lose_index, "was a file renamed or lost"),
        (point_outside, "outside the model folder"),
        (pointer, "two.safetensors is a pointer of Git LFS, not the weights: run `git lfs pull`"),
        (pointed_config, "json is a pointer of Git LFS, not the file"),
        (pickle_only, "pickle"),
        (no_weights, "has no weights"),
        (no_config, "no config.json"),
        (broken_config, "not readable JSON"),
        (foreign_config, "names no model_type"),
        (broken_index, "no weight_map"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_named_at_once(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, kind: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"fine": torch.ones(2), "broken.weight": torch.tensor([1.0, value])}, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("fine")
    with pytest.raises(CheckpointError, match=f"broken.weight in {SINGLE} contains {kind}"):
        checkpoint.read("broken.weight")


def test_names_that_are_no_model() -> None:
    with pytest.raises(CheckpointError, match=r"no folder \./nowhere"):
        locate("./nowhere")
    with pytest.raises(CheckpointError, match="no folder llama"):
        locate("llama")
    with pytest.raises(CheckpointError, match="is a file"):
        locate(__file__)


def test_what_counts_is_what_the_files_hold(sharded: Path) -> None:
    """An index may name a tensor that is nowhere, or another file for one, or forget one, as for transformers."""
    before = open_checkpoint(sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {"nowhere": "two.safetensors", "c": "one.safetensors"}
    del index["weight_map"]["a"]
    (sharded / INDEX).write_text(json.dumps(index))
    after = open_checkpoint(sharded)
    assert after.tensors == before.tensors
    assert torch.equal(after.read("c"), before.read("c"))
