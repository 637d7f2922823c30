"""Experts that are too many for memory are compressed some at a time, to the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import FAST, command, tensors_of, thorough

from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.experts import linear

CASES: list[Any] = [
    ("mixtral", ("--method", "rtn", "--bits", 3)),
    ("mixtral", ("--method", "descent", "--bits", 3)),
    ("qwen3_moe", ("--method", "gptq", "--bits", 3, "--all-experts")),
    thorough("jetmoe", ("--method", "descent", "--bits", 3)),
    thorough("gpt_oss", ("--method", "budget", "--bits", 3, "--per-row")),
    thorough("llama4_text", ("--method", "gptq", "--bits", 4)),
    thorough("dbrx", ("--method", "gwq", "--bits", 3)),
    thorough("mixtral", ("--method", "mixllm", "--bits", 3)),
    thorough("qwen3_moe", ("--method", "coded", "--bits", 2.5)),
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_a_few_experts_at_a_time_give_the_same_codes(
    name: str, flags: tuple[Any, ...], mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = mixture(name)
    text = () if flags[1] == "rtn" else (*FAST, "--calibration", "demo")
    seen = []
    for least, out in ((linear.LEAST, tmp_path / "whole"), (0, tmp_path / "chunks")):
        monkeypatch.setattr(linear, "LEAST", least)
        if not least:
            monkeypatch.setattr(Spill, "memory", lambda _spill, _nbytes: None)  # all that is kept is on the disk
        code, _, err = command("quantize", folder, *flags, *text, "--native", "--out", out)
        assert code == 0, err
        seen.append(tensors_of(out))
    whole, chunks = seen
    assert whole.keys() == chunks.keys()
    assert [name for name in whole if not torch.equal(whole[name], chunks[name])] == []
