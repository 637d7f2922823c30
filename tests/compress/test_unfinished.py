"""A run that is not done: its log, and what `show` says of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TEXT, command, refused

from llmsqueeze.compress.quantize import quantize
from llmsqueeze.compress.unfinished import unfinished
from llmsqueeze.compress.weights import blocks
from llmsqueeze.model.original import Source
from llmsqueeze.progress.log import RUN_LOG, read


@pytest.fixture(scope="module")
def stopped(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.partial` of a run that was interrupted when it had written its first block."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    noted = blocks.note

    def interrupted(*given: Any) -> None:
        noted(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(Source(str(demo_of(2))), {"method": "descent", "bits": 3, **TEXT}, out)
    return out.with_name("out.partial")


def test_the_log_says_where_the_run_is(stopped: Path) -> None:
    lines = read(stopped / RUN_LOG)
    assert [line["stage"] for line in lines if line.get("done") == 0 and "weight" not in line][:1] == ["compress"]
    assert lines[-1]["weight"] == "model.layers.0.mlp.down_proj"
    assert all(line["memory_mb"] > 50 for line in lines)
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)


def test_show_says_how_far_it_is(stopped: Path) -> None:
    run = unfinished(stopped)
    assert (run.stage, run.done, run.total, run.runs) == ("compress", 0, 2, True)
    assert run.process == os.getpid()
    code, out, _ = command("show", stopped)
    assert code == 0
    for words in ("compress, block by block: 0 of 2 done", "model.layers.0.mlp.down_proj", f"{os.getpid()} runs"):
        assert words in out
    assert json.loads(command("show", stopped, "--json")[1])["stage"] == "compress"


def test_what_is_left_follows_from_the_steps_that_are_done(stopped: Path, tmp_path: Path) -> None:
    partial = tmp_path / "x.partial"
    partial.mkdir()
    (partial / ".owner").write_text("999999999 0")
    steps = [{"at": 100.0 + 30 * done, "stage": "compress", "done": done, "total": 10} for done in range(4)]
    earlier = [{"at": 10.0, "stage": "forward", "done": 9, "total": 10}, {"at": 50.0, "stage": "compress", "done": 5}]
    lines = [json.dumps(line) for line in [*earlier, *steps]]
    (partial / RUN_LOG).write_text("\n".join([*lines, '{"at": 1, "sta']))
    run = unfinished(partial)
    assert (run.seconds, run.left_seconds, run.runs) == (90.0, 210.0, False)
    assert "the same command as before goes on" in command("show", partial)[1]


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    partial = tmp_path / "x.partial"
    partial.mkdir()
    assert "llmsqueeze did not write it" in refused("show", partial)
    (partial / ".owner").write_text("1 0")
    assert "nothing is known of its run" in refused("show", partial)


def test_the_finished_folder_has_no_log(compressed: Callable[[str], Path]) -> None:
    assert not (compressed("coded") / RUN_LOG).exists()
