"""Rounding methods against their slow twins: equal to them, or never worse."""

from __future__ import annotations

import pytest
import torch
from support import correlated_moments

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import rounder
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.quantizers.descent import corrected_target, descent
from llmsqueeze.quantizers.descent_on_device import coordinate_descent, least_squares, normal_equations, refit
from llmsqueeze.quantizers.gptq import gptq, panels
from llmsqueeze.quantizers.grids import fit_group, nearest_level, storable
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.methods import rounding_methods

COLS = 140  # a full panel and a short one
GRIDS = [Grid(2, 16, True), Grid(3, 24, False), Grid(4, -1, True), Grid(4, 135, False), Grid(8, 135, True)]
grids = pytest.mark.parametrize(
    "grid", GRIDS, ids=[f"{g.bits}bit-g{g.group_size}-{'sym' if g.symmetric else 'asym'}" for g in GRIDS]
)


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(12, COLS, generator=generator) * 0.05


@pytest.fixture
def moments(generator: torch.Generator) -> torch.Tensor:
    """Second moments of correlated inputs with one strong and one dead column."""
    scale = torch.ones(COLS)
    scale[5], scale[7] = 30, 0
    return correlated_moments(COLS, generator) * scale * scale[:, None]


@pytest.fixture
def curvature(moments: torch.Tensor) -> Curvature:
    return factorize(moments.clone())


@pytest.fixture
def pinned(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(12, COLS, generator=generator) < 0.03


def relative_error(weight: torch.Tensor, dense: torch.Tensor, moments: torch.Tensor) -> float:
    return float(row_error(weight - dense, moments).sum() / row_error(weight, moments).sum())


def slow_gptq(weight, grid, dtype, curvature, pinned=None, search=False):
    """Column by column, with no panels: every column's error goes to all later columns at once."""
    upper = curvature.upper
    w = weight.clone()
    cols = w.shape[1]
    dense = torch.zeros_like(w)
    for group in grid.slices(cols):
        mask = None if pinned is None else pinned[:, group]
        h = curvature.diagonal[group] if search else None
        scale, zero = fit_group(w[:, group], h, grid, dtype, mask)
        for j in range(group.start, group.stop):
            rounded = nearest_level(w[:, j], scale, zero, grid)
            if pinned is not None:
                rounded = torch.where(pinned[:, j], weight[:, j], rounded)
            dense[:, j] = rounded
            w[:, j + 1 :] -= torch.outer((w[:, j] - rounded) / upper[j, j], upper[j, j + 1 :])
    return dense


@grids
@pytest.mark.parametrize("search", [False, True], ids=["range", "search"])
@pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])
def test_gptq_equals_the_column_by_column_form(grid, search, with_pinned, weight, moments, pinned) -> None:
    pins = pinned if with_pinned else None
    weight, curvature = weight.double(), factorize(moments.double())  # so that no near-tie rounds differently
    fast = gptq(weight, grid, torch.float32, curvature, pins, search).dense().double()
    slow = slow_gptq(weight, grid, torch.float32, curvature, pins, search)
    if pins is not None:
        assert (fast[pins] == 0).all(), "an outlier's code is the zero level"
        fast = torch.where(pins, weight, fast)
    assert torch.allclose(fast, slow, atol=1e-7)


def test_panels_cover_every_column_once_and_respect_groups() -> None:
    for cols in (1, 64, 127, 300, 1000):
        for width in (1, 16, 24, 100, 128, 200, cols):
            cut = panels(cols, min(width, cols))
            assert [j for p in cut for j in range(p.start, p.stop)] == list(range(cols))
            starts = {p.start for p in cut}
            for start in range(0, cols, min(width, cols)):
                panel = next(p for p in cut if p.start <= start < p.stop)
                assert start in starts or start + width <= panel.stop or panel.stop == cols


@pytest.mark.parametrize("grid", [g for g in GRIDS if not g.symmetric], ids=str)
@pytest.mark.parametrize("quantizer", rounding_methods())
def test_weights_on_the_grid_survive(quantizer: str, grid: Grid, curvature: Curvature) -> None:
    """Integers already on the grid, spanning its range, come back unchanged."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, grid.max_code + 1, (6, COLS), generator=generator)
    for group in grid.slices(COLS):
        codes[:, group.start] = 0
        codes[:, group.start + 1] = grid.max_code
    weight = (codes - 2 ** (grid.bits - 1)).float() * 0.125
    rounded = rounder(quantizer)(weight, grid, torch.float32, curvature, None, False)
    assert torch.allclose(rounded.dense(), weight, atol=1e-6)


@grids
def test_each_quantizer_beats_the_one_before(grid: Grid, weight: torch.Tensor, curvature: Curvature) -> None:
    errors = [
        relative_error(weight, rounder(name)(weight, grid, torch.float32, curvature, None, True).dense(), curvature.H)
        for name in ("rtn", "gptq", "descent")
    ]
    assert errors[2] < min(errors[:2])
    if grid.bits <= 4:  # at 8 bits what feedback pushes out of a group's range can cost more than it saves
        assert errors[1] < errors[0]


@grids
@pytest.mark.parametrize("quantizer", rounding_methods())
def test_outliers_leave_the_range_and_are_the_zero_level(quantizer, grid, weight, curvature, pinned) -> None:
    huge = torch.where(pinned, 100.0, weight)
    rounded = rounder(quantizer)(huge, grid, torch.float32, curvature, pinned, False)
    assert (rounded.dense()[pinned] == 0).all()
    if quantizer == "rtn":
        plain = rtn(torch.where(pinned, 0.0, weight), grid, torch.float32)
        assert torch.equal(rounded.scale, plain.scale), "an outlier must not stretch its group"
        assert torch.equal(rounded.dense(), plain.dense())


def test_rtn_is_the_nearest_level(weight: torch.Tensor) -> None:
    grid = Grid(3, 16, False)
    rounded = rtn(weight, grid, torch.float32)
    levels = (torch.arange(8) - grid.expand(rounded.zero.float(), COLS)[..., None]) * grid.expand(rounded.scale, COLS)[
        ..., None
    ]
    nearest = (levels - weight[..., None]).abs().min(dim=-1).values
    assert torch.allclose((rounded.dense() - weight).abs(), nearest, atol=1e-7)


def test_scale_search_is_the_best_of_its_ratios(weight: torch.Tensor, moments: torch.Tensor) -> None:
    from llmsqueeze.quantizers.grids import RATIOS

    grid, h = Grid(2, 16, True), moments.diagonal()[:16]
    w = weight[:, :16]
    scale, zero = fit_group(w, h, grid, torch.float16)
    error = ((nearest_level(w, scale[:, None], zero[:, None], grid) - w) ** 2 * h).sum(1)
    base = w.abs().amax(1).clamp(min=0) * 2 / 3
    tried = [storable(base * sign * ratio, torch.float16) for sign in (1, -1) for ratio in RATIOS]
    errors = torch.stack([((nearest_level(w, s[:, None], zero[:, None], grid) - w) ** 2 * h).sum(1) for s in tried])
    assert torch.allclose(error, errors.min(dim=0).values, rtol=1e-5)
    assert torch.equal(scale, scale.half().float()), "the scale is what float16 can hold"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-9, 3e4, 1e30, -2.5], ids=str)
def test_a_stored_scale_is_finite_and_never_zero(value: float, dtype: torch.dtype) -> None:
    stored = storable(torch.tensor([value]), dtype).to(dtype)
    assert bool(stored.isfinite().all())
    assert bool((stored != 0).all())


@pytest.mark.parametrize("quantizer", rounding_methods())
def test_degenerate_weights_give_finite_results(quantizer: str) -> None:
    """All zero, one value, a single column, inputs that were never active."""
    for weight in (torch.zeros(4, 40), torch.full((4, 40), 0.3), torch.randn(4, 1)):
        for moments in (torch.zeros(weight.shape[1], weight.shape[1]), torch.eye(weight.shape[1])):
            for grid in (Grid(2, 16, True), Grid(3, 16, False)):
                curvature = factorize(moments.clone())
                dense = rounder(quantizer)(weight, grid, torch.float16, curvature, None, True).dense()
                assert bool(dense.isfinite().all())
                assert (dense - weight).abs().max() <= weight.abs().max() + 1e-6


def test_damping_grows_until_the_factor_exists(generator: torch.Generator) -> None:
    """Two tokens for forty inputs, off by more than rounding: not positive definite without growing damping."""
    x = torch.randn(2, 40, generator=generator)
    broken = x.T @ x - 0.05 * torch.eye(40)
    curvature = factorize(broken.clone())
    assert bool(curvature.upper.isfinite().all())
    assert torch.equal(curvature.upper, curvature.upper.triu())
    added = curvature.H - broken
    assert torch.allclose(added, added.diagonal().mean() * torch.eye(40), atol=1e-5)
    assert added.diagonal().mean() > 0.02 * broken.diagonal().mean(), "more than the usual damping"
    with pytest.raises(UnsupportedError, match="overflows"):
        factorize(torch.full((3, 3), torch.nan))


def test_the_factor_is_the_upper_root_of_the_inverse(moments: torch.Tensor) -> None:
    curvature = factorize(moments.double())
    upper = curvature.upper
    assert torch.allclose(upper.T @ upper @ curvature.H, torch.eye(COLS).double(), atol=1e-9)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()


def test_dead_columns_count_as_mean_ones(moments: torch.Tensor) -> None:
    assert moments[7, 7] == 0
    H = factorize(moments.clone()).H
    alive = torch.arange(COLS) != 7
    assert H[7, 7] == pytest.approx(float(moments.diagonal()[alive].mean()), rel=1e-5)


@grids
@pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])
def test_descent_never_raises_a_rows_error(grid, with_pinned, weight, curvature, pinned) -> None:
    pins = pinned if with_pinned else None
    target = weight if pins is None else weight.masked_fill(pins, 0.0)
    H = curvature.H
    state = gptq(weight, grid, torch.bfloat16, curvature, pins, True)
    before = row_error(target - state.dense(), H)
    for update in (lambda s: refit(s, target, H), lambda s: coordinate_descent(s, target, H, pins)):
        state = update(state)
        after = row_error(target - state.dense(), H)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    if pins is not None:
        assert (state.planes()[0][pins] == 0).all()


def test_a_pass_is_coordinate_descent(generator: torch.Generator) -> None:
    """Against the obvious twin: each column in turn takes the level with the least error, tried one by one."""
    weight = torch.randn(3, 20, generator=generator)
    x = torch.randn(60, 20, generator=generator)
    H = (x.T @ x / 60).double().float()
    grid = Grid(2, 8, False)
    start = rtn(weight, grid, torch.float32)
    fast = coordinate_descent(start, weight, H, None).codes.float()
    slow = start.codes.float()
    scale, zero = grid.expand(start.scale, 20), grid.expand(start.zero.float(), 20)
    for r in range(3):
        for j in range(20):
            trials = []
            for code in range(4):
                slow[r, j] = code
                residual = (weight[r] - (slow[r] - zero[r]) * scale[r]).double()
                trials.append(float(residual @ H.double() @ residual))
            slow[r, j] = min(range(4), key=trials.__getitem__)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("group_size", [8, 7, -1])
def test_refit_is_least_squares(group_size: int, generator: torch.Generator) -> None:
    """Against torch.linalg.lstsq on the inputs themselves."""
    weight, x = torch.randn(4, 20, generator=generator), torch.randn(90, 20, generator=generator)
    grid = Grid(3, group_size, True)
    levels = rtn(weight, grid, torch.float32).planes()[0]
    A, b = normal_equations([levels], weight @ (x.T @ x), x.T @ x, grid)
    scales = least_squares(A, b)
    for r in range(4):
        design = torch.stack([x[:, g] @ levels[r, g] for g in grid.slices(20)], dim=1)
        expected = torch.linalg.lstsq(design, (x @ weight[r])[:, None]).solution[:, 0]
        assert torch.allclose(scales[r], expected, rtol=1e-3, atol=1e-4)


def test_corrected_target_is_half_way_to_least_squares(generator: torch.Generator) -> None:
    weight = torch.randn(6, 30, generator=generator)
    x = torch.randn(500, 30, generator=generator)
    y = x + 0.3 * torch.randn(500, 30, generator=generator)
    curvature, drift = factorize(y.T @ y / 500), (x - y).T @ y / 500
    best = torch.linalg.lstsq(y, x @ weight.T).solution.T
    half = corrected_target(weight, weight @ drift, curvature)
    assert torch.allclose(half, (weight + best) / 2, atol=0.02)
    full = corrected_target(weight, weight @ drift, curvature, strength=1.0)

    def loss(w: torch.Tensor) -> float:
        return float((x @ weight.T - y @ w.T).square().mean())

    assert loss(best) <= loss(full) < loss(half) < loss(weight)


def test_descent_on_the_corrected_target_follows_the_drifting_inputs(generator: torch.Generator) -> None:
    weight = torch.randn(6, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator)
    y = 0.7 * x
    curvature, drift = factorize(y.T @ y / 500), (x - y).T @ y / 500
    plain = descent(weight, Grid(4, 32), torch.float32, curvature, search=True)
    target = corrected_target(weight, weight @ drift, curvature)
    corrected = descent(target, Grid(4, 32), torch.float32, curvature, search=True)
    output = x @ weight.T
    assert (output - y @ corrected.dense().T).norm() < 0.7 * (output - y @ plain.dense().T).norm()
