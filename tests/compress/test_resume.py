"""A run that is stopped goes on: after every step, killed for real, on a full disk, with damaged files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from children import Child
from shared_runs import shared_runs
from support import TEXT, command, thorough

from llmsqueeze import journal
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.errors import OutputError
from llmsqueeze.model.original import Source

RUNS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 4, "portable": False, "embeddings": 4},
    "descent": {"method": "descent", "bits": 3, **TEXT},
    "budget": {"method": "budget", "bits": 3.0, "widths": [2, 4], **TEXT},
    "coded ends": {"method": "coded", "bits": 3.0, "code_embeddings": True, **TEXT},
    "gwq with factors": {"method": "gwq", "bits": 3, "lorc_rank": 2, **TEXT},
    "lim": {"method": "layerwise", "bits": 3.0, "high_bits": 4, "low_bits": 2, **TEXT},
    "search": {"method": "budget", "quantizer": "rtn", "widths": [2, 4], "max_kl": 0.3, **TEXT},
    "distilled": {"method": "rtn", "bits": 3, "distill_steps": 2, **TEXT},
}


@pytest.fixture(scope="module")
def demo(demo_of: Callable[[int], Path]) -> Source:
    return Source(str(demo_of(2)))


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file of a folder."""
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@contextmanager
def stopped_after(step: int) -> Iterator[list[str]]:
    """In the context a run is stopped when it has noted so many steps; gives the names of the steps that it noted."""
    noted: list[str] = []
    note = journal.Journal.note

    def counting(self: journal.Journal, name: str, *rest: Any, **others: Any) -> None:
        note(self, name, *rest, **others)
        self.wait()
        if self.active:
            noted.append(name)
        if len(noted) == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal.Journal, "note", counting)
        yield noted


FEW = ("rtn", "descent")
STEPS_AT_A_TIME = {"search": 6}  # of runs with many; else one


@pytest.mark.parametrize("name", [name if name in FEW else thorough(name) for name in RUNS])
def test_a_run_that_is_stopped_after_every_step_does_nothing_twice(
    demo_of: Callable[[int], Path], tmp_path: Path, name: str
) -> None:
    demo = Source(str(demo_of(2 if name in ("rtn", "descent", "coded ends") else 1)))
    with stopped_after(-1) as steps:
        quantize(demo, RUNS[name], tmp_path / "whole")
    every: list[str] = []
    while not (tmp_path / "out").exists():
        with stopped_after(STEPS_AT_A_TIME.get(name, 1)) as noted:
            try:
                quantize(demo, RUNS[name], tmp_path / "out")
            except KeyboardInterrupt:
                assert noted, "a run that was stopped had done something new"
        every += noted
    assert every == steps
    assert len(steps) >= 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_process_that_is_killed(demo: Source, tmp_path: Path) -> None:
    """Killed by the system when it has noted the first block, and again in the next one."""
    out = tmp_path / "out"
    killed = Child(tmp_path, shared_runs, tmp_path, {"out": (demo.model, RUNS["rtn"])}, "block-0")
    assert killed.ended()[0] == -signal.SIGKILL
    assert not out.exists()
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmsqueeze.progress.Progress.note", lambda _, text: notes.append(text))
        quantize(demo, RUNS["rtn"], out)
    assert "goes on behind block 1 of 2" in notes
    quantize(demo, RUNS["rtn"], tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def half(demo: Source, tmp_path: Path) -> Path:
    """The folder of a descent run that was stopped behind its first block."""
    with stopped_after(3) as noted, pytest.raises(KeyboardInterrupt) as stopped:
        quantize(demo, RUNS["descent"], tmp_path / "out")
    assert noted == ["profile", "start", "block-0"]
    assert "the same command goes on" in stopped.value.__notes__[-1]
    return tmp_path / "out.partial"


@pytest.fixture(scope="module")
def whole(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the folder of that run holds if it is not stopped."""
    out = tmp_path_factory.mktemp("descent") / "whole"
    quantize(demo, RUNS["descent"], out)
    return contents(out)


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: flip(next(partial.glob("model-*.safetensors"))),
        lambda partial: flip(next((partial / journal.FOLDER).glob("block-0.*"))),
        lambda partial: next((partial / journal.FOLDER).glob("block-0.*")).unlink(),
        lambda partial: cut_off(partial / journal.FOLDER / journal.LINES),
    ],
)
def test_what_was_damaged_meanwhile_is_done_again(
    demo: Source, tmp_path: Path, half: Path, whole: dict[str, str], damage: Callable[[Path], None]
) -> None:
    damage(half)
    quantize(demo, RUNS["descent"], tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def flip(file: Path) -> None:
    """Changes a byte in the middle of the second half of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    """Takes the end of the last line away."""
    file.write_bytes(file.read_bytes()[:-5])


def test_another_run_does_not_go_on_with_it(demo: Source, tmp_path: Path, half: Path) -> None:
    before = contents(half)
    with pytest.raises(OutputError, match=r"recipe bits 3, not 4.*--restart"):
        quantize(demo, {**RUNS["descent"], "bits": 4}, tmp_path / "out")
    assert contents(half) == before, "nothing is lost"
    quantize(demo, {**RUNS["descent"], "bits": 4}, tmp_path / "out", restart=True)
    assert json.loads((tmp_path / "out" / "llmsqueeze.json").read_text())["recipe"]["bits"] == 4
    assert not half.exists()


def test_a_disk_that_is_full_loses_nothing(demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("llmsqueeze.formats.folder.Output.finish", full)
        code, _, err = command("quantize", demo.model, "--method", "rtn", "--out", tmp_path / "out", "--quiet")
    assert code == 2
    assert "No space left" in err
    assert "the same command goes on" in err
    with stopped_after(-1) as noted:
        quantize(demo, {"method": "rtn"}, tmp_path / "out")
    assert noted == [], "all blocks were there"


def test_a_signal_to_terminate_says_how_to_go_on(demo: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = journal.Journal.note

    def terminated(self: journal.Journal, *given: Any) -> None:
        note(self, *given)
        self.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(journal.Journal, "note", terminated)
    code, _, err = command("quantize", demo.model, "--method", "rtn", "--out", tmp_path / "out", "--quiet")
    assert code == 130
    assert "interrupted; what was done is kept in" in err
    assert "the same command goes on" in err
