"""The compiled rounds of descent against their torch forms, and what they carry along against what it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import GRIDS, correlated_curvature
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import descent as descent_module
from llmsqueeze.quantizers import dual_binary
from llmsqueeze.quantizers.curvature import Curvature, row_error
from llmsqueeze.quantizers.descent import Descent, rounds_compiled, rounds_on_device
from llmsqueeze.quantizers.descent_on_device import coordinate_descent, normal_equations, refit
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.quantizers.loops import refit as refit_loops

ROWS, COLS = 70, 600  # a full tile and a short one, four panels and a short one, two blocks
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
with_pinned = pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return correlated_curvature(COLS, generator)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLS, generator=generator) * 0.05


def outliers(grid: Grid, wanted: bool, generator: torch.Generator) -> Tensor | None:
    if wanted and grid.half:
        pytest.skip("a half grid has no outliers")
    return torch.rand(ROWS, COLS, generator=generator) < 0.03 if wanted else None


def start_of(
    grid: Grid, weight: Tensor, curvature: Curvature, pinned: Tensor | None, dtype: torch.dtype = torch.bfloat16
) -> tuple[Rounded, Tensor]:
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    return gptq(weight, grid, dtype, curvature, pinned, True), target


def close(values: Tensor, expected: Tensor, share: float) -> bool:
    """Whether they differ by a small share of the largest."""
    return float((values - expected).abs().max()) <= share * float(expected.abs().max())


@with_pinned
@pytest.mark.parametrize(("grid", "dtype"), list(zip(GRIDS, itertools.cycle(DTYPES), strict=False)), ids=str)
def test_a_refit_finds_the_scales_of_the_torch_form(
    dtype: torch.dtype,
    with_pinned: bool,
    grid: Grid,
    weight: Tensor,
    curvature: Curvature,
    generator: torch.Generator,
) -> None:
    pinned = outliers(grid, with_pinned, generator)
    start, target = start_of(grid, weight, curvature, pinned, dtype)
    state = Descent.of(start, target, curvature.H, pinned)
    state.refit()
    expected = refit(start, target, curvature.H)
    found = state.rounded()
    assert torch.equal(found.codes, expected.codes)
    assert close(found.scales.float(), expected.scales.float(), 4 * max(torch.finfo(dtype).eps, 1e-5))
    if dtype != torch.float32:
        assert float((found.scales == expected.scales).float().mean()) > 0.97
    assert not torch.equal(found.scales, start.scales)


@every_grid
@with_pinned
def test_a_sweep_finds_the_codes_of_the_torch_form(
    with_pinned: bool, grid: Grid, weight: Tensor, curvature: Curvature, generator: torch.Generator
) -> None:
    pinned = outliers(grid, with_pinned, generator)
    start, target = start_of(grid, weight, curvature, pinned)
    state = Descent.of(start, target, curvature.H, pinned)
    state.sweep()
    expected = coordinate_descent(start, target, curvature.H, pinned)
    assert float((state.codes != expected.codes).float().mean()) < 1e-4
    assert float((state.codes != start.codes).float().mean()) > 0.01


@every_grid
@with_pinned
def test_what_is_carried_along_is_what_it_stands_for(
    with_pinned: bool, grid: Grid, weight: Tensor, curvature: Curvature, generator: torch.Generator
) -> None:
    """After every step: the planes, the gradient and the normal equations; and no row's error rises."""
    pinned = outliers(grid, with_pinned, generator)
    start, target = start_of(grid, weight, curvature, pinned)
    H, state = curvature.H, Descent.of(start, target, curvature.H, pinned)
    before = row_error(target - start.dense(), H)
    for _ in range(3):
        for step in (state.refit, state.carry, state.sweep):
            step()
            now = state.rounded()
            residual = target - now.dense()
            assert torch.equal(state.planes, torch.stack(now.planes()))
            if step != state.refit:  # until `carry` the gradient stays behind
                assert close(state.gradient, residual @ H, 1e-4)
            A, _ = normal_equations(now.planes(), residual @ H, H, grid)
            assert close(state.A, A, 1e-5)
            after = row_error(residual, H)
            assert (after <= before * (1 + 1e-4)).all()
            before = after
    if pinned is not None:
        assert (state.rounded().dense()[pinned] == 0).all()


@every_grid
@with_pinned
def test_the_rounds_end_where_those_of_the_torch_form_end(
    with_pinned: bool,
    grid: Grid,
    weight: Tensor,
    curvature: Curvature,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within what near ties change; in chunks of few rows too."""
    pinned = outliers(grid, with_pinned, generator)
    start, target = start_of(grid, weight, curvature, pinned)
    found = rounds_compiled(start, target, curvature.H, pinned)
    expected = rounds_on_device(start, target, curvature.H, pinned)
    errors = [row_error(target - one.dense(), curvature.H).sum() for one in (found, expected)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=2e-3)
    assert float((found.codes != expected.codes).float().mean()) < 0.02
    monkeypatch.setattr(descent_module, "REFIT_BYTES", 4 * start.scales.shape[1] ** 2 * 33)
    chunked = rounds_compiled(start, target, curvature.H, pinned)
    assert float((chunked.codes != found.codes).float().mean()) < 0.01
    assert chunked.scales.dtype == found.scales.dtype


def test_a_group_without_levels_keeps_its_scale(curvature: Curvature) -> None:
    """Rows and groups of zeros: their equations are empty."""
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(2))
    weight[3], weight[:, 64:128] = 0, 0
    start, target = start_of(Grid(3, 64, True), weight, Curvature.flat(COLS, weight), None)
    found = rounds_compiled(start, target, curvature.H, None)
    assert bool(found.dense().isfinite().all())
    assert torch.equal(found.scale[3], start.scale[3])
    assert (found.dense()[3] == 0).all()


def test_a_refit_does_not_put_dual_levels_out_of_order(generator: torch.Generator) -> None:
    before = torch.cat([torch.rand(50, generator=generator) + 1, -torch.rand(50, generator=generator)])
    after = before + torch.randn(100, generator=generator)
    ordered = dual_binary.in_order(*after.chunk(2)).repeat(2)
    assert 10 < int(ordered.sum()) < 90
    expected = torch.where(ordered, after, before)
    refit_loops.keep_order(after.numpy(), before.numpy())
    assert torch.equal(after, expected)
