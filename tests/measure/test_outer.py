"""Linears around the blocks, and those that several blocks share: what they see is what they get in the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outer import outer_moments
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.shrinkage import shrink
from llmsqueeze.measure.sweeps import gradient_sweeps
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")
KINDS = {  # the unusual model -> how many outer linears it has
    "narrow embeddings": 2,
    "stacked streams, keys handed on": 7,
    "linears in several blocks": 10,
}


@contextmanager
def walking(folder: Path, rows: list[Tensor]) -> Iterator[Walk]:
    with Spill() as spill:
        yield Walk(build_skeleton(open_checkpoint(folder)), rows, spill, torch.float32, CPU)


Call = tuple[str, Tensor, Tensor]


def calls_of(model: nn.Module, walk: Walk) -> list[Call]:
    """Becomes the calls of the outer linears in the whole model: name, input [tokens, cols], output."""
    calls: list[Call] = []

    def note(name: str, _module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        calls.append((name, args[0].detach().flatten(0, -2), output))

    for name in walk.skeleton.outer:
        for module in walk.skeleton.sharing(name):
            model.get_submodule(module).register_forward_hook(partial(note, name))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_are_those_of_all_calls(kind: str, random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    folder = random_model(kind)
    with walking(folder, rows) as walk:
        found = outer_moments(walk, inputs := walk.embed(), walk.skeleton.outer)
        assert len(inputs) == len(rows)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        calls = calls_of(model, walk)
        for tokens in rows:
            model(input_ids=tokens, use_cache=False)
    assert len(found) == KINDS[kind]
    for name, moments in found.items():
        x = torch.cat([x for one, x, _ in calls if one == name])
        assert moments.tokens == len(x)
        torch.testing.assert_close(moments.xtx, shrink(x.T @ x / len(x), moments.chance), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_the_whole_model(
    kind: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """But for what reaches blocks in another argument than the hidden states, which has none."""
    folder = random_model(kind)
    with walking(folder, rows) as walk:
        linears = dict.fromkeys(walk.skeleton.all_linears, torch.float32)
        request = Request(options=(Option(Grid(4, 16, True)),))
        profile = gradient_sweeps(walk, walk.embed(), linears, request, Progress())
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        calls = calls_of(model, walk)
        for tokens in rows:
            logits = model(input_ids=tokens, use_cache=False).logits
            nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum").backward()
        priced = [name for name in walk.skeleton.outer if name in profile.costs]
        labels = walk.labels
    assert len(priced) == KINDS[kind] - (kind.startswith("stacked"))
    for name in priced:
        squares = sum(out.grad.flatten(0, -2).square().sum(dim=0) for one, _, out in calls if one == name)
        torch.testing.assert_close(profile.row_gradient[name], squares / labels, rtol=2e-3, atol=1e-7)
