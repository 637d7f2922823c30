"""Logits over slices of tokens, against the whole logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsqueeze.evaluation.losses import slices
from llmsqueeze.evaluation.losses.slices import SlicedLogits, WholeLogits, sliced
from llmsqueeze.formats.load import load
from llmsqueeze.model.casting import compute_in

TOKENS = torch.arange(90).view(3, 30)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def checked_way(model: Any) -> type:
    """How the logits of the model are computed, after slices of several sizes were compared with whole logits; among
    them more tokens than the context."""
    whole = model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1)
    way = sliced(model, TOKENS)
    states = way.states(TOKENS)
    assert states.shape[:2] == TOKENS.shape
    for size in (1, 7, 90):
        logits = torch.cat([way.logits(part).clone() for part in states.flatten(0, 1).split(size)])
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits.flatten(0, 1), whole), "the model is as before"
    return type(way)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_are_the_models_own_logits(architecture: str, random_model: Callable[..., Path]) -> None:
    """Soft caps and scales included."""
    assert checked_way(opened(random_model(architecture))) is SlicedLogits


def test_slices_of_a_model_that_casts_its_weights(random_model: Callable[..., Path]) -> None:
    model = opened(random_model("gemma2", torch.bfloat16), torch.bfloat16)
    compute_in(model, torch.float32)
    assert checked_way(model) is SlicedLogits


def test_a_product_that_rounds_otherwise_is_sliced_all_the_same(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may add up a slice of the head in another order than the whole head."""
    exact = slices.raw_logits
    monkeypatch.setattr(slices, "raw_logits", lambda *given: exact(*given).mul_(1 + 1e-6))
    assert type(sliced(opened(random_model("llama")), TOKENS)) is SlicedLogits


def test_a_model_whose_logits_need_more_than_the_head_is_computed_whole(random_model: Callable[..., Path]) -> None:
    """Logits that depend on the position."""
    model = opened(random_model("llama"))
    forward = model.forward

    def changed(input_ids: Tensor, **kwargs: Any) -> Any:
        output = forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + torch.arange(input_ids.shape[1])[:, None]
        return output

    model.forward = changed
    assert checked_way(model) is WholeLogits


def test_a_model_without_the_usual_modules_is_computed_whole(random_model: Callable[..., Path]) -> None:
    model = opened(random_model("llama"))
    model.get_output_embeddings = lambda: None
    assert checked_way(model) is WholeLogits


def test_a_model_that_multiplies_with_its_head_itself_is_computed_whole(random_model: Callable[..., Path]) -> None:
    """The head is not called."""
    model = opened(random_model("llama-tied"))
    base, head = model.base_model, model.get_output_embeddings()

    def own(input_ids: Tensor, use_cache: bool) -> Any:
        hidden = base(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return type("Output", (), {"logits": hidden @ head.weight.T})()

    model.forward = own
    assert checked_way(model) is WholeLogits


def test_a_compressed_model_has_slices_too(compressed: Callable[[str], Path]) -> None:
    """Its blocks are found though no linear in them is an nn.Linear."""
    model = load(str(compressed("native")), dtype=torch.float32)
    assert isinstance(sliced(model, torch.arange(20)[None] + 3), SlicedLogits)
