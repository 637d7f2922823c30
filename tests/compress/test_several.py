"""`compare --methods`: a result of each method with one budget, measured beside the original by the same command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import command, refused

METHODS = ["rtn", "gwq", "lorc", "dbllm", "layerwise", "mixllm", "coded"]


def test_methods_at_equal_bytes(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    model = shutil.copytree(demo_of(2), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Tom had a small dog. The dog ran home. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"seq_len": 32}))
    asked = ["compare", model, "--methods", ",".join(METHODS), "--bits", 3.2, "--recipe", recipe, "--samples", 2]
    asked += ["--calibration", text, "--text", text, "--seq-len", 32, "--limit", 2, "--out", tmp_path / "all", "--json"]
    code, stdout, stderr = command(*asked)
    assert code == 0, stderr
    rows = json.loads(stdout)["models"][1:]
    assert [Path(row["model"]).name for row in rows] == METHODS
    assert all(2.8 < row["bits_per_weight"] <= 3.2 for row in rows), [row["bits_per_weight"] for row in rows]
    assert all(row["nll_difference"] is not None for row in rows)

    written = {name: (tmp_path / "all" / name / "llmsqueeze.json").stat().st_mtime_ns for name in METHODS}
    asked[asked.index(",".join(METHODS))] = "gwq,rtn"
    code, stdout, stderr = command(*asked)
    assert code == 0, stderr
    assert [Path(row["model"]).name for row in json.loads(stdout)["models"][1:]] == ["gwq", "rtn"]
    assert "is there, by the same settings" in " ".join(stderr.split())
    assert written == {name: (tmp_path / "all" / name / "llmsqueeze.json").stat().st_mtime_ns for name in METHODS}
    weights = model / "model.safetensors"
    os.utime(weights, (0, 0))
    assert "exists already" in refused(*asked), "results of other weights are not taken"
    shutil.copy2(demo_of(2) / "model.safetensors", weights)
    assert command(*asked)[0] == 0
    with text.open("a") as file:
        file.write("The end.")
    assert "exists already" in refused(*asked), "results of another text are not taken"
    assert "nowhere.txt" in refused(*[tmp_path / "nowhere.txt" if one is text else one for one in asked])
    asked[asked.index(3.2)] = 3.4
    assert "gwq: " in (told := refused(*asked))
    assert "exists already" in told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--methods", "gqw", "--bits", 3.0], "unknown method 'gqw'; did you mean 'gwq'?"),
        (["--methods", "rtn,rtn", "--bits", 3.0], "--methods names rtn twice"),
        (["--methods", ",", "--bits", 3.0], "--methods is empty"),
        (["--methods", "rtn", "--bits", 3.0, "--text", "nowhere.txt"], "no text file nowhere.txt"),
        (["--methods", "rtn"], "--methods needs one budget for all"),
        (["--methods", "rtn", "--bits", 3.0, "--size", "1GB"], "--methods needs one budget for all"),
        (["--methods", "coded,gwq", "--bits", 2.05, "--text", "demo"], "gwq: --bits 2.05 is too small"),
        (["--bits", 3.0], "--bits is for --methods, and none is named"),
    ],
    ids=str,
)
def test_what_cannot_be(options: list[object], expected: str, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "all"] if "--methods" in options else []
    assert expected in refused("compare", demo_of(1), *options, *out)
    assert not (tmp_path / "all").exists()
