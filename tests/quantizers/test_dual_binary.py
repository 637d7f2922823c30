"""Dual binarization: exact at its initial scales, descent that never raises an error, bytes as counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import TEXT, correlated_curvature
from torch import Tensor

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.allocation import plan_yaml
from llmsqueeze.allocation.plan import Rows
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.errors import RecipeError
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import DualBinary, Grid
from llmsqueeze.publish.show import contents
from llmsqueeze.quantizers import dual_binary, rounder
from llmsqueeze.quantizers.curvature import Curvature, row_error
from llmsqueeze.quantizers.descent_on_device import coordinate_descent, least_squares, normal_equations, refit
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.grids import fit_group
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.resolve import make_recipe

GRIDS = [Grid(2, size, True, dual=True) for size in (16, 24, -1)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(10, 100, generator=generator) * 0.05


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return correlated_curvature(100, generator)


def slow_nearest(w: Tensor, levels: Tensor) -> Tensor:
    """The nearest of `levels` [4, rows] to every weight [rows, cols], all tried."""
    distance = (w[None] - levels[:, :, None]).abs()
    return levels.T.gather(1, distance.argmin(dim=0))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["plain", "mirrored"])
def test_the_initial_scales_round_to_the_nearest_level_exactly(sign: float, generator: torch.Generator) -> None:
    w = torch.randn(50, 64, generator=generator)
    s = sign * (torch.rand(50, generator=generator) + 0.2)
    alpha1, alpha2 = dual_binary.start(s)
    code = dual_binary.nearest_code(w, alpha1[:, None], alpha2[:, None])
    nearest = dual_binary.level_of(code, alpha1[:, None], alpha2[:, None])
    assert torch.equal(nearest, slow_nearest(w, torch.stack([-s, 0 * s, s, 2 * s])))


def test_the_bits_follow_the_papers_thresholds(generator: torch.Generator) -> None:
    """Alphas anywhere in order: the nearest level still, by H(w - (a1 + a2) / 2) and H(-(w - a1 b1 - a2 / 2))."""
    w = torch.randn(200, 32, generator=generator)
    alpha1 = torch.rand(200, 1, generator=generator) + 0.5
    alpha2 = -alpha1 * (0.05 + 0.9 * torch.rand(200, 1, generator=generator))
    b1 = (w - (alpha1 + alpha2) / 2 >= 0).float()
    b2 = (-(w - alpha1 * b1 - alpha2 / 2) >= 0).float()
    nearest = dual_binary.level_of(dual_binary.nearest_code(w, alpha1, alpha2), alpha1, alpha2)
    assert torch.allclose(nearest, alpha1 * b1 + alpha2 * b2)
    levels = torch.stack([alpha2, 0 * alpha1, alpha1 + alpha2, alpha1])[..., 0]
    assert torch.allclose((nearest - w).abs(), (slow_nearest(w, levels) - w).abs(), atol=1e-6)


@grids
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_part_equals_the_rounded_weight(
    grid: Grid, dtype: torch.dtype, weight: Tensor, curvature: Curvature
) -> None:
    rounded = rounder("descent")(weight, grid, dtype, curvature, None, True)
    part = parts.of_codes(rounded.codes, rounded.scale, rounded.zero, grid)
    assert isinstance(part, DualBinary)
    assert torch.equal(part.dense(), rounded.dense())
    again = parts.restore((10, 100), part.spec(), part.tensors())
    assert torch.equal(again.dense(), rounded.dense())
    layout = {name: (tuple(t.shape), t.dtype) for name, t in part.tensors().items()}
    assert layout == parts.layout((10, 100), part.spec())


def test_group_64_takes_two_and_a_half_bits() -> None:
    grid = Grid(2, 64, True, dual=True)
    spec = parts.grid_spec(grid, torch.bfloat16)
    assert parts.layout_nbytes((512, 1024), [spec]) * 8 / (512 * 1024) == 2.5
    assert parts.spec_grid(spec) == grid


def test_some_rows_of_a_weight(weight: Tensor, curvature: Curvature) -> None:
    on = torch.tensor([True, False] * 5)
    rounded = rtn(weight[on], GRIDS[0], torch.float32, curvature, None, True)
    part = parts.of_codes(rounded.codes, rounded.scale, rounded.zero, GRIDS[0], on)
    assert torch.equal(part.dense()[on], rounded.dense())
    assert (part.dense()[~on] == 0).all()
    assert torch.equal(parts.restore((10, 100), part.spec(), part.tensors()).dense(), part.dense())


def test_the_search_is_better_than_the_range_and_chooses_the_sign(generator: torch.Generator) -> None:
    skewed = torch.randn(64, 32, generator=generator).abs() * torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    grid, h = Grid(2, 32, True, dual=True), torch.rand(32, generator=generator) + 0.1

    def error(pair: tuple[Tensor, Tensor]) -> Tensor:
        code = dual_binary.nearest_code(skewed, pair[0][:, None], pair[1][:, None])
        return ((dual_binary.level_of(code, pair[0][:, None], pair[1][:, None]) - skewed) ** 2 * h).sum(dim=1)

    searched = fit_group(skewed, h, grid, torch.float32)
    assert (error(searched) <= error(fit_group(skewed, None, grid, torch.float32)) * (1 + 1e-6)).all()
    assert (searched[0][::2] > 0).float().mean() > 0.9
    assert (searched[0][1::2] < 0).float().mean() > 0.9


@grids
def test_each_quantizer_beats_the_one_before(grid: Grid, weight: Tensor, curvature: Curvature) -> None:
    errors = [
        float(row_error(weight - q(weight, grid, torch.float32, curvature, None, True).dense(), curvature.H).sum())
        for q in map(rounder, ("rtn", "gptq", "descent"))
    ]
    assert errors[2] < errors[1] < errors[0]


@grids
@pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])
def test_descent_never_raises_a_rows_error(grid, with_pinned, weight, curvature, generator) -> None:
    pins = torch.rand(10, 100, generator=generator) < 0.05 if with_pinned else None
    target = weight if pins is None else weight.masked_fill(pins, 0.0)
    state = gptq(weight, grid, torch.bfloat16, curvature, pins, True)
    before = row_error(target - state.dense(), curvature.H)
    H = curvature.H
    for update in (lambda s: refit(s, target, H), lambda s: coordinate_descent(s, target, H, pins)) * 2:
        state = update(state)
        after = row_error(target - state.dense(), curvature.H)
        assert (after <= before * (1 + 1e-4)).all()
        assert dual_binary.in_order(*state.scales.float().chunk(2, dim=1)).all()
        before = after
    if pins is not None:
        assert (state.dense()[pins] == 0).all()


def test_the_refit_of_both_scales_is_least_squares(generator: torch.Generator) -> None:
    weight, x = torch.randn(4, 20, generator=generator), torch.randn(90, 20, generator=generator)
    grid = Grid(2, 8, True, dual=True)
    planes = rtn(weight, grid, torch.float32).planes()
    A, b = normal_equations(planes, weight @ (x.T @ x), x.T @ x, grid)
    scales = least_squares(A, b)
    for r in range(4):
        design = torch.stack([x[:, g] @ plane[r, g] for plane in planes for g in grid.slices(20)], dim=1)
        expected = torch.linalg.lstsq(design, (x @ weight[r])[:, None]).solution[:, 0]
        assert torch.allclose(scales[r], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ordered_levels_stay_ordered_in_the_dtype_of_the_file(dtype: torch.dtype, generator: torch.Generator) -> None:
    """The dtype can round each alpha towards the other: a file had -0.0732 and 0.0732."""
    alpha1 = torch.rand(200_000, generator=generator) + 0.05
    ratio = torch.rand(200_000, generator=generator) * 0.1 + 0.95
    first, second, _ = dual_binary.put_in_order(alpha1, -alpha1 * ratio, torch.ones_like(alpha1))
    assert bool(dual_binary.in_order(first.to(dtype).float(), second.to(dtype).float()).all())
    _, _, moved = dual_binary.put_in_order(first, second, torch.ones_like(alpha1))
    assert not moved.any()


def test_levels_are_put_in_order_and_no_others_touched(generator: torch.Generator) -> None:
    alpha1 = torch.tensor([1.0, 1.0, 0.3, -1.0, -0.2, -1.0])
    alpha2 = torch.tensor([-0.5, 0.2, -0.4, 0.5, 0.4, -0.1])
    first, second, moved = dual_binary.put_in_order(alpha1, alpha2, torch.tensor([1.0, 1, 1, -1, -1, -1]))
    assert dual_binary.in_order(first, second).all()
    assert moved.tolist() == [False, True, True, False, True, True]
    assert torch.equal(first[~moved], alpha1[~moved])
    assert torch.equal(second[~moved], alpha2[~moved])


def test_the_share_of_zeros_is_counted(weight: Tensor) -> None:
    rounded = rtn(weight, GRIDS[0], torch.float32)
    part = parts.of_codes(rounded.codes, rounded.scale, rounded.zero, GRIDS[0])
    first, second = rounded.planes()
    expected = float((first == 0).float().mean()), float((second == 0).float().mean())
    assert part.zero_shares() == pytest.approx(expected)


def test_the_method_writes_and_opens_dual_weights(compressed: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(compressed("dual"))
    config = checkpoint.config["quantization_config"]
    assert config["format_version"] == 3
    model = llmsqueeze.load(str(compressed("dual")))
    for name, entry in config["weights"].items():
        (spec,) = entry["parts"]
        shape = tuple(entry["shape"])
        assert spec == {"part": "dual_binary", "group_size": 64, "dtype": spec["dtype"]}
        tensors = {t: checkpoint.read(f"{name}.parts.0.{t}") for t in parts.layout(shape, spec)}
        part = parts.restore(shape, spec, tensors)
        assert torch.equal(model.get_submodule(name).dense(), part.dense())
        assert dual_binary.in_order(tensors["alpha1"].float(), tensors["alpha2"].float()).all()


def test_show_reports_the_zeros_of_the_planes(compressed: Callable[[str], Path]) -> None:
    shown = contents(str(compressed("dual")))
    checkpoint = open_checkpoint(compressed("dual"))
    ones, total = [0, 0], 0
    for name, entry in checkpoint.config["quantization_config"]["weights"].items():
        for i in range(2):
            plane = checkpoint.read(f"{name}.parts.0.plane{i + 1}").view(torch.uint8)
            ones[i] += sum(int(((plane >> bit) & 1).sum()) for bit in range(8))
        total += entry["shape"][0] * entry["shape"][1]
    assert shown.plane_zeros == pytest.approx((1 - ones[0] / total, 1 - ones[1] / total))
    assert shown.plane_zeros is not None
    assert sum(shown.plane_zeros) > 1, "the levels are mostly zeros, which is the paper's point"


def test_outliers_stay_exact_beside_dual_weights(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    settings = {"method": "gwq", "quantizer": "rtn", "levels": "dual", "bits": 2, "outliers": 0.02, **TEXT}
    quantize(str(demo_of(1)), make_recipe(settings), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    original = open_checkpoint(demo_of(1))
    name, entry = next(iter(checkpoint.config["quantization_config"]["weights"].items()))
    assert [spec["part"] for spec in entry["parts"]] == ["dual_binary", "sparse"]
    shape = tuple(entry["shape"])
    sparse = parts.restore(
        shape, entry["parts"][1], {t: checkpoint.read(f"{name}.parts.1.{t}") for t in ("index", "row_count", "value")}
    )
    outliers = sparse.dense() != 0
    assert outliers.any()
    assert torch.equal(sparse.dense()[outliers], original.read(f"{name}.weight").float()[outliers])


def test_the_budget_may_give_dual_rows(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    settings = {"method": "budget", "quantizer": "rtn", "bits": 2.4, "widths": "1,4", "dual": True, **TEXT}
    summary = quantize(str(demo_of(1)), make_recipe(settings), tmp_path / "out")
    entries = open_checkpoint(tmp_path / "out").config["quantization_config"]["weights"].values()
    kinds = {spec["part"] for entry in entries for spec in entry["parts"]}
    assert kinds == {"affine", "dual_binary"}, "between 1 and 4 bits some rows are worth two"
    assert summary.bits_per_weight <= 2.4
    assert "dual" in " ".join(row.parts for row in contents(str(tmp_path / "out")).rows)


def test_the_method_has_the_papers_groups_unless_told() -> None:
    assert make_recipe({"method": "dbllm"}).group_size == 64
    assert make_recipe({"method": "dbllm", "group_size": 128}).group_size == 128
    assert make_recipe({"method": "descent"}).group_size == 128


def test_a_plan_file_can_say_dual() -> None:
    assert str(Grid(2, 64, True, dual=True)) == "2 bit g64 dual"
    assert plan_yaml._rows("2 bit g64 dual", 7) == Rows(Grid(2, 64, True, dual=True), 7)
    with pytest.raises(RecipeError, match="2 to 2 bits"):
        plan_yaml._rows("3 bit g64 dual", 7)
