"""Writing a folder: all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import OutputError
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats.folder import OWNER, check_writable, output_folder
from llmsqueeze.model.checkpoint import open_checkpoint


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


def test_a_shard_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written while the run goes on: the next step of the run tells, and nothing is left."""

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("llmsqueeze.formats.folder.shards.write", full)

    def run(steps: int) -> None:
        with output_folder(tmp_path / "out", shards=steps, needed=0) as output:
            for step in range(steps):
                output.write_shard({str(step): torch.ones(3)})
            output.finish()

    for steps in (1, 2):
        with pytest.raises(OutputError, match="No space left"):
            run(steps)
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
