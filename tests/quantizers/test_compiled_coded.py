"""The compiled rounds of coded weights against their torch forms, and what they carry along."""

from __future__ import annotations

import pytest
import torch
from support import correlated_curvature
from torch import Tensor

from llmsqueeze.quantizers.coded import Coding, feedback_compiled, round_compiled, round_on_device
from llmsqueeze.quantizers.coded_on_device import coordinate_descent, feedback, refit
from llmsqueeze.quantizers.curvature import Curvature, row_error
from llmsqueeze.quantizers.steps import RoundedToSteps

ROWS, COLS = 70, 300  # a full tile and a short one, two panels and a short one
with_pinned = pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_rate = pytest.mark.parametrize("coarse", [0.05, 0.5, 2.0], ids=["fine", "middle", "coarse"])


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return correlated_curvature(COLS, generator)


def of_dtype(curvature: Curvature, dtype: torch.dtype) -> Curvature:
    return Curvature(curvature.H.to(dtype), curvature.upper.to(dtype), curvature.damping.to(dtype))


def case(
    coarse: float, wanted: bool, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, RoundedToSteps, Tensor | None]:
    """A weight, the steps that it starts from, and its outliers; some rows are zeros."""
    weight = torch.randn(ROWS, COLS, generator=generator).index_fill(0, torch.tensor([3, 69]), 0.0)
    row = torch.arange(ROWS) // 8 - 70 + int(16 * torch.tensor(coarse).log2()) + 48
    col = torch.randint(0, 40, (COLS,), generator=generator)
    pinned = torch.rand(ROWS, COLS, generator=generator) < 0.03 if wanted else None
    return weight.to(dtype), RoundedToSteps(weight.to(dtype), row, col, row - 64), pinned


@every_rate
@with_pinned
@every_dtype
def test_feedback_finds_the_integers_of_the_torch_form(
    dtype: torch.dtype, with_pinned: bool, coarse: float, curvature: Curvature, generator: torch.Generator
) -> None:
    weight, start, pinned = case(coarse, with_pinned, dtype, generator)
    found = feedback_compiled(weight, start, of_dtype(curvature, dtype), pinned)
    expected = feedback(weight, start, of_dtype(curvature, dtype), pinned)
    assert torch.equal(found.integers, expected.integers)
    assert found.integers.abs().max() > 0


@every_rate
@with_pinned
@every_dtype
def test_what_is_carried_along_is_what_it_stands_for(
    dtype: torch.dtype, with_pinned: bool, coarse: float, curvature: Curvature, generator: torch.Generator
) -> None:
    """After every step the gradient; each step is that of the torch form, and no row's error rises."""
    weight, start, pinned = case(coarse, with_pinned, dtype, generator)
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    curvature = of_dtype(curvature, dtype)
    H, rounded = curvature.H, feedback(weight, start, curvature, pinned)
    rounded = RoundedToSteps(rounded.integers, start.row_exponent - 9, start.col_exponent, start.lowest)  # to regain
    state = Coding.of(rounded, target, H, pinned)
    before, moved = row_error(target - rounded.dense(), H), 0
    for _ in range(2):
        expected = refit(state.rounded, target, H)
        state.regain()
        assert torch.equal(state.rounded.row_exponent, expected.row_exponent)
        moved += int((state.rounded.row_exponent != rounded.row_exponent).sum())
        expected = coordinate_descent(state.rounded, target, H, pinned)
        state.sweep()
        assert float((state.rounded.integers != expected.integers).double().mean()) < 1e-4
        residual = target - state.rounded.dense()
        assert torch.allclose(state.gradient, residual @ H, atol=1e-4 * float((residual @ H).abs().max()))
        after = row_error(residual, H)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert moved > 0
    if pinned is not None:
        assert (state.rounded.integers[pinned] == 0).all()
    assert (rounded.integers != state.rounded.integers).any(), "the start is not changed"


@every_rate
@with_pinned
def test_the_rounds_end_where_those_of_the_torch_form_end(
    with_pinned: bool, coarse: float, curvature: Curvature, generator: torch.Generator
) -> None:
    weight, start, pinned = case(coarse, with_pinned, torch.float32, generator)
    found = round_compiled(weight, start, curvature, pinned)
    expected = round_on_device(weight, start, curvature, pinned)
    assert float((found.integers != expected.integers).float().mean()) < 1e-3
    assert float((found.row_exponent != expected.row_exponent).float().mean()) < 0.03
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    errors = [float(row_error(target - one.dense(), curvature.H).sum()) for one in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("cols", [1, 127, 128, 129, 300])
def test_the_error_of_a_row_needs_half_of_a_symmetric_matrix(cols: int, generator: torch.Generator) -> None:
    residual, x = torch.randn(9, cols, generator=generator), torch.randn(400, cols, generator=generator)
    expected = (x.double() @ residual.T.double()).square().sum(dim=0)
    assert torch.allclose(row_error(residual, x.T @ x).double(), expected, rtol=1e-5)
