"""Some rows of a weight on one grid, some on another: the stored tensors, their weight, and that rows are independent.

Parts of rows against entry-by-entry twins; mixed weights against the same rows of the weight on one grid.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import correlated_curvature, random_affine
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Rows, WeightPlan
from llmsqueeze.compress.weights.weight import WeightSettings, compress_weight
from llmsqueeze.parts import Affine, Grid, Part, Sparse
from llmsqueeze.quantizers import rounder
from llmsqueeze.quantizers.curvature import Curvature, row_error
from llmsqueeze.quantizers.grids import fit_group, nearest_level
from llmsqueeze.recipe.methods import rounding_methods
from llmsqueeze.recipe.resolve import make_recipe

ROWS, COLS = 37, 136  # a full panel and a short one
PART_COLS = 40  # of the parts that are also computed entry by entry

KINDS = {"symmetric": (True, False), "half": (True, True), "asymmetric": (False, False)}
GRIDS = [
    Grid(bits, size, *KINDS[kind])
    for bits in (1, 2, 3, 8)
    for kind, size in (("symmetric", 16), ("half", 24), ("asymmetric", -1))
    if bits > 1 or kind == "half"  # one bit has half-integer levels only
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def some_rows(generator: torch.Generator) -> Tensor:
    """bool [rows]: about half of them, neither none nor all."""
    chosen = torch.rand(ROWS, generator=generator) < 0.5
    chosen[0], chosen[-1] = True, False
    return chosen


@every_grid
def test_a_part_of_some_rows_is_zero_on_the_others_and_comes_back(grid: Grid, generator: torch.Generator) -> None:
    """And its layout is that of its tensors, to the byte."""
    part, dense = random_affine(grid, ROWS, PART_COLS, generator, some_rows(generator))
    shape = ROWS, PART_COLS
    assert part.shape == shape
    assert torch.equal(part.dense(), dense)
    restored = parts.restore(shape, part.spec(), part.tensors())
    assert torch.equal(restored.dense(), dense)
    assert restored.spec() == part.spec()
    stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.tensors().items()}
    assert parts.layout(shape, part.spec()) == stored
    assert parts.layout_nbytes(shape, [part.spec()]) == parts.nbytes([part])


def test_marking_rows_costs_one_bit_each(generator: torch.Generator) -> None:
    part, _ = random_affine(Grid(3, 16, True), ROWS, PART_COLS, generator, some_rows(generator))
    assert part.rows is not None
    assert part.rows.nbytes == 4 * 2, "37 rows, two words"


@pytest.mark.parametrize("pair", [(GRIDS[0], GRIDS[-1]), (Grid(3, 16, True), Grid(8, -1, False))], ids=str)
def test_parts_on_disjoint_rows_sum_to_the_weight(pair: tuple[Grid, Grid], generator: torch.Generator) -> None:
    chosen = some_rows(generator)
    (first, dense), (second, other) = (
        random_affine(grid, ROWS, PART_COLS, generator, rows)
        for grid, rows in zip(pair, (chosen, ~chosen), strict=True)
    )
    total = parts.sum_of_parts([first, second])
    assert torch.equal(total[chosen], dense[chosen])
    assert torch.equal(total[~chosen], other[~chosen])


@pytest.mark.parametrize("bits", range(1, 9))
def test_half_integer_levels_are_symmetric_and_skip_zero(bits: int) -> None:
    """Code 0 .. 2**bits - 1 stands for ..., -3/2, -1/2, +1/2, +3/2, ... of the scale."""
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    grid = Grid(bits, -1, True, True)
    levels = Affine.from_codes(codes, torch.ones(1, 1), torch.zeros(1, 1), grid).dense()[0]
    positive = [i + 0.5 for i in range(2 ** (bits - 1))]
    assert levels.tolist() == [-level for level in reversed(positive)] + positive


@pytest.mark.parametrize("quantizer", rounding_methods())
@pytest.mark.parametrize("search", [False, True], ids=["range", "search"])
@pytest.mark.parametrize("bits", [1, 4])
def test_a_zero_row_on_a_half_grid_stays_next_to_zero(
    bits: int, search: bool, quantizer: str, generator: torch.Generator
) -> None:
    weight = torch.randn(4, 48, generator=generator)
    weight[2] = 0
    grid, curvature = Grid(bits, 16, True, True), Curvature.flat(48, weight)
    dense = rounder(quantizer)(weight, grid, torch.float16, curvature, None, search).dense()
    assert float(dense[2].abs().max()) < 1e-4, "there is no level 0, but float16 scales go down to 6e-8"
    assert (dense[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_no_scale_from_a_long_list_beats_the_one_bit_fit(weighted: bool, generator: torch.Generator) -> None:
    w, h = torch.randn(6, 40, generator=generator), torch.rand(40, generator=generator) + 0.01
    h = h if weighted else torch.ones(40)
    grid = Grid(1, -1, True, True)

    def error(scale: Tensor) -> Tensor:
        rounded = nearest_level(w, scale[:, None], torch.full((6, 1), 0.5), grid)
        assert torch.allclose(rounded.abs(), scale[:, None] / 2), "levels are +-scale/2"
        return (rounded - w).square().mv(h)

    fitted = error(fit_group(w, h if weighted else None, grid, torch.float32)[0])
    listed = torch.stack([error(torch.full((6,), i / 100)) for i in range(1, 600)]).amin(dim=0)
    assert (fitted <= listed * (1 + 1e-5)).all()


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLS, generator=generator) * 0.05


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return correlated_curvature(COLS, generator)


def planned(quantizer: str, *rows: Rows, outliers: int = 0, dtype: torch.dtype = torch.bfloat16) -> WeightPlan:
    return WeightPlan("w", (ROWS, COLS), dtype, quantizer, rows, outliers)


def recipe(quantizer: str, **settings: Any) -> WeightSettings:
    return WeightSettings.of(make_recipe({"method": quantizer} | settings))


def dealt(*counts: int) -> Tensor:
    """Which of the plan's grids each row is on, [rows], scattered."""
    choice = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return choice[torch.randperm(ROWS, generator=torch.Generator().manual_seed(7))]


MIX = (Grid(8, 64, True), Grid(4, 64, False), Grid(2, 64, True, True), Grid(1, 64, True, True))
COUNTS = (4, 10, 20, 3)


@pytest.mark.parametrize(("quantizer", "search"), [("rtn", False), *((name, True) for name in rounding_methods())])
def test_rows_of_a_mix_equal_those_of_the_weight_on_one_grid(
    quantizer: str, search: bool, weight: Tensor, curvature: Curvature
) -> None:
    """Bit by bit: what a row becomes depends on no other row, and on no other row's grid."""
    chosen, settings = dealt(*COUNTS), recipe(quantizer, search=search)
    mix = planned(quantizer, *(Rows(grid, n) for grid, n in zip(MIX, COUNTS, strict=True)))
    weight_parts, dense, _ = compress_weight(weight, weight, mix, curvature, None, chosen, settings)
    for i, grid in enumerate(MIX):
        alone, whole, _ = compress_weight(
            weight, weight, planned(quantizer, Rows(grid, ROWS)), curvature, None, None, settings
        )
        on = chosen == i
        part = weight_parts[i]
        assert isinstance(part, Affine)
        assert isinstance(alone[0], Affine)
        assert torch.equal(part.codes, alone[0].codes[on])
        assert torch.equal(part.scale, alone[0].scale[on])
        assert torch.equal(dense[on], whole[on])


@pytest.mark.parametrize("quantizer", rounding_methods())
def test_the_target_of_one_row_moves_no_other(quantizer: str, weight: Tensor, curvature: Curvature) -> None:
    mix = planned(quantizer, Rows(Grid(8, 64, True), 7), Rows(Grid(3, 64, False), 30))
    chosen = dealt(7, 30)
    before = compress_weight(weight, weight, mix, curvature, None, chosen, recipe(quantizer))[1]
    moved = weight.clone()
    moved[5] *= 1.7
    after = compress_weight(moved, moved, mix, curvature, None, chosen, recipe(quantizer))[1]
    same = torch.arange(ROWS) != 5
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[5], after[5])


@pytest.mark.parametrize("quantizer", rounding_methods())
def test_outliers_of_rows_keep_their_value_exactly(quantizer: str, weight: Tensor, curvature: Curvature) -> None:
    """Every row keeps as many weights as its entry in the plan says: those that w^2 * H[j, j] ranks first."""
    grids = (Rows(Grid(4, 64, True), 10, 5), Rows(Grid(3, 64, True), 20, 2), Rows(Grid(2, 64, True, True), 7))
    chosen = dealt(10, 20, 7)
    mix = planned(quantizer, *grids, dtype=torch.float16)
    weight_parts, dense, _ = compress_weight(weight, weight, mix, curvature, None, chosen, recipe(quantizer))
    sparse = weight_parts[-1]
    assert isinstance(sparse, Sparse)
    assert sparse.row_count.tolist() == [(5, 2, 0)[i] for i in chosen.tolist()]
    for r in range(ROWS):
        kept = (weight[r].square() * curvature.H.diagonal()).argsort(descending=True)[: int(sparse.row_count[r])]
        assert torch.equal(dense[r, kept], weight[r, kept].half().float())


def with_ranked_ones(weight: Tensor, mask: Tensor, curvature: Curvature) -> tuple[WeightPlan, list[Part], Tensor]:
    """A plan with two outliers in each of 30 rows and those of `mask` besides; its parts and their sum."""
    mix = planned("gptq", Rows(Grid(3, 64, True), 30, 2), Rows(Grid(2, 64, True), 7), outliers=int(mask.sum()))
    weight_parts, dense, _ = compress_weight(weight, weight, mix, curvature, mask, dealt(30, 7), recipe("gptq"))
    return mix, weight_parts, dense


@pytest.fixture
def smallest(weight: Tensor) -> Tensor:
    """bool [rows, cols]: the five smallest weights, which no row would choose itself."""
    return weight.abs() <= weight.abs().flatten().kthvalue(5).values


def test_outliers_of_rows_and_of_the_ranking_are_kept_together(
    weight: Tensor, smallest: Tensor, curvature: Curvature
) -> None:
    mix, weight_parts, dense = with_ranked_ones(weight, smallest.clone(), curvature)
    assert torch.equal(dense[smallest], weight.bfloat16().float()[smallest])
    assert len(weight_parts[-1].tensors()["value"]) == mix.kept == 65
    assert mix.nbytes == parts.nbytes(weight_parts)


def test_outliers_named_twice_leave_planned_and_made_bytes_the_same(weight: Tensor, curvature: Curvature) -> None:
    """The ranking takes weights that their rows would take too: the plan has promised 65 all the same, and its specs,
    not the tensors, are what config.json says."""
    mask = torch.zeros(ROWS, COLS, dtype=torch.bool)
    mask.view(-1)[(weight.square() * curvature.diagonal).flatten().topk(5).indices] = True
    mix, weight_parts, _ = with_ranked_ones(weight, mask, curvature)
    assert mix.nbytes == parts.nbytes(weight_parts)
    assert mix.specs == [part.spec() for part in weight_parts]


@pytest.mark.parametrize("quantizer", rounding_methods())
def test_the_target_of_an_outlier_does_not_matter(quantizer: str, weight: Tensor, curvature: Curvature) -> None:
    """It keeps the weight's own value, which is what GPTQ's feedback and descent must reckon with."""
    mask = torch.rand(ROWS, COLS, generator=torch.Generator().manual_seed(2)) < 0.02
    plan = planned(quantizer, Rows(Grid(3, 64, True), ROWS), outliers=int(mask.sum()))
    target = weight * 1.1
    sums = [
        compress_weight(weight, one, plan, curvature, mask, None, recipe(quantizer))[1]
        for one in (target, target.masked_fill(mask, 1e4))
    ]
    assert torch.equal(*sums)
    assert not torch.equal(sums[0], compress_weight(weight, weight, plan, curvature, mask, None, recipe(quantizer))[1])


def test_the_callers_outlier_mask_is_left_as_it_was(weight: Tensor, smallest: Tensor, curvature: Curvature) -> None:
    mask = smallest.clone()
    with_ranked_ones(weight, mask, curvature)
    assert torch.equal(mask, smallest)


def test_the_same_grid_with_and_without_outliers_is_one_part(weight: Tensor, curvature: Curvature) -> None:
    mix = planned("rtn", Rows(Grid(3, 64, True), 30, 2), Rows(Grid(3, 64, True), 7))
    weight_parts, _, _ = compress_weight(weight, weight, mix, curvature, None, dealt(30, 7), recipe("rtn"))
    assert [type(part) for part in weight_parts] == [Affine, Sparse]
    assert weight_parts[0].spec() == parts.affine_spec(Grid(3, 64, True), torch.bfloat16), "all rows: none are marked"
    assert mix.nbytes == parts.nbytes(weight_parts)


PLANS = {
    "one grid": (Rows(Grid(3, 128, True), ROWS),),
    "two grids": (Rows(Grid(8, 128, True), 5), Rows(Grid(4, 128, False), 32)),
    "four grids": tuple(Rows(grid, n) for grid, n in zip(MIX, COUNTS, strict=True)),
    "outliers in all rows": (Rows(Grid(3, 16, True), ROWS, 3),),
    "outliers in some rows": (Rows(Grid(5, -1, False), 6, 9), Rows(Grid(2, 128, True, True), 31)),
    "one grid twice": (Rows(Grid(3, 64, True), 6, 9), Rows(Grid(2, 64, True), 9), Rows(Grid(3, 64, True), 22)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", PLANS)
def test_planned_bytes_are_those_of_the_parts_made(
    name: str, dtype: torch.dtype, weight: Tensor, curvature: Curvature
) -> None:
    plan = planned("rtn", *PLANS[name], dtype=dtype)
    chosen = dealt(*(rows.count for rows in plan.grids))
    weight_parts, _, _ = compress_weight(weight, weight, plan, curvature, None, chosen, recipe("rtn"))
    assert plan.nbytes == parts.nbytes(weight_parts)
    assert plan.specs == [part.spec() for part in weight_parts]


def test_grids_without_rows_leave_the_plan_and_neighbours_join() -> None:
    plan = planned("rtn", Rows(Grid(3), ROWS))
    regrouped = plan.on(Rows(Grid(4), 5), Rows(Grid(8), 0), Rows(Grid(4), 7), Rows(Grid(4), 10, 2), Rows(Grid(2), 15))
    assert regrouped.grids == (Rows(Grid(4), 12), Rows(Grid(4), 10, 2), Rows(Grid(2), 15))
    assert regrouped.kept == 20
    assert regrouped.code_bits == pytest.approx((22 * 4 + 15 * 2) / 37)
    with pytest.raises(AssertionError, match="every row has one grid"):
        plan.on(Rows(Grid(4), 5))


def test_the_reported_error_is_that_of_the_sum_of_parts(weight: Tensor, curvature: Curvature) -> None:
    mix = planned("descent", Rows(Grid(4, 64, True), 7, 1), Rows(Grid(2, 64, True, True), 30))
    weight_parts, dense, error = compress_weight(weight, weight, mix, curvature, None, dealt(7, 30), recipe("descent"))
    assert torch.equal(dense, parts.sum_of_parts(weight_parts))
    expected = row_error(weight - dense, curvature.H).sum() / row_error(weight, curvature.H).sum()
    assert error == pytest.approx(float(expected), rel=1e-6)
