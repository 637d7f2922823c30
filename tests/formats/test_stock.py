"""Stock transformers and PEFT, in a process that cannot import llmsqueeze, compute what the parts do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmsqueeze
from llmsqueeze.formats.entries import read_entries
from llmsqueeze.model.checkpoint import open_checkpoint

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.thorough  # test_opening.py opens a folder in the same way

# the entry in sys.modules makes an import of llmsqueeze fail; the adapters go onto the folder "base"
STOCK = """
import json, sys
sys.modules["llmsqueeze"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
request = json.loads(sys.argv[1])
def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(request["tokens"])).logits
answers = {}
for name, folder in request["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers[name] = logits(model)
model = AutoModelForCausalLM.from_pretrained(request["folders"]["base"], dtype=torch.float32)
logits(model)
for name, adapter in request["adapters"].items():
    if isinstance(model, PeftModel):
        model.load_adapter(adapter, adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    model.set_adapter(name)
    answers[name] = logits(model)
model = AutoModelForCausalLM.from_pretrained(request["native"])
answers["native"] = type(model.model.layers[0].mlp.up_proj).__name__
torch.save(answers, request["out"])
"""


@pytest.fixture(scope="module")
def stock(
    compressed: Callable[[str], Path],
    adaptable: Path,
    exported: Callable[..., tuple[Path, Any]],
    tokens: Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], str]:
    """name -> logits of the folder; and everything that the process printed."""
    scratch = tmp_path_factory.mktemp("stock")
    base, half = exported("adaptable", "peft")[0], exported("adaptable", "peft", dtype="bf16")[0]
    request = {
        "folders": {
            "portable": str(exported("widths", "compressed-tensors")[0]),
            "dense": str(exported("dual", "dense", dtype="fp32")[0]),
            "base": str(base / "base"),
        },
        "adapters": {"fp32": str(base / "adapter"), "bf16": str(half / "adapter")},
        "native": str(compressed("native")),
        "tokens": tokens.tolist(),
        "out": str(scratch / "answers.pt"),
    }
    command = [sys.executable, "-c", STOCK, json.dumps(request)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch)
    return torch.load(scratch / "answers.pt"), done.stdout + done.stderr


def ours(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = llmsqueeze.load(str(folder), dtype=torch.float32)(input_ids=tokens).logits
    return logits


@pytest.mark.thorough
def test_compressed_tensors_of_several_widths(
    stock: tuple[dict[str, Any], str], compressed: Callable[[str], Path], tokens: Tensor
) -> None:
    native = compressed("widths")
    widths = {spec["bits"] for entry in read_entries(open_checkpoint(native)).values() for spec in entry.specs}
    assert len(widths) > 2, "one config group would hide what mixed ones do"
    assert torch.allclose(stock[0]["portable"], ours(native, tokens), atol=1e-4)


def test_dense_weights(stock: tuple[dict[str, Any], str], compressed: Callable[[str], Path], tokens: Tensor) -> None:
    assert torch.allclose(stock[0]["dense"], ours(compressed("dual"), tokens), atol=1e-4)


def test_a_base_with_its_adapter(stock: tuple[dict[str, Any], str], adaptable: Path, tokens: Tensor) -> None:
    answers, expected = stock[0], ours(adaptable, tokens)
    assert torch.allclose(answers["fp32"], expected, atol=1e-4)
    missing = float((answers["base"] - expected).abs().max())
    assert missing > 0.1, "the adapter is what makes the difference"
    assert 0 < float((answers["bf16"] - expected).abs().max()) < 0.05 * missing


def test_the_native_format_only_causes_a_warning(stock: tuple[dict[str, Any], str]) -> None:
    """Why the card shouts: without the import the weights are random, and this is all that is printed."""
    answers, printed = stock
    assert answers["native"] == "Linear"
    assert "Unknown quantization type, got llmsqueeze" in printed
