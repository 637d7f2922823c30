"""A model that casts its weights when it uses them, against the same model opened in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ARCHITECTURES
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.formats.load import load
from llmsqueeze.model.casting import compute_in, multiplied_in
from llmsqueeze.model.linears import as_rows

TOKENS = torch.arange(40).view(2, 20) + 3


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_it_computes_as_a_model_opened_in_float32(
    architecture: str, stored: torch.dtype, random_model: Callable[..., Path]
) -> None:
    """Bit by bit: the weights have the same values. Only Gemma scales its embeddings before the cast."""
    folder = random_model(architecture, stored)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=stored).eval()
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compute_in(model, torch.float32)
    logits = model(TOKENS).logits
    assert logits.dtype == torch.float32
    if architecture in ("gemma2", "gemma3"):
        torch.testing.assert_close(logits, opened(TOKENS).logits, rtol=0.05, atol=0.02)
    else:
        assert torch.equal(logits, opened(TOKENS).logits)
    # with the cache, as a generation
    first = model(TOKENS[:, :-1], use_cache=True)
    last = model(TOKENS[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "neox"])
def test_the_large_weights_stay_as_they_are(architecture: str, random_model: Callable[..., Path]) -> None:
    folder = random_model(architecture, torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    large = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))}
    kept = {name: p.data_ptr() for name, p in model.named_parameters() if id(p) in large}
    compute_in(model, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in kept else torch.float32), name
        assert kept.get(name) in (None, parameter.data_ptr())
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


@torch.no_grad()
def test_compressed_layers_stay_compressed(compressed: Callable[[str], Path]) -> None:
    """Their sums of parts are float32 for float32 inputs; nothing of the file changes."""
    model, other = load(str(compressed("native"))), load(str(compressed("native")))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    compute_in(model, torch.float32)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    layers = [name for name, module in model.named_modules() if isinstance(module, SumOfParts)]
    assert layers
    for name in layers:
        weight = nn.Parameter(other.get_submodule(name).dense(), requires_grad=False)
        with torch.device("meta"):
            linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = weight
        other.set_submodule(name, linear)
    logits: Any = model(TOKENS).logits
    other_logits: Any = nn.Module.float(other)(TOKENS).logits
    assert torch.equal(logits, other_logits)


@pytest.mark.parametrize("kind", ["linear", "without bias", "transposed"])
def test_a_product_in_bfloat16_keeps_all_else_in_float32(kind: str, generator: torch.Generator) -> None:
    layers = {"linear": nn.Linear(24, 8), "without bias": nn.Linear(24, 8, bias=False), "transposed": Conv1D(8, 24)}
    layer = layers[kind]
    x = torch.randn(2, 5, 24, generator=generator, requires_grad=True)
    result = multiplied_in(torch.bfloat16, layer, x)
    rows = as_rows(layer, layer.weight).detach()
    product = (x.detach().bfloat16().double() @ rows.bfloat16().double().T).float()
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(8)
    assert result.dtype == torch.float32
    # the sum in float32, rounded once: by 2^-9 at most
    assert torch.allclose(result - bias, product, rtol=2.0**-8, atol=1e-6)
    assert not torch.allclose(result - bias, product, rtol=2.0**-12, atol=0)
    result.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
