"""Calibration text that is short for the model: the record and a note say how much of the measurements is chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import thorough

from llmsqueeze.compress.pipeline import MUCH_CHANCE
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.files import SIDECAR
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress


def compressed(demo: Path, out: Path, method: str, samples: int) -> tuple[dict[str, float], list[str]]:
    """The shares by chance in the record, and the notes of the run."""
    progress, notes = Progress(), list[str]()
    progress.note = notes.append  # type: ignore[method-assign]
    settings = {"method": method, "bits": 3, "calibration": "demo", "samples": samples, "seq_len": 64}
    quantize(Source(str(demo)), settings, out, device="cpu", verify=False, progress=progress)
    return json.loads((out / SIDECAR).read_text()).get("chances", {}), notes


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["gptq", thorough("descent")])
def test_more_text_leaves_less_to_chance(method: str, demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    demo = demo_of(2)
    few, notes = compressed(demo, tmp_path / "few", method, 4)
    many, no_notes = compressed(demo, tmp_path / "many", method, 128)
    share = sum(few.values()) / len(few)
    assert any(f"4 samples of 64 tokens are few for this model: {share:.0%} of what was measured" in n for n in notes)
    assert not any("few for this model" in note for note in no_notes)
    assert few.keys() == many.keys()
    assert all(0 <= many[name] < few[name] <= 1 for name in few)
    assert sum(many.values()) / len(many) < MUCH_CHANCE <= share


def test_linears_of_one_input_have_one_share(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    chances, _ = compressed(demo_of(1), tmp_path / "out", "gptq", 4)
    attention = "model.layers.0.self_attn"
    assert chances[f"{attention}.q_proj"] == chances[f"{attention}.k_proj"] == chances[f"{attention}.v_proj"]
    assert len(set(chances.values())) == 4


def test_without_measurements_nothing_is_said(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    progress, notes = Progress(), list[str]()
    progress.note = notes.append  # type: ignore[method-assign]
    quantize(Source(str(demo_of(1))), {"method": "rtn", "bits": 3}, tmp_path / "out", device="cpu", progress=progress)
    assert "chances" not in json.loads((tmp_path / "out" / SIDECAR).read_text())
    assert notes == []
