"""Parts: what they stand for, entry by entry, and that every byte is counted before it is written."""

from __future__ import annotations

import pytest
import torch
from support import random_affine

from llmsqueeze import parts
from llmsqueeze.parts import Grid, LowRank, Sparse


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [16, 24, -1, 1000])
@pytest.mark.parametrize("bits", [3, 8])
def test_affine_is_scale_times_code_minus_zero(
    bits: int, group_size: int, symmetric: bool, generator: torch.Generator
) -> None:
    grid = Grid(bits, group_size, symmetric)
    part, dense = random_affine(grid, 5, 40, generator)
    assert torch.equal(part.dense(), dense)


def test_sparse_holds_single_weights_exactly(generator: torch.Generator) -> None:
    weight = torch.randn(7, 50, generator=generator).to(torch.bfloat16)
    mask = torch.rand(7, 50, generator=generator) < 0.1
    mask[3] = False
    part = Sparse.from_mask(mask, weight)
    assert torch.equal(part.dense(), torch.where(mask, weight.float(), 0.0))
    assert part.value.dtype == torch.bfloat16
    assert parts.nbytes([part]) == int(mask.sum()) * 4 + 7 * 2, "32 bits an outlier and 16 a row"


@pytest.mark.parametrize("cols", [40_000, 65_536, 70_000])
def test_sparse_columns_beyond_int16(cols: int) -> None:
    """Columns past 32 767 wrap in the signed tensor, and past 65 535 need a wider one."""
    mask = torch.zeros(2, cols, dtype=torch.bool)
    mask[0, -1] = mask[1, 0] = mask[1, 33_000] = True
    weight = torch.arange(2 * cols, dtype=torch.float32).view(2, cols)
    assert torch.equal(Sparse.from_mask(mask, weight).dense(), weight.where(mask, 0.0))


def test_a_row_of_nothing_but_outliers() -> None:
    weight = torch.arange(1.0, 65_537.0)[None]
    assert torch.equal(Sparse.from_mask(weight > 0, weight).dense(), weight), "65 536 in a row outgrow 16 bits"


@pytest.mark.parametrize("grid", [Grid(3, 16, True), Grid(2, 24, False), Grid(5, -1, False)], ids=str)
def test_bytes_are_known_before_the_tensors_exist(grid: Grid, generator: torch.Generator) -> None:
    part, _ = random_affine(grid, 33, 70, generator)
    sparse = Sparse.from_mask(torch.rand(33, 70, generator=generator) < 0.05, torch.randn(33, 70).half())
    both = [part, sparse]
    specs = [p.spec() for p in both]
    assert parts.layout_nbytes((33, 70), specs) == parts.nbytes(both)
    for p, spec in zip(both, specs, strict=True):
        layout = {name: (tuple(t.shape), t.dtype) for name, t in p.tensors().items()}
        assert parts.layout((33, 70), spec) == layout
        assert torch.equal(parts.restore((33, 70), spec, p.tensors()).dense(), p.dense())


def test_a_weight_is_the_sum_of_its_parts(generator: torch.Generator) -> None:
    part, dense = random_affine(Grid(3, 16, True), 5, 40, generator)
    low = LowRank.from_factors(
        torch.randn(5, 2, generator=generator), torch.randn(2, 40, generator=generator), torch.float16
    )
    mask, kept = dense > 0.5, torch.randn(5, 40, generator=generator)
    total = parts.sum_of_parts([part, low, Sparse.from_mask(mask, kept)])
    assert torch.equal(total, torch.where(mask, kept, dense + low.dense())), "what is kept exactly stands as it is"
