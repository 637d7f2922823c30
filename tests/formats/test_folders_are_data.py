"""Nothing in a folder is followed out of it, written through, or made by its numbers before these are checked."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmsqueeze
from llmsqueeze.compress.forecast import trial
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.files import TEMPLATES, read_json, read_yaml, write_json
from llmsqueeze.formats.exports import gguf_map as gguf
from llmsqueeze.formats.exports.peft import how_to_load
from llmsqueeze.formats.inspection import beside
from llmsqueeze.formats.inspection.beside import copy, files_beside
from llmsqueeze.model.config import empty_model, load_config
from llmsqueeze.model.original import Source


def test_a_result_is_not_written_through_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("mine")
    for name in ("evaluation.json", "evaluation.half"):
        (tmp_path / name).symlink_to(other)
    write_json(tmp_path / "evaluation.json", {"a": 1})
    assert other.read_text() == "mine"
    assert read_json(tmp_path / "evaluation.json") == {"a": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / TEMPLATES).mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / TEMPLATES / "tool.jinja").write_text("x")
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_what_is_copied_is_known_before_and_bounded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files_beside(model) == {"tokenizer.json": 2, f"{TEMPLATES}/tool.jinja": 1}
    (tmp_path / "out").mkdir()
    copy(model, tmp_path / "out")
    assert sorted(one.name for one in (tmp_path / "out").rglob("*.j*")) == ["tokenizer.json", "tool.jinja"]
    monkeypatch.setattr(beside, "MOST", 2)
    with pytest.raises(CheckpointError, match=r"take 3 bytes, .* the largest is tokenizer\.json with 2"):
        files_beside(model)


def test_links_out_of_the_folder_or_upwards_are_not_copied(model: Path, tmp_path: Path) -> None:
    (model / TEMPLATES / "up").symlink_to(model)
    assert len(files_beside(model)) == 2, "no folder in it is followed"
    (tmp_path / "secret.txt").write_text("key")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        files_beside(model)


def test_links_inside_the_hubs_cache_are_copied(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert files_beside(snapshot) == {"tokenizer.json": 2}


def test_a_pointer_of_git_is_no_tokenizer(tmp_path: Path) -> None:
    for name in ("picture.png", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="json is a pointer of Git LFS, not the file: run `git lfs pull`"):
        files_beside(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert list(files_beside(tmp_path)) == ["picture.png"], "it harms nobody"


def test_the_name_of_a_model_is_text_in_a_script(tmp_path: Path) -> None:
    """`sh -n` parses it, and the shell sees the name as it is."""
    name = """a"; echo '$(echo b)`echo c`"""
    script = tmp_path / "quantize.sh"
    script.write_text(gguf.script(name).replace("python convert_hf_to_gguf.py", "printf %s"))
    first = script.read_text().split("--outtype")[0].replace("set -e", "")
    assert subprocess.run(["sh", "-c", first], capture_output=True, text=True, check=True).stdout == name
    assert shlex.split(gguf.commands(name)[0])[2] == name
    assert repr('x")\nimport os') in how_to_load('x")\nimport os', "b")


def test_the_trial_does_not_import_from_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        raise OSError("no")

    monkeypatch.setattr(subprocess, "run", run)
    job: Any = type("Job", (), {"source": Source("m"), "device": "cpu"})
    from llmsqueeze.progress import Progress

    assert trial.run_trial(job, Path("plan.yaml"), Progress()) == {}, "what fails is a note"
    assert started[0][1:3] == ["-P", "-c"]
    assert started[0][4] == str(Path(llmsqueeze.__file__).resolve().parents[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 1000 fits"),
        ({"vocab_size": 10**10}, "far larger than its files"),
        ({"intermediate_size": 10**9}, "far larger than its files"),
        ({"vocab_size": 10**20}, "vocab_size is 1"),
    ],
)
def test_numbers_are_checked_before_anything_is_made_by_them(
    demo_of: Callable[[int], Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = Path(shutil.copytree(demo_of(1), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason):
        empty_model(folder, load_config(folder))


@pytest.mark.thorough
def test_deep_and_doubled_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "recipe.yaml").write_text("a: &x [1]\nb: [*x, *x]\n")
    with pytest.raises(RecipeError, match="has an alias"):
        read_yaml(tmp_path / "recipe.yaml", "recipe file")
    (tmp_path / "recipe.yaml").write_text("[" * 5000)
    with pytest.raises(RecipeError, match="not readable YAML"):
        read_yaml(tmp_path / "recipe.yaml", "recipe file")
