"""A `.partial` of somebody else is data: nothing is followed out of it, imported or believed unchecked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TEXT, command, refused

from llmsqueeze import journal
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.errors import CheckpointError
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.handed import Layout
from llmsqueeze.model.original import Source
from llmsqueeze.progress.log import RUN_LOG, read

RECIPE: dict[str, Any] = {"method": "descent", "bits": 3, **TEXT}
OPTIONS = ["--method", "descent", "--bits", 3, "--samples", 2, "--seq-len", 32, "--calibration", "demo", "--quiet"]


@pytest.fixture(scope="module")
def stopped(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.partial` of a run that was interrupted when it had noted its first block."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    note = journal.Journal.note

    def interrupted(self: journal.Journal, name: str, *rest: Any, **others: Any) -> None:
        note(self, name, *rest, **others)
        self.wait()
        if name == "block-0":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal.Journal, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(Source(str(demo_of(2))), RECIPE, out)
    return out.with_name("out.partial")


@pytest.fixture
def partial(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, whose process is gone."""
    copy = Path(shutil.copytree(stopped, tmp_path / "out.partial"))
    (copy / ".owner").write_text("999999999 0")
    return copy


def went_on(partial: Path, demo_of: Callable[[int], Path]) -> str:
    """stderr of the same command, which must be refused."""
    return refused("quantize", demo_of(2), *OPTIONS, "--out", partial.with_suffix(""))


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe"])
@pytest.mark.parametrize("name", ["model-*.safetensors", RUN_LOG, f"{journal.FOLDER}/{journal.LINES}"])
def test_links_and_pipes_are_refused(
    kind: str, name: str, partial: Path, demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    outside, file = tmp_path / "outside", next(partial.glob(name))
    file.rename(outside)
    before = outside.read_bytes()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        (file.symlink_to if kind == "symbolic" else file.hardlink_to)(outside)
    for said in (went_on(partial, demo_of), refused("show", partial)):
        assert f"{file.name} is a link or no file" in said.replace("\n", "")
    assert outside.read_bytes() == before


def test_a_journal_behind_a_link_keeps_its_files(partial: Path, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    (partial / journal.FOLDER).rename(tmp_path / "elsewhere")
    (partial / journal.FOLDER).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    assert "is a link" in went_on(partial, demo_of)
    assert (tmp_path / "elsewhere" / "mine.txt").read_text() == "mine"


LAST: dict[str, Callable[[dict[str, Any]], object]] = {  # changes of the last line
    "a file elsewhere": lambda line: line["files"].update({"../outside": None}),
    "streams elsewhere": lambda line: line["value"].update(streams=["../../outside", None]),
    "no linears": lambda line: line["value"].pop("linears"),
    "linears of another kind": lambda line: line["value"].update(linears=[1]),
    "a linear that is not there": lambda line: line["value"].update(linears={"x": {}}),
    "layouts": lambda line: line["value"].update(layouts={"a": [[], [], []]}),
    "no value": lambda line: line.pop("value"),
    "a name": lambda line: line.update(step=["x"]),
}


@pytest.mark.parametrize("change", list(LAST))
def test_what_a_journal_says_is_checked(change: str, partial: Path, demo_of: Callable[[int], Path]) -> None:
    file = partial / journal.FOLDER / journal.LINES
    *lines, last = file.read_text().splitlines()
    line = json.loads(last)
    LAST[change](line)
    file.write_text("".join(f"{one}\n" for one in [*lines, json.dumps(line)]))
    assert "start over with --restart" in " ".join(went_on(partial, demo_of).split())


def test_deep_lines_are_refused(partial: Path, demo_of: Callable[[int], Path]) -> None:
    file = partial / journal.FOLDER / journal.LINES
    file.write_text(file.read_text() + "[" * 100_000 + "\n")
    assert "start over with --restart" in " ".join(went_on(partial, demo_of).split())


def test_a_layout_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own form of structures names modules, which its reader imports."""
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    context = json.dumps([{"__enum__": True, "fqn": "hostile:X", "name": "Y"}])
    structure = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
    for plain in (structure, [structure], {"a": 1}, ["set", 0], None, ["dict", [[], 0]]):
        with pytest.raises((ValueError, TypeError, KeyError)):
            Layout.from_json([[[1]], ["float32"], plain])


def test_a_layout_comes_back(generator: torch.Generator) -> None:
    hidden = torch.rand(1, 3, 4, generator=generator)
    content = {3: (torch.rand(2, generator=generator), [torch.arange(3)]), "a": {}, "b": {"c": torch.zeros(())}}
    packed, layout = Layout.of(hidden, content)
    assert layout is not None
    again = Layout.from_json(json.loads(json.dumps(layout.as_json())))
    assert again == layout
    first, second = layout.unpacked(packed), again.unpacked(packed)
    assert torch.equal(first[0], second[0])
    assert second[1].keys() == content.keys()
    assert torch.equal(second[1][3][1][0], torch.arange(3))


def test_activations_have_the_size_that_they_say(tmp_path: Path) -> None:
    file = tmp_path / "streams"
    with Spill(parent=tmp_path) as spill:
        kept = Activations(spill)
        kept.append(torch.arange(6.0).view(2, 3))
        kept.move_to(file)
        assert torch.equal(Activations.stored(spill, file, 1).get(0, torch.device("cpu")), torch.arange(6.0).view(2, 3))
        for shapes in ([[[2**40, 3], "float32"]], [[[-2, -3], "float32"]], [[[2, 3], "Tensor"]], [3], [[[6], 1]], []):
            about = json.dumps(shapes).encode()
            file.write_bytes(bytes(24) + about + len(about).to_bytes(8, "little"))
            with pytest.raises(CheckpointError, match="activations"):
                Activations.stored(spill, file, 1)
        file.write_bytes(b"\xff" * 30)
        with pytest.raises(CheckpointError, match="activations"):
            Activations.stored(spill, file, 1)


def test_lines_of_a_log_have_their_types(partial: Path) -> None:
    known = read(partial / RUN_LOG)
    wrong = [
        *({"at": "x"}, {"at": float("nan")}, {"at": 1.0, "done": "3"}, {"at": 1.0, "note": 3}),
        *({"at": 1.0, "total": -1}, {"at": 1.0, "stage": []}, {"at": 10**400}, {"at": 1.0, "memory_mb": "x"}, [], 3),
    ]
    with (partial / RUN_LOG).open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in wrong) + "[" * 100_000 + "\n")
    assert read(partial / RUN_LOG) == known
    code, out, _ = command("show", partial)
    assert code == 0
    assert "block by block" in out


def test_what_a_log_says_is_text(partial: Path) -> None:
    with (partial / RUN_LOG).open("a") as stream:
        stream.write(json.dumps({"at": 2e9, "stage": "[red]x[/nothing]", "note": "\x1b[2J[link=file:x]y"}) + "\n")
    code, out, _ = command("show", partial)
    assert code == 0
    assert "[red]x[/nothing]" in out
    assert "\x1b[2J" not in out
