"""Triton's kernels against the torch forms and the compiled loops: the same codes, for grids of all kinds and steps.

Without a GPU they run in Triton's interpreter (conftest.py). It takes milliseconds for each column of a tile, however
many rows the tile has; so most tests have panels of 32 columns and one tile. With a GPU they run on it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretended import pretended_gpu
from support import correlated_curvature, thorough
from torch import Tensor

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import gptq as gptq_module
from llmsqueeze.quantizers import grids, kernels
from llmsqueeze.quantizers.coded import feedback_compiled, round_on_device
from llmsqueeze.quantizers.coded_on_device import feedback
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.descent import Descent, rounds_on_device
from llmsqueeze.quantizers.descent_on_device import coordinate_descent
from llmsqueeze.quantizers.gptq import gptq
from llmsqueeze.quantizers.grids import Rounded, fit_compiled, fit_on_device, nearest_level
from llmsqueeze.quantizers.kernels import _tried as tried
from llmsqueeze.quantizers.steps import RoundedToSteps

pytest.importorskip("triton")
from llmsqueeze.quantizers.kernels import feedback as feedback_kernels
from llmsqueeze.quantizers.kernels import levels, scales, sweep, trial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLS, PANEL = 21, 44, 32  # a panel and a short one
GRIDS = [
    Grid(2, 16, True),
    Grid(3, 32, False),
    Grid(4, 7, False),  # whole groups in a shorter panel
    Grid(8, -1, False),
    Grid(3, 40, True),  # more than a panel
    Grid(1, 16, True, half=True),
    Grid(3, 25, True, half=True),
    Grid(2, 16, True, dual=True),
    Grid(2, -1, True, dual=True),
]
CASES = [(grid, False) for grid in GRIDS] + [(GRIDS[i], True) for i in (0, 2, 4, 7)]
every_case = pytest.mark.parametrize(
    ("grid", "with_pinned"),
    [CASES[at] if at in (0, 7, 10) else thorough(*CASES[at]) for at in range(len(CASES))],
    ids=[f"{grid}{' outliers' * pinned}" for grid, pinned in CASES],
)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(levels, "ROWS", 32)


@pytest.fixture
def short_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gptq_module, feedback_kernels, levels):
        monkeypatch.setattr(module, "PANEL", PANEL)


def moved(curvature: Curvature, device: str) -> Curvature:
    return Curvature(*(each.to(device) for each in (curvature.H, curvature.upper, curvature.damping)))


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return moved(correlated_curvature(COLS, generator), DEVICE)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return (torch.randn(ROWS, COLS, generator=generator) * 0.05).to(DEVICE)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and all devices take the kernels; the CPU too where it has compiled loops."""

    def patch() -> None:
        monkeypatch.setattr(kernels, "usable", lambda tensor: True)
        monkeypatch.setattr(gptq_module, "panel_compiled", feedback_kernels.round_panel)
        monkeypatch.setattr(grids, "fit_compiled", scales.fit)

    return patch


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and all devices take the torch forms."""

    def patch() -> None:
        monkeypatch.setattr(kernels, "usable", lambda tensor: False)
        monkeypatch.setattr(gptq_module, "panel_compiled", gptq_module.panel_on_device)
        monkeypatch.setattr(grids, "fit_compiled", grids.fit_on_device)

    return patch


def outliers(wanted: bool, generator: torch.Generator) -> Tensor | None:
    return (torch.rand(ROWS, COLS, generator=generator) < 0.04).to(DEVICE) if wanted else None


def same(one: Rounded, other: Rounded) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("codes", "scale", "zero"))


def share(one: Tensor, other: Tensor) -> float:
    """The share of entries that differ."""
    return float((one != other).float().mean())


# ------------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [Grid(4, symmetric=False), Grid(3, symmetric=True), *GRIDS[5:8]], ids=str)
def test_the_range_gives_the_scales_of_the_torch_form(
    grid: Grid, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Of rows of all sizes, of zeros, and of scales that float16 has in less precision or not at all."""
    w = torch.randn(45, 300, generator=generator) * 10.0 ** torch.linspace(-12, 6, 45)[:, None]
    w = w.index_fill(0, torch.tensor([5, 16]), 0.0)[:, 7:140].to(DEVICE)
    scale, zero = scales.fit(w, None, grid, dtype)
    for form in (fit_on_device, fit_compiled) if DEVICE == "cpu" else (fit_on_device,):
        expected, expected_zero = form(w, None, grid, dtype)
        assert torch.equal(zero, expected_zero) or grid.dual
        # the base of one bit is a sum, whose order differs
        assert torch.allclose(scale, expected, rtol=2 * torch.finfo(dtype).eps if grid.bits == 1 else 0, atol=0)
        if grid.dual:
            assert torch.equal(zero, -scale / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_are_stored_as_torch_rounds_them(
    dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sizes, ties, subnormal numbers of float16, and numbers that no dtype has."""
    monkeypatch.setattr(levels, "ROWS", 1024 if DEVICE == "cpu" else levels.ROWS)
    sizes = torch.rand(900, generator=generator) * 2.0 ** (torch.rand(900, generator=generator) * 270 - 145)
    for drop in (13, 16):  # halves between two neighbours of the dtype
        sizes = torch.cat([sizes, (sizes.view(torch.int32) >> drop << drop | 1 << drop - 1).view(torch.float32)])
    sizes = torch.cat([sizes, torch.arange(300) * 2.0**-25, torch.tensor([65519.0, 65520.0, 3.3e38])])
    w, grid = 2 * sizes[:, None].to(DEVICE), Grid(2, -1, True, dual=True)  # the scale is half of the largest weight
    assert torch.equal(scales.fit(w, None, grid, dtype)[0], fit_on_device(w, None, grid, dtype)[0])


@every_grid
def test_a_search_finds_scales_as_good_as_those_of_the_torch_form(grid: Grid, generator: torch.Generator) -> None:
    """The order of sums differs, so of two ratios that are nearly equal either may win."""
    w, h = torch.randn(ROWS, 150, generator=generator).T.contiguous().T.to(DEVICE), torch.rand(150, generator=generator)
    w, h = w[:, 3:], h[3:].to(DEVICE)
    found = scales.fit(w, h, grid, torch.bfloat16)
    for form in (fit_on_device, fit_compiled) if DEVICE == "cpu" else (fit_on_device,):
        expected = form(w, h, grid, torch.bfloat16)
        errors = [
            ((nearest_level(w.double(), s[:, None], z[:, None], grid) - w.double()).square() * h).sum(dim=1)
            for s, z in (found, expected)
        ]
        assert torch.allclose(*errors, rtol=1e-5, atol=0)
        if grid.bits > 1:
            assert share(found[0], expected[0]) < 0.1
    assert not torch.equal(found[0], scales.fit(w, None, grid, torch.bfloat16)[0])


# ------------------------------------------------------------------------------------------------------ grids


@pytest.mark.usefixtures("short_panels")
@every_case
def test_gptq_and_a_sweep_choose_the_codes_of_the_other_forms(
    grid: Grid,
    with_pinned: bool,
    weight: Tensor,
    curvature: Curvature,
    generator: torch.Generator,
    in_torch: Callable[[], None],
    by_kernels: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit by bit: the operations and their order are the same. Scales of one bit are sums, so they are given."""
    pinned = outliers(with_pinned, generator)
    compiled = gptq(weight, grid, torch.bfloat16, curvature, pinned)
    in_torch()
    expected = gptq(weight, grid, torch.bfloat16, curvature, pinned)
    by_kernels()
    if grid.bits == 1:
        monkeypatch.setattr(grids, "fit_compiled", fit_on_device)
        monkeypatch.setattr(scales, "fit", fit_on_device)
    found = gptq(weight, grid, torch.bfloat16, curvature, pinned)
    assert same(found, expected)
    assert same(found, compiled) or grid.bits == 1
    target = weight if pinned is None else weight.masked_fill(pinned, 0.0)
    swept = sweep.sweep_grid(found, target, curvature.H, pinned)
    assert same(swept, coordinate_descent(found, target, curvature.H, pinned))
    assert share(swept.codes, found.codes) > 0.01
    if DEVICE == "cpu":  # the compiled pass carries the gradient along, so its sums have another order
        state = Descent.of(found, target, curvature.H, pinned)
        state.sweep()
        assert share(swept.codes, state.codes) < 2e-3


@pytest.mark.thorough
@pytest.mark.usefixtures("short_panels")
def test_rounds_with_a_search_end_as_those_of_the_torch_form(
    weight: Tensor, curvature: Curvature, in_torch: Callable[[], None], by_kernels: Callable[[], None]
) -> None:
    grid = Grid(3, 16, True)
    in_torch()
    expected = gptq(weight, grid, torch.bfloat16, curvature, None, True)
    rounds = rounds_on_device(expected, weight, curvature.H, None)
    by_kernels()
    found = gptq(weight, grid, torch.bfloat16, curvature, None, True)
    alike = (found.scale == expected.scale).all(dim=1)
    assert float(alike.float().mean()) > 0.9
    assert torch.equal(found.codes[alike], expected.codes[alike])
    assert same(rounds_on_device(expected, weight, curvature.H, None), rounds)


@pytest.mark.thorough
@pytest.mark.usefixtures("short_panels")
def test_views_of_any_layout_and_several_tiles_are_rounded_alike(
    weight: Tensor,
    curvature: Curvature,
    generator: torch.Generator,
    by_kernels: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid, pinned = Grid(3, 16, False), outliers(True, generator)
    assert pinned is not None
    by_kernels()
    expected = gptq(weight, grid, torch.bfloat16, curvature, pinned)
    target = weight.masked_fill(pinned, 0.0)
    swept = sweep.sweep_grid(expected, target, curvature.H, pinned)

    def turned(values: Tensor) -> Tensor:
        return values.T.contiguous().T

    upper = turned(curvature.upper)
    assert not upper.is_contiguous()
    monkeypatch.setattr(levels, "ROWS", 8)
    strided = Curvature(turned(curvature.H), upper, curvature.damping)
    assert same(gptq(turned(weight), grid, torch.bfloat16, strided, turned(pinned)), expected)
    codes, scale, zero = (turned(each) for each in (expected.codes, expected.scale, expected.zero))
    found = sweep.sweep_grid(Rounded(codes, scale, zero, grid), turned(target), strided.H, turned(pinned))
    assert share(found.codes, swept.codes) < 2e-3  # the product before the kernel may sum in another order


# ------------------------------------------------------------------------------------------------------ steps


@pytest.mark.usefixtures("short_panels")
@pytest.mark.parametrize(("coarse", "with_pinned"), [(0.02, False), (2.0, True)], ids=["fine", "coarse, outliers"])
def test_coded_weights_get_the_integers_of_the_other_forms(
    coarse: float,
    with_pinned: bool,
    curvature: Curvature,
    generator: torch.Generator,
    in_torch: Callable[[], None],
    by_kernels: Callable[[], None],
) -> None:
    weight = torch.randn(ROWS, COLS, generator=generator).index_fill(0, torch.tensor([3, 18]), 0.0).to(DEVICE)
    row = (torch.arange(ROWS) // 8 - 22 + int(16 * torch.tensor(coarse).log2())).to(DEVICE)
    col = torch.randint(0, 40, (COLS,), generator=generator).to(DEVICE)
    pinned, start = outliers(with_pinned, generator), RoundedToSteps(weight, row, col, row - 64)
    in_torch()
    expected = feedback(weight, start, curvature, pinned)
    rounded = round_on_device(weight, start, curvature, pinned)
    by_kernels()
    found = feedback_kernels.feedback(weight, start, curvature, pinned)
    assert torch.equal(found.integers, expected.integers)
    assert float(found.integers.abs().max()) > (100 if coarse < 1 else 1)
    if DEVICE == "cpu":
        assert torch.equal(found.integers, feedback_compiled(weight, start, curvature, pinned).integers)
    found = round_on_device(weight, start, curvature, pinned)
    assert torch.equal(found.integers, rounded.integers)
    assert torch.equal(found.row_exponent, rounded.row_exponent)
    assert share(found.integers, expected.integers) > 0.01


@pytest.mark.parametrize("offset", [0, 4, 2**21, 2**22 - 20, 2**23 - 20, 2**24, 2**30])
def test_half_way_cases_go_to_the_even_number(offset: int) -> None:
    """And integers that float32 has without halves, or with gaps, stay what they are."""
    values = (torch.arange(-40, 40).float() / 2 + offset).view(2, -1)
    values = torch.cat([values, -values]).to(DEVICE)
    codes, w, one = torch.zeros_like(values), values.clone(), torch.ones(40, device=DEVICE)
    given = levels.Levels.of_steps(one[:4], one), slice(0, 40), slice(0, 40)
    feedback_kernels.round_columns(w, values, None, torch.eye(40, device=DEVICE), *given, codes, w.clone())
    assert torch.equal(codes, values.round())


@pytest.mark.thorough
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """For GPUs of 2020 and 2022, ahead of time, and nothing in them is less exact than in torch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).with_name("ahead_of_time.py"))]
    lines = subprocess.run(
        program, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kinds = [json.loads(line) for line in lines]
    assert {kind["kernel"] for kind in kinds} == {"feedback_kernel", "sweep_kernel", "fit_kernel"}
    assert {kind["capability"] for kind in kinds} == {80, 90}
    for kind in kinds:
        assert kind["bytes"] > 0
        assert kind["inexact"] == 0, "a fused product, a division that is not IEEE's, or subnormal numbers cut to zero"
        assert kind["shared"] <= 48 << 10, "what every GPU has"


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.thorough
def test_a_trial_sees_whether_a_kernel_computes_what_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.differences(DEVICE) == []
    fit, descend, round_columns = scales.fit, sweep.descend, feedback_kernels.round_columns
    monkeypatch.setattr(scales, "fit", lambda *given: [each * 2 for each in fit(*given)])
    monkeypatch.setattr(sweep, "descend", lambda *given: descend(*given).clamp(max=6))
    monkeypatch.setattr(
        feedback_kernels, "round_columns", lambda *given: round_columns(*given[:3], given[3] * 1.01, *given[4:])
    )
    assert trial.differences(DEVICE) == ["scales", "feedback", "sweep"]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for NVIDIA GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def tried_anew() -> bool:
    return bool(tried.__wrapped__(torch.device("cuda", 0)))


def test_kernels_are_used_where_a_trial_succeeded(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "differences", lambda device: [])
    assert tried_anew()
    with monkeypatch.context() as older:
        older.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not tried_anew()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not tried_anew()


@pytest.mark.parametrize("failure", [["sweep"], RuntimeError("no C compiler")], ids=["differs", "fails"])
def test_a_trial_that_fails_warns_and_leaves_the_torch_form(
    failure: list[str] | RuntimeError, with_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differences(device: torch.device) -> list[str]:
        if isinstance(failure, list):
            return failure
        raise failure

    monkeypatch.setattr(trial, "differences", differences)
    with pytest.warns(UserWarning, match="sweep" if isinstance(failure, list) else "RuntimeError: no C compiler"):
        assert not tried_anew()


def test_a_gpu_takes_the_kernels_and_without_triton_the_torch_form(
    with_cuda: None, weight: Tensor, curvature: Curvature, in_torch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu():
        on_gpu = weight.cpu().to("cuda")
        monkeypatch.setattr(kernels, "_tried", lambda device: True)
        assert gptq_module.form_for(on_gpu) is feedback_kernels.round_panel
        assert not kernels.usable(on_gpu.double())
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(kernels, "_tried", tried.__wrapped__)
        assert importlib.util.find_spec("triton") is None
        there = moved(moved(curvature, "cpu"), "cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gptq_module.form_for(on_gpu) is gptq_module.panel_on_device
            found = gptq(on_gpu, GRIDS[0], torch.bfloat16, there).codes.cpu()
    in_torch()
    assert torch.equal(found, gptq(weight.cpu(), GRIDS[0], torch.bfloat16, moved(curvature, "cpu")).codes)
