"""Reading: every way in which a folder can be unusable, found from headers. Writing: all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmsqueeze.errors import CheckpointError, OutputError
from llmsqueeze.files import INDEX, SIDECAR, SINGLE
from llmsqueeze.formats.folder import OWNER, check_writable, output_folder
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


def wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["c"] = "one.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


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
        (wrong_shard, "does not contain c"),
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


def test_output_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with output_folder(path, shards=2, needed=0) as output:
        output.write_shard({"a": torch.ones(3), "view": torch.arange(10.0)[2:4]})
        output.write_shard({"b": torch.zeros(2, dtype=torch.int16)})
        output.write_json("config.json", {"model_type": "llama"})
        output.finish()
        assert not path.exists()
        assert output.partial == tmp_path / "out.partial"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    written = open_checkpoint(path)
    assert written.nbytes == 3 * 4 + 2 * 4 + 2 * 2
    assert torch.equal(written.read("view"), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_when_it_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "out", shards=1, needed=0) as output:
            output.write_shard({"a": torch.ones(3)})
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_result(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", shards=0, needed=0) as output:
        output.write_json(SIDECAR, {"run": 1})
        output.finish()
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", shards=0, needed=0):
        raise RuntimeError
    assert json.loads((tmp_path / "out" / SIDECAR).read_text()) == {"run": 1}
    with output_folder(tmp_path / "out", shards=0, needed=0, overwrite=True) as output:
        output.write_json(SIDECAR, {"run": 2})
        output.finish()
    assert json.loads((tmp_path / "out" / SIDECAR).read_text()) == {"run": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    def meanwhile() -> None:
        with output_folder(tmp_path / "out", shards=0, needed=0) as output:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("kept")
            output.finish()

    with pytest.raises(OutputError, match="exists already"):
        meanwhile()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_a_partial_folder_in_the_way(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"

    def write() -> None:
        with output_folder(tmp_path / "out", shards=0, needed=0) as output:
            output.write_json(SIDECAR, {})
            output.finish()

    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="llmsqueeze did not write it"):
        write()
    assert (partial / "thesis.tex").exists()
    (partial / OWNER).write_text("1")  # the first process is always alive, and never this one
    with pytest.raises(OutputError, match=r"another run \(process 1\) is writing"):
        write()
    (partial / OWNER).write_text("4194999")  # beyond the largest process number: dead for certain
    write()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert OWNER not in [p.name for p in (tmp_path / "out").iterdir()]


def test_too_little_disk_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="GB are free"):
        output_folder(tmp_path / "out", 1, needed=10**18).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    def fill() -> None:
        with output_folder(tmp_path / "out", 1, needed=0):
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        fill()


def test_what_may_be_overwritten(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep", overwrite=False)
    ours, foreign, empty, file = (tmp_path / name for name in ("ours", "foreign", "empty", "file"))
    for folder in (ours, foreign, empty):
        folder.mkdir()
    (ours / SIDECAR).write_text("{}")
    (foreign / "thesis.tex").write_text("years of work")
    file.write_text("")
    with pytest.raises(OutputError, match="--overwrite"):
        check_writable(ours, overwrite=False)
    check_writable(ours, overwrite=True)
    check_writable(empty, overwrite=True)
    with pytest.raises(OutputError, match="not written by llmsqueeze"):
        check_writable(foreign, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        check_writable(file, overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        check_writable(file / "below", overwrite=False)
