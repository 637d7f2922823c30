"""Originals as people have them: weights in float64, a private path in the config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import thorough

import llmsqueeze


@pytest.fixture(scope="module")
def double(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with one block, in float64."""
    folder = Path(shutil.copytree(demo_of(1), tmp_path_factory.mktemp("double") / "model"))
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float64", "_name_or_path": "/home/me/secret"}))
    return folder


@pytest.mark.parametrize("settings", [{"method": "rtn"}, thorough({"method": "coded", "samples": 2, "seq_len": 32})])
def test_weights_in_float64_are_rounded_as_in_float32(
    double: Path, demo_of: Callable[[int], Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    llmsqueeze.quantize(double, tmp_path / "out", bits=4, **settings)
    model = llmsqueeze.load(str(tmp_path / "out"))
    original = llmsqueeze.load(str(demo_of(1)), dtype=torch.float32)
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        ours, exact = model(tokens).logits.float(), original(tokens).logits
    assert torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1] > 0.97


def test_a_private_path_stays_private(double: Path, tmp_path: Path) -> None:
    llmsqueeze.quantize(double, tmp_path / "out", bits=4, method="rtn")
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
