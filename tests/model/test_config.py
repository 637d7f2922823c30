"""Models without weights: laid out once for the same folder, and every caller has its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmsqueeze.errors import CheckpointError
from llmsqueeze.model import config


def test_a_model_is_laid_out_once_and_each_caller_has_its_own(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out, calls = config.laid_out, []
    monkeypatch.setattr(config, "laid_out", lambda *given: (calls.append(given[0]), laid_out(*given))[1])
    folder = Path(shutil.copytree(demo_of(2), tmp_path / "two"))
    first = config.empty_model(folder, config.load_config(folder))
    names = [name for name, _ in first.named_modules()]
    first.model.layers[0].mlp.up_proj = torch.nn.Identity()
    first.model.layers[0].self_attn.layer_idx = 7
    second = config.empty_model(folder, config.load_config(folder))
    assert calls == [folder]
    assert [name for name, _ in second.named_modules()] == names
    assert second.model.layers[0].self_attn.layer_idx == 0
    assert all(tensor.is_meta for tensor in second.parameters())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    assert len(config.empty_model(folder, config.load_config(folder)).model.layers) == 1
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "small.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr("llmsqueeze.model.tensors.bounds.SLACK", 0)
    with pytest.raises(CheckpointError, match="far larger than its files"):
        config.empty_model(folder, config.load_config(folder))
