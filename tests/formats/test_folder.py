"""Writing a folder: all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import OutputError
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats.folder import check_writable, output_folder
from llmsqueeze.journal.partial import OWNER
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
    stored = open_checkpoint(path)
    assert stored.nbytes == 3 * 4 + 2 * 4 + 2 * 2
    assert torch.equal(stored.read("view"), torch.tensor([2.0, 3.0]))


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
    assert json.loads((tmp_path / "out" / SIDECAR).read_text())["run"] == 1
    with output_folder(tmp_path / "out", shards=0, needed=0, overwrite=True) as output:
        output.write_json(SIDECAR, {"run": 2})
        output.finish()
    assert json.loads((tmp_path / "out" / SIDECAR).read_text())["run"] == 2
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


def written(path: Path, name: str, overwrite: bool = True) -> None:
    """A result that holds `name`."""
    with output_folder(path, shards=1, needed=0, overwrite=overwrite) as output:
        output.write_shard({name: torch.zeros(2)})
        output.write_json(SIDECAR, {"towers": [name]})
        output.finish()


def test_what_others_put_into_a_result_stays(tmp_path: Path) -> None:
    """Scores are of the weights that are replaced, and go with them."""
    out = tmp_path / "out"
    written(out, "first")
    (out / "notes").mkdir()
    (out / "notes" / "idea.txt").write_text("try 3 bits")
    (out / "notes" / "link").symlink_to("/nowhere")
    (out / "evaluation.json").write_text("{}")
    written(out, "second")
    assert json.loads((out / SIDECAR).read_text())["towers"] == ["second"]
    assert (out / "notes" / "idea.txt").read_text() == "try 3 bits"
    assert (out / "notes" / "link").readlink() == Path("/nowhere")
    assert not (out / "evaluation.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    written(out, "third")
    assert (out / "notes" / "idea.txt").exists(), "it is not taken for a file of ours the next time"


def test_a_link_to_a_result_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    written(real, "first")
    link.symlink_to(real)
    written(link, "second")
    assert link.is_symlink()
    assert json.loads((real / SIDECAR).read_text())["towers"] == ["second"]
    assert sorted(path.name for path in tmp_path.rglob("*") if not path.is_file()) == ["disk", "link", "real"]


def test_a_record_without_its_files_says_nothing_of_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out, "first")
    (out / SIDECAR).write_text("{}")
    (out / "vocab.json").write_text("{}")
    written(out, "second")
    assert not (out / "vocab.json").exists(), "as of a version that did not note what it wrote"
