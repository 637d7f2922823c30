"""Second moments of a linear's inputs, against plain hooks on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import shrunk_moments
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsqueeze.measure.moments import FusionGroup
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.measure.streams.restarted import Restarted
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import build_skeleton

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_moments_are_those_of_the_linears_inputs(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """Against plain hooks on the whole model, with the first block's first linears already changed."""
    folder = random_model(architecture)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2)]
    skeleton = build_skeleton(open_checkpoint(folder))
    changed, probe = skeleton.linears[0][0], skeleton.linears[0][-1]
    with torch.no_grad():
        models[1].get_submodule(changed).weight *= 1.5
    seen: list[list[Tensor]] = [[], []]
    for model, inputs in zip(models, seen, strict=True):
        model.get_submodule(probe).register_forward_pre_hook(
            lambda _m, a, inputs=inputs: inputs.append(a[0].flatten(0, 1))
        )
        for tokens in rows:
            with torch.no_grad():
                model(tokens)
    x, y = torch.cat(seen[0]), torch.cat(seen[1])
    of_x, of_y = map(shrunk_moments, seen)
    with Spill() as spill:
        walk = Walk(skeleton, rows, spill, torch.float32, CPU)
        start = walk.embed()
        with walk.resident_block(0):
            original = {name: skeleton.linear(name).weight.data for name in skeleton.linears[0]}
            current = original | {changed: original[changed] * 1.5}
            group = FusionGroup((probe,), 1)
            both = Restarted(walk, 0, ResidualStreams(start, start), original, current).observe(group)
            only_y = Restarted(walk, 0, ResidualStreams(None, start), original, current).observe(group)
            only_x = Restarted(walk, 0, ResidualStreams(start, None), original, current).observe(group)
            same = Restarted(walk, 0, ResidualStreams(start, start), original, dict(original)).observe(group)
    n = len(y)
    assert torch.allclose(both.xtx, of_y, atol=1e-4)
    weight = as_rows(skeleton.module(probe), original[probe])
    assert torch.allclose(both.pulls[probe], weight @ ((x - y).T @ y / n), atol=1e-4)
    assert torch.equal(only_y.xtx, both.xtx)
    assert torch.allclose(only_x.xtx, of_x, atol=1e-4)
    assert only_y.pulls == {}
    assert only_x.pulls == {}
    assert same.pulls == {}, "before anything is compressed there is no drift"
