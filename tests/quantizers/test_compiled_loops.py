"""The compiled loops against their torch forms: the same scales, codes and errors, for every kind of grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import GRIDS, correlated_curvature
from torch import Tensor

from llmsqueeze.parallel import threads
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import gptq as gptq_module
from llmsqueeze.quantizers import grids
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.grids import Rounded, fit_compiled, fit_on_device, nearest_level, storable
from llmsqueeze.quantizers.loops import grids as grid_loops

ROWS, COLS = 130, 300  # two tiles and a short one, two panels and a short one
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
searched = pytest.mark.parametrize("search", [False, True], ids=["range", "search"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    """Rows of very different size, some of them zeros, some below what float16 has in full precision."""
    rows = torch.randn(ROWS, COLS, generator=generator) * 10.0 ** torch.linspace(-9, 3, ROWS)[:, None]
    return rows.index_fill(0, torch.tensor([5, 66]), 0.0)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and CPUs take the form of other devices."""

    def patch() -> None:
        monkeypatch.setattr(gptq_module, "panel_compiled", gptq_module.panel_on_device)
        monkeypatch.setattr(grids, "fit_compiled", grids.fit_on_device)

    return patch


@every_dtype
def test_scales_are_stored_as_torch_rounds_them(dtype: torch.dtype, generator: torch.Generator) -> None:
    """All sizes, ties, subnormal numbers of float16, and numbers that no dtype has."""
    scales = torch.randn(20000, generator=generator) * 2.0 ** (torch.rand(20000, generator=generator) * 280 - 150)
    for drop in (13, 16):  # halves between two neighbours of the dtype
        scales = torch.cat([scales, (scales.view(torch.int32) >> drop << drop | 1 << drop - 1).view(torch.float32)])
    scales = torch.cat([scales, torch.arange(3000) * 2.0**-25, torch.tensor([0.0, -0.0, 65519.0, 3.4e38, -1e-45])])
    scales = scales[~scales.isnan()]
    expected, stored = storable(scales, dtype), scales.numpy().copy()
    grid_loops.store(stored, grid_loops.settings(GRIDS[0], dtype, False)[2])
    assert torch.equal(torch.from_numpy(stored).view(torch.int32), expected.view(torch.int32))


@every_grid
@every_dtype
@searched
def test_a_group_gets_the_scale_of_the_torch_form(
    search: bool, dtype: torch.dtype, grid: Grid, weight: Tensor, generator: torch.Generator
) -> None:
    w, h = weight[:, 7:40], torch.rand(33, generator=generator) if search else None
    scale, zero = fit_compiled(w, h, grid, dtype)
    expected, expected_zero = fit_on_device(w, h, grid, dtype)
    assert torch.equal(zero, expected_zero)
    if h is None:
        # the base of one bit is a sum, which can be off by a rounding
        assert torch.allclose(scale, expected, rtol=2 * torch.finfo(dtype).eps if grid.bits == 1 else 0, atol=0)
    else:
        errors = [
            ((nearest_level(w.double(), s[:, None], z[:, None], grid) - w.double()).square() * h).sum(dim=1)
            for s, z in ((scale, zero), (expected, expected_zero))
        ]
        assert torch.allclose(*errors, rtol=1e-5, atol=0)
        if grid.bits > 1:
            assert float((scale == expected).float().mean()) > 0.9


@every_grid
@searched
@pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])
def test_gptq_chooses_the_codes_of_the_torch_form(
    with_pinned: bool,
    search: bool,
    grid: Grid,
    generator: torch.Generator,
    in_torch: Callable[[], None],
) -> None:
    if with_pinned and grid.half:
        pytest.skip("a half grid has no outliers")
    weight, curvature = torch.randn(ROWS, COLS, generator=generator) * 0.05, correlated_curvature(COLS, generator)
    pinned = torch.rand(ROWS, COLS, generator=generator) < 0.03 if with_pinned else None
    compiled = gptq(weight, grid, torch.bfloat16, curvature, pinned, search)
    in_torch()
    expected = gptq(weight, grid, torch.bfloat16, curvature, pinned, search)
    if search:  # a near tie of two ratios changes all that follows in its row
        alike = (compiled.scale == expected.scale).all(dim=1)
        assert float(alike.float().mean()) > 0.95
        compiled, expected = of_rows(compiled, alike), of_rows(expected, alike)
    assert torch.equal(compiled.scale, expected.scale)
    assert torch.equal(compiled.zero, expected.zero)
    assert float((compiled.codes != expected.codes).float().mean()) < 1e-4


def of_rows(rounded: Rounded, rows: Tensor) -> Rounded:
    return Rounded(rounded.codes[rows], rounded.scale[rows], rounded.zero[rows], rounded.grid)


def test_threads_share_the_rows(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, curvature = torch.randn(ROWS, COLS, generator=generator), correlated_curvature(COLS, generator)
    alone = gptq(weight, GRIDS[0], torch.bfloat16, curvature, None, True)
    spans: list[tuple[int, int]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads.over_rows(ROWS, lambda first, last: spans.append((first, last)))
    assert sorted(spans) == [(0, 80), (80, 130)]
    shared = gptq(weight, GRIDS[0], torch.bfloat16, curvature, None, True)
    assert torch.equal(shared.codes, alone.codes)
    assert torch.equal(shared.scale, alone.scale)
