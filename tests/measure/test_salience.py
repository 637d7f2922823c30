"""Salience of rows: against ordinary backward passes, and the rounding error that it is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.salience import rounding_error, sample_salience
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.original import Source, open_original
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")


def test_salience_is_what_rounding_a_row_costs_to_second_order(generator: torch.Generator) -> None:
    """|s + s^2 / 2| with s the change of the loss to first order, row by row and weight by weight."""
    gradient, error = (torch.randn(5, 7, generator=generator) for _ in range(2))
    for r, salience in enumerate(sample_salience(gradient, error).tolist()):
        s = sum(float(gradient[r, j]) * float(error[r, j]) for j in range(7))
        assert salience == pytest.approx(abs(s + s * s / 2), rel=1e-5)


def test_the_rounding_error_is_to_nearest_on_the_range_of_each_group(generator: torch.Generator) -> None:
    """Entry by entry, as the paper's stand-in for what the quantizer will leave."""
    weight = torch.randn(3, 40, generator=generator)
    error = rounding_error(weight, Grid(4, 16, False), torch.float32)
    for r in range(3):
        for start in (0, 16, 32):
            group = weight[r, start : start + 16].double()
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            scale = (high - low) / 15
            zero = round(-low / scale)
            for j, w in enumerate(group.tolist()):
                rounded = scale * (min(max(round(w / scale + zero), 0), 15) - zero)
                assert float(error[r, start + j]) == pytest.approx(rounded - w, abs=1e-6)


@pytest.fixture(scope="module")
def tokens() -> list[Tensor]:
    return [torch.randint(5, 300, (1, 30 + s), generator=torch.Generator().manual_seed(s)) for s in range(4)]


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


@pytest.fixture(scope="module")
def skeleton(folder: Path) -> Skeleton:
    return open_original(Source(str(folder))).skeleton


@pytest.fixture(scope="module")
def profile(skeleton: Skeleton, tokens: list[Tensor]) -> Profile:
    """Salience of the rows at 4 and at 3 bits, measured in float64."""
    linears = {name: torch.bfloat16 for names in skeleton.linears for name in names}
    request = Request(salience=(Grid(4, 128, False), Grid(3, 128, False)))
    with Spill() as spill:
        walk = Walk(skeleton, tokens, spill, torch.float64, CPU)
        return measure(walk, walk.embed(), linears, request, Progress())


@pytest.fixture(scope="module")
def gradients(folder: Path, skeleton: Skeleton, tokens: list[Tensor]) -> list[dict[str, Tensor]]:
    """Per sample and linear the gradient of the mean loss, by transformers and one backward pass each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    names = [name for block in skeleton.linears for name in block]
    per_sample = []
    for row in tokens:
        model.zero_grad()
        logits = model(input_ids=row, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]).backward()
        per_sample.append({name: model.get_submodule(name).weight.grad.clone() for name in names})
    return per_sample


def slow_salience(folder: Path, gradients: list[dict[str, Tensor]], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Mean over the samples, from rounding errors held in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    result = {}
    for name in gradients[0]:
        weight = model.get_submodule(name).weight.detach()
        error = rounding_error(weight, Grid(bits, 128, False), torch.bfloat16).to(dtype).double()
        s = torch.stack([(sample[name] * error).sum(dim=1) for sample in gradients])
        result[name] = (s + s.square() / 2).abs().mean(dim=0)
    return result


@pytest.mark.parametrize(("at", "bits"), [(0, 4), (1, 3)], ids=["4 bits", "3 bits"])
def test_measured_salience_is_that_of_ordinary_backward_passes(
    at: int, bits: int, profile: Profile, folder: Path, gradients: list[dict[str, Tensor]]
) -> None:
    expected = slow_salience(folder, gradients, bits, torch.bfloat16)
    assert profile.salience.keys() == expected.keys()
    assert len(expected) == 14
    for name, value in expected.items():
        assert torch.allclose(profile.salience[name][at].double(), value, rtol=1e-5, atol=1e-10), name


def test_holding_rounding_errors_in_bfloat16_hardly_matters(
    profile: Profile, folder: Path, gradients: list[dict[str, Tensor]]
) -> None:
    for name, value in slow_salience(folder, gradients, 4, torch.float64).items():
        assert (profile.salience[name][0].double() - value).norm() < 1e-2 * value.norm(), name
