"""Ranks bought from the budget: priced against components written out, bought only where they pay, and followed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.allocation import ranks
from llmsqueeze.allocation.plan import Rows, WeightPlan
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import RANKS, Option, Rounding, low_rank_gains, price, residuals
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers.curvature import Curvature, factorize
from llmsqueeze.quantizers.lorc import truncated_svd
from llmsqueeze.recipe.resolve import make_recipe

OPTIONS = (Option(Grid(2, 16, True)), Option(Grid(3, 16, True)))
NEAREST = Rounding("rtn", torch.float32, True)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(24, 40, generator=generator)


@pytest.fixture
def gradient(generator: torch.Generator) -> Tensor:
    return torch.rand(24, generator=generator) + 0.01


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    x = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    return factorize(x.T @ x / 200)


@pytest.mark.parametrize("quantizer", ["rtn", "descent"])
def test_gains_are_what_each_component_takes_off(quantizer: str, weight: Tensor, gradient, curvature) -> None:
    """The slow twin: subtract the first m components, price what is left."""
    gains = low_rank_gains(weight, gradient, curvature, OPTIONS, Rounding(quantizer, torch.float32, True))
    assert gains.shape == (2, RANKS)
    for i, option in enumerate(OPTIONS):
        error = torch.cat(list(residuals(weight, curvature, option, Rounding(quantizer, torch.float32, True))))
        weighted = torch.linalg.solve_triangular(curvature.upper, error, upper=True, left=False).double()
        before = 0.5 * float(gradient.double() @ weighted.square().sum(dim=1))
        for m in (1, 3, RANKS):
            left, right = truncated_svd(weighted, m)
            after = 0.5 * float(gradient.double() @ (weighted - left @ right).square().sum(dim=1))
            assert float(gains[i, :m].sum()) == pytest.approx(before - after, rel=1e-3)


def test_gains_never_exceed_the_cost(weight: Tensor, gradient: Tensor, curvature: Curvature) -> None:
    gains = low_rank_gains(weight, gradient, curvature, OPTIONS, NEAREST)
    # damping counts in the weighted error and not in the cost
    costs = price(weight, gradient, curvature, OPTIONS, NEAREST).sum(dim=1)
    assert (gains >= 0).all()
    assert (gains.sum(dim=1) < 1.1 * costs).all()


def test_a_matrix_of_less_rank_gains_nothing_beyond_it(gradient: Tensor, generator: torch.Generator) -> None:
    weight = torch.randn(24, 5, generator=generator)
    gains = low_rank_gains(weight, gradient, Curvature.flat(5, weight), OPTIONS, NEAREST)
    assert (gains[:, :5] > 0).all()
    assert (gains[:, 5:] == 0).all()


def test_rows_on_several_options_share_the_gains_by_cost() -> None:
    cost = torch.tensor([[4.0, 4.0, 1.0, 1.0], [2.0, 2.0, 0.5, 0.5]])
    gain = torch.tensor([[3.0, 1.0], [1.0, 0.5]])
    chosen = torch.tensor([0, 1, 1, 1])
    expected = (4 / 10) * gain[0] + (3 / 5) * gain[1]
    assert torch.allclose(ranks.expected_gains(cost, gain, chosen), expected)
    assert torch.allclose(ranks.expected_gains(cost, gain, torch.zeros(4, dtype=torch.int64)), gain[0])


def test_components_are_bought_in_turn_until_one_does_not_pay() -> None:
    gain = torch.tensor([5.0, 3.0, 1.0, 2.0])
    assert [ranks.worthwhile(gain, price) for price in (6.0, 4.0, 2.5, 1.5, 0.5)] == [0, 1, 2, 2, 4]


def test_the_last_byte_is_the_slope_of_the_ladder() -> None:
    ladder = [(0.0, 100.0), (10.0, 60.0), (20.0, 40.0), (30.0, 30.0), (1000.0, 29.0)]
    assert ranks.last_byte(ladder, 10) == pytest.approx(2.0)
    assert ranks.last_byte(ladder, 20) > ranks.last_byte(ladder, 500)
    assert ranks.last_byte([(0.0, 1.0)], 5) == 0.0


def test_the_bytes_of_a_rank_are_those_in_the_file() -> None:
    weight = WeightPlan("x", (24, 40), torch.bfloat16, "rtn", (Rows(OPTIONS[0].grid, 24),))
    with_rank = WeightPlan("x", (24, 40), torch.bfloat16, "rtn", (Rows(OPTIONS[0].grid, 24),), rank=3)
    assert with_rank.nbytes - weight.nbytes == 3 * ranks.rank_nbytes(weight) == 3 * (24 + 40 + 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "descent", "lorc_rank": "auto"}, "--lorc-rank auto contradicts --method descent"),
        ({"bits": 2.5, "lorc_rank": "auto", "lorc": "plain"}, "--lorc-rank auto contradicts --lorc plain"),
        ({"bits": 2.5, "lorc_rank": "auto", "importance": "uniform"}, "--lorc-rank auto contradicts --importance"),
        ({"lorc_rank": "many"}, "--lorc-rank is 'many'; it must be a whole number from 0, or auto"),
        ({"lorc_rank": -1}, "--lorc-rank is -1"),
        ({"bits": 2.5, "lorc_rank": "auto", "portable": True}, "--portable contradicts --lorc-rank auto"),
    ],
)
def test_ranks_that_cannot_be_bought_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(settings)


def test_ranks_alone_imply_the_allocator() -> None:
    assert make_recipe({"bits": 3, "lorc_rank": "auto"}).method == "budget"
    assert make_recipe({"bits": 3, "lorc_rank": "8"}).lorc_rank == 8
