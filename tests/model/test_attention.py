"""Causal attention over few tokens: what torch computes, with fewer products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as by_torch

from llmsqueeze.evaluation.losses.slices import sliced
from llmsqueeze.model.blockwise import attention
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.attention import (
    ATTENTION,
    AttentionCall,
    AttentionInPieces,
    in_pieces,
    traced_attention,
)
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton

HEADS, WIDTH = 4, 8
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int, generator: torch.Generator, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> Inputs:
    query = torch.randn(2, HEADS, tokens, WIDTH, generator=generator)
    key, value = torch.randn(2, 2, heads, tokens, WIDTH, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every attention that is computed in pieces."""
    calls: list[int] = []
    in_pieces = attention.in_pieces

    def noting(call: AttentionCall, compute: Callable[..., Tensor]) -> Tensor:
        calls.append(call.query.shape[-2])
        return in_pieces(call, compute)

    monkeypatch.setattr(attention, "in_pieces", noting)
    return calls


@pytest.mark.parametrize("tokens", [65, 128, 200, 512, 1024])
@pytest.mark.parametrize("heads", [HEADS, 2])
def test_it_gives_what_torch_gives(tokens: int, heads: int, generator: torch.Generator, taken: list[int]) -> None:
    """Results and gradients; also with fewer heads of keys, and another scale."""
    given, upstream = inputs(tokens, generator, heads), torch.randn(2, HEADS, tokens, WIDTH, generator=generator)
    settings = {"is_causal": True, "enable_gqa": heads != HEADS, "scale": 0.7}
    results = []
    for piecewise in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        if piecewise:
            with AttentionInPieces():
                output = by_torch(*leaves, **settings)
        else:
            output = by_torch(*leaves, **settings)
        output.backward(upstream)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert taken == [tokens]
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (64, {"is_causal": True}),
        (1025, {"is_causal": True}),
        (128, {}),
        (128, {"attn_mask": torch.zeros(128, 128)}),
        (128, {"is_causal": True, "dropout_p": 0.5}),
    ],
)
def test_everything_else_is_left_to_torch(
    tokens: int, settings: dict[str, Any], generator: torch.Generator, taken: list[int]
) -> None:
    given = inputs(tokens, generator)
    with AttentionInPieces():
        torch.manual_seed(0)
        ours = by_torch(*given, **settings)
        torch.manual_seed(0)
    assert torch.equal(ours, by_torch(*given, **settings))
    assert taken == []


def test_other_numbers_and_other_keys_are_left_to_torch(generator: torch.Generator, taken: list[int]) -> None:
    half, whole = inputs(128, generator, dtype=torch.bfloat16), inputs(128, generator)
    with AttentionInPieces():
        assert torch.equal(by_torch(*half, is_causal=True), by_torch(*half, is_causal=True))
        last = by_torch(whole[0][..., :70, :], whole[1], whole[2], is_causal=True)
    assert torch.equal(last, by_torch(whole[0][..., :70, :], whole[1], whole[2], is_causal=True))
    assert taken == []


def test_more_threads_than_heads_are_left_to_torch(
    generator: torch.Generator, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(128, generator)
    for threads, expected in ((8, [128]), (9, [128])):  # two rows with four heads each
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with AttentionInPieces():
            by_torch(*given, is_causal=True)
        assert taken == expected


def test_what_the_mask_hides_is_left_out(generator: torch.Generator) -> None:
    """Of eight times eight products of 64 queries with 64 keys, 36 are computed."""
    products = []

    def noting(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        products.append(query.shape[-2] * key.shape[-2])
        return by_torch(query, key, value, **settings)

    in_pieces(AttentionCall(*inputs(512, generator)), noting)
    assert sum(products) == 36 * 64 * 64


def test_a_run_without_gradients_does_not_spoil_one_with(generator: torch.Generator) -> None:
    attention._hidden.cache_clear()
    query, key, value = inputs(128, generator)
    with torch.inference_mode(), AttentionInPieces():
        by_torch(query, key, value, is_causal=True)
    with AttentionInPieces():
        by_torch(query.requires_grad_(), key, value, is_causal=True).sum().backward()
    assert query.grad is not None


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by head": lambda x: x,
    "by token": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a third of a fused projection": lambda x: (
        torch.stack([x, x, x]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 0].transpose(1, 2)
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_trace_computes_it_too(layout: str, generator: torch.Generator, taken: list[int]) -> None:
    """In the same layout, for the views that come behind it were traced on that."""
    query, key, value = inputs(100, generator, heads=2)
    given = LAYOUTS[layout](query), key, value
    expected = ATTENTION(*given, 0.0, True)[0]
    ours = traced_attention(*given, 0.0, True)[0]
    assert torch.allclose(ours, expected, atol=1e-6)
    assert ours.stride() == expected.stride()
    assert taken == [100]
    assert torch.equal(traced_attention(*given)[0], ATTENTION(*given)[0])
    assert taken == [100]


def test_walks_and_evaluations_use_it(random_model: Callable[..., Path], taken: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    folder, rows = random_model("llama"), [torch.arange(100)[None] % 60]
    with Spill() as spill:
        walk = Walk(build_skeleton(open_checkpoint(folder)), rows, spill, torch.float32, torch.device("cpu"))
        hidden = walk.embed().get(0, walk.device)
        with walk.resident_block(0), torch.no_grad():
            walk.run(0, 0, hidden)
    assert taken == [100]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model(input_ids=rows[0]).logits
    assert taken == [100]
    with torch.no_grad():
        logits = sliced(model, rows[0])
        states = logits.states(rows[0])
        assert torch.allclose(logits.logits(states.flatten(0, 1)), expected.flatten(0, 1), atol=1e-5)
    assert taken[1:] == [100] * len(model.model.layers)
