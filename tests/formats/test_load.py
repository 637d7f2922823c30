"""Opening our folders with transformers: dtypes, device maps, saving again, and failing loudly where it must."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmsqueeze
import llmsqueeze.hf
from llmsqueeze.errors import CheckpointError
from llmsqueeze.formats.hf.layer import SumOfParts

TOKENS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def folder(compressed: Callable[[str], Path]) -> Path:
    return compressed("outliers")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def test_from_pretrained_after_the_import(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(isinstance(module, SumOfParts) for module in model.modules()) == 14
    assert torch.equal(logits(model), logits(llmsqueeze.load(str(folder))))
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dtype_changes_the_arithmetic_not_what_is_stored(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert model.model.norm.weight.dtype == dtype
    assert layer.parts[0].scale.dtype == layer.parts[1].value.dtype == torch.bfloat16
    assert layer.parts[0].codes.dtype == torch.int32
    assert logits(model).dtype == dtype
    reference = logits(llmsqueeze.load(str(folder), dtype=torch.float32))
    assert (logits(model).float() - reference).norm() < 1e-2 * reference.norm()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(folder: Path, device_map: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(model).cpu(), logits(llmsqueeze.load(str(folder))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(folder: Path) -> None:
    model = llmsqueeze.load(str(folder), device_map="cuda", dtype=torch.float32)
    with torch.no_grad():
        on_device = model(TOKENS.cuda()).logits.cpu()
    assert torch.allclose(on_device, logits(llmsqueeze.load(str(folder), dtype=torch.float32)), atol=1e-3)


@pytest.mark.parametrize("kind", ["outliers", "portable"])
def test_save_pretrained_and_back(compressed: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    model = llmsqueeze.load(str(compressed(kind)))
    model.save_pretrained(tmp_path)
    again = llmsqueeze.load(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def test_generate(folder: Path) -> None:
    model = llmsqueeze.load(str(folder))
    assert model.generate(TOKENS[:, :8], max_new_tokens=5, do_sample=False).shape == (1, 13)


def test_dequantize_is_the_same_model_in_ordinary_layers(folder: Path, tmp_path: Path) -> None:
    model = llmsqueeze.load(str(folder))
    before = logits(model)
    model.dequantize()
    assert not any(isinstance(module, SumOfParts) for module in model.modules())
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_coded_weights_are_dense_when_they_are_opened(compressed: Callable[[str], Path]) -> None:
    """So there is nothing for `dequantize` to do; a copy of the model has it too."""
    model = llmsqueeze.load(str(compressed("coded")))
    before = logits(model)
    assert model.dequantize() is model
    again = copy.deepcopy(model).dequantize()
    assert again is not model
    assert torch.equal(logits(again), before)
    assert again.dequantize(torch.float32).dtype == torch.float32


def test_load_opens_ordinary_models_too(demo_of: Callable[[int], Path]) -> None:
    ours = llmsqueeze.load(str(demo_of(1)))
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(demo_of(1))))


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.up_proj.parts.0.codes", "model.layers.1.mlp.up_proj.parts.1.value"]
)
def test_a_lost_tensor_is_an_error_not_random_weights(folder: Path, tmp_path: Path, tensor: str) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        tensors.pop(tensor, None)
        save_file(tensors, tmp_path / file.name, metadata={"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"][tensor]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=tensor + " is missing; `llmsqueeze check` lists all errors"):
        llmsqueeze.load(str(tmp_path))


def test_a_config_that_names_a_module_the_model_lacks(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    weights = config["quantization_config"]["weights"]
    weights["model.layers.9.mlp.up_proj"] = weights["model.layers.1.mlp.up_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names model\.layers\.9\.mlp\.up_proj"):
        llmsqueeze.load(str(tmp_path))
