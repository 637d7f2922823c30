"""What linears multiply in: decided by a trial, recorded, and followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import thorough

from llmsqueeze.compress.quantize import quantize
from llmsqueeze.errors import RecipeError
from llmsqueeze.files import SIDECAR
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress

TEXT = {"calibration": "demo", "samples": 4, "seq_len": 64}


def quantized(model: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    """The record of a run that is verified, and its notes."""
    progress, notes = Progress(), list[str]()
    progress.note = notes.append  # type: ignore[method-assign]
    quantize(Source(str(model)), settings, out, device="cpu", progress=progress)
    record: dict[str, Any] = json.loads((out / SIDECAR).read_text())
    return record, notes


@pytest.mark.parametrize("method", ["descent", thorough("coded")])
def test_the_faster_dtype_is_taken_and_recorded(
    method: str, demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in bfloat16 differs little; its record makes it again on a machine that is faster in float32."""
    bits = {"bits": 3} if method == "descent" else {"bits": 3.25}
    settings = {"method": method, **bits, **TEXT}
    exact, notes = quantized(demo_of(1), tmp_path / "exact", **settings)
    assert exact["recipe"]["products"] == "float32"
    assert not any("multiply" in note for note in notes)
    monkeypatch.setattr("llmsqueeze.compress.job.fastest_dtype", lambda _: torch.bfloat16)
    fast, notes = quantized(demo_of(1), tmp_path / "fast", **settings)
    assert fast["recipe"]["products"] == "bfloat16"
    assert any("multiply in bfloat16" in note for note in notes)
    assert fast["errors"] != exact["errors"]
    assert fast["errors"] == pytest.approx(exact["errors"], rel=0.2)
    monkeypatch.undo()
    again, notes = quantized(demo_of(1), tmp_path / "again", **settings, products="bfloat16")
    assert not any("multiply" in note for note in notes)
    assert again == fast


def test_rounding_without_text_multiplies_nothing(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    record, _ = quantized(demo_of(1), tmp_path / "out", method="rtn")
    assert "products" not in record["recipe"]
    with pytest.raises(RecipeError, match=r"--products.* does not apply to --method rtn, which reads no text"):
        quantized(demo_of(1), tmp_path / "other", method="rtn", products="bfloat16")
