"""The coded quantizer against slow twins: its steps, their cost, and finite results for degenerate matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.measure import costs
from llmsqueeze.parts import Coded
from llmsqueeze.parts.coded import code_length
from llmsqueeze.parts.coding.logsteps import exponents
from llmsqueeze.quantizers import coded
from llmsqueeze.quantizers.coded import round_to_steps, row_steps, shrunk_gradient
from llmsqueeze.quantizers.coded_on_device import coordinate_descent, feedback, refit
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.quantizers.steps import RoundedToSteps

ROWS, COLS = 24, 140  # a full panel and a short one


def correlated(cols: int, generator: torch.Generator, tokens: int = 900, octaves: float = 2.0) -> Tensor:
    """float64 [cols, cols]: second moments of strongly correlated inputs of different size."""
    few = torch.randn(tokens, cols // 8 + 1, generator=generator, dtype=torch.float64)
    mix = torch.randn(cols // 8 + 1, cols, generator=generator, dtype=torch.float64)
    own = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    x = (few @ mix + own) * 2.0 ** torch.linspace(-octaves, octaves, cols, dtype=torch.float64)
    return x.T @ x / tokens


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLS, generator=generator, dtype=torch.float64) * 0.05


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    return factorize(correlated(COLS, generator))


@pytest.fixture
def gradient(generator: torch.Generator) -> Tensor:
    """g of rows, over three orders of magnitude."""
    return 10 ** (3 * torch.rand(ROWS, generator=generator, dtype=torch.float64) - 5)


@pytest.fixture
def pinned(generator: torch.Generator) -> Tensor:
    return torch.rand(ROWS, COLS, generator=generator) < 0.03


def start_of(weight: Tensor, steps: Tensor, curvature: Curvature) -> RoundedToSteps:
    """The start of `round_to_steps`: exponents of the steps, those of the columns from 0 on."""
    row, col = exponents(steps), exponents(curvature.upper.diagonal())
    return RoundedToSteps(weight, row + col.min(), col - col.min(), int(row.min() + col.min()) - 32)


def slow_steps(rounded: RoundedToSteps) -> Tensor:
    """float64 [rows, cols]."""
    return 2.0 ** ((rounded.row_exponent[:, None] + rounded.col_exponent).double() / 16)


def multiplier_for(weight: Tensor, gradient: Tensor, curvature: Curvature, bits: float) -> float:
    """The multiplier whose integers take about `bits` bits, if they have a normal density."""
    size = (weight.square().mean(dim=1).sqrt() * gradient.sqrt()).log2().mean()
    return float(2.0 ** (size - curvature.upper.diagonal().log2().mean() + 2.05 - bits))


# ----------------------------------------------------------------------------------------------------------- twins


def slow_feedback(target: Tensor, steps: Tensor, upper: Tensor, pinned: Tensor | None) -> Tensor:
    """Column by column, with no panels: every column's error goes to all later columns at once."""
    w, values = target.clone(), torch.zeros_like(target)
    for j in range(target.shape[1]):
        values[:, j] = torch.round(w[:, j] / steps[:, j])
        rounded = values[:, j] * steps[:, j]
        if pinned is not None:
            values[pinned[:, j], j] = 0.0
            rounded = torch.where(pinned[:, j], target[:, j], rounded)
        w[:, j + 1 :] -= torch.outer((w[:, j] - rounded) / upper[j, j], upper[j, j + 1 :])
    return values


with_pinned = pytest.mark.parametrize("with_pinned", [False, True], ids=["", "outliers"])


@with_pinned
@pytest.mark.parametrize("bits", [1.0, 3.0, 6.0])
def test_feedback_equals_the_column_by_column_form(
    bits: float, with_pinned: bool, weight: Tensor, gradient: Tensor, curvature: Curvature, pinned: Tensor
) -> None:
    """In float64, so that no near-tie rounds differently."""
    pins = pinned if with_pinned else None
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, bits), gradient)
    start = start_of(weight, steps, curvature)
    fast = feedback(weight, start, curvature, pins)
    assert torch.equal(fast.integers, slow_feedback(weight, slow_steps(start), curvature.upper, pins))
    assert fast.integers.abs().max() > 0
    for field in ("row_exponent", "col_exponent", "lowest"):
        assert getattr(fast, field) is getattr(start, field)


@with_pinned
def test_a_pass_is_coordinate_descent(
    with_pinned: bool, weight: Tensor, gradient: Tensor, curvature: Curvature, pinned: Tensor
) -> None:
    """Each column in turn takes the integer with the least error, its neighbours tried one by one."""
    pins = pinned if with_pinned else None
    target = weight.masked_fill(pinned, 0.0) if with_pinned else weight
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, 2.0), gradient)
    start = feedback(weight, start_of(weight, steps, curvature), curvature, pins)
    rounded = coordinate_descent(start, target, curvature.H, pins)
    size, values = slow_steps(start), start.integers.clone()
    for j in range(COLS):
        tried, errors = [], []
        for change in range(-3, 4):
            values_ = values.clone()
            values_[:, j] += change
            tried.append(values_[:, j])
            errors.append(row_error(target - values_ * size, curvature.H))
        best = torch.stack(errors).argmin(dim=0)
        values[:, j] = torch.stack(tried).gather(0, best[None])[0]
        if pins is not None:
            values[pins[:, j], j] = 0.0
    assert torch.equal(rounded.integers, values)
    assert not torch.equal(rounded.integers, start.integers)


def test_a_row_takes_its_least_squares_gain(weight: Tensor, gradient: Tensor, curvature: Curvature) -> None:
    """Rounded to whole exponents, at most two octaves: wrong steps are corrected."""
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, 3.0), gradient)
    right = feedback(weight, start_of(weight, steps, curvature), curvature, None)
    off = torch.arange(-12 * 3, 12 * 3, 3)
    wrong = replace(right, row_exponent=right.row_exponent + off, lowest=int(right.row_exponent.min()) - 70)
    rounded = refit(wrong, weight, curvature.H)
    dense = wrong.integers * slow_steps(wrong)
    for r in range(ROWS):
        best = float((dense[r] @ curvature.H @ weight[r]) / (dense[r] @ curvature.H @ dense[r]))
        moved = int(rounded.row_exponent[r] - wrong.row_exponent[r])
        assert moved == round(16 * math.log2(min(max(best, 0.25), 4.0)))
    assert torch.equal(rounded.integers, wrong.integers)
    assert {-32, 32} <= set((rounded.row_exponent - wrong.row_exponent).tolist())


@pytest.mark.parametrize(("sixteenths", "moved"), [(0.49, 0), (0.503, 0), (0.51, 1), (1.4, 1), (-0.49, 0), (-0.51, -1)])
def test_a_gain_that_is_not_better_when_rounded_is_not_taken(sixteenths: float, moved: int) -> None:
    """The mean of two steps is not the mean of their logarithms."""
    flat, none = Curvature.flat(3, torch.ones(1, dtype=torch.float64)), torch.zeros(3, dtype=torch.long)
    start = RoundedToSteps(torch.full((1, 3), 4.0, dtype=torch.float64), torch.tensor([8]), none, 0)
    rounded = refit(start, start.dense() * 2 ** (sixteenths / 16), flat.H)
    assert rounded.row_exponent.tolist() == [8 + moved]


def test_gains_stay_within_the_exponents_that_can_be_stored(
    weight: Tensor, gradient: Tensor, curvature: Curvature
) -> None:
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, 3.0), gradient)
    right = feedback(weight, start_of(weight, steps, curvature), curvature, None)
    least, most = int(right.row_exponent.min()), int(right.row_exponent.max())
    fine = replace(right, row_exponent=right.row_exponent - 30, lowest=most - 20 - 255)
    assert int(refit(fine, weight, curvature.H).row_exponent.max()) == most - 20
    coarse = replace(right, row_exponent=right.row_exponent + 30, lowest=least + 20)
    assert int(refit(coarse, weight, curvature.H).row_exponent.min()) == least + 20


@with_pinned
@pytest.mark.parametrize("bits", [0.3, 1.0, 3.0])
def test_neither_gain_nor_pass_raises_a_rows_error(
    bits: float, with_pinned: bool, weight: Tensor, gradient: Tensor, curvature: Curvature, pinned: Tensor
) -> None:
    pins = pinned if with_pinned else None
    target = weight.masked_fill(pinned, 0.0) if with_pinned else weight
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, bits), gradient)
    right = feedback(weight, start_of(weight, steps, curvature), curvature, pins)
    for off in (0, -7, 11):
        state = replace(right, row_exponent=right.row_exponent + off)
        before = row_error(target - state.dense(), curvature.H)
        for update in (refit, lambda s, t, H: coordinate_descent(s, t, H, pins)) * 3:
            state = update(state, target, curvature.H)
            after = row_error(target - state.dense(), curvature.H)
            assert (after <= before * (1 + 1e-6)).all()
            before = after
        if pins is not None:
            assert (state.integers[pins] == 0).all()


# -------------------------------------------------------------------------------------------------- the whole of it


@pytest.mark.thorough
@with_pinned
def test_rows_are_independent_of_how_many_are_coded_at_once(
    with_pinned: bool, weight: Tensor, gradient: Tensor, curvature: Curvature, pinned: Tensor
) -> None:
    pins = pinned if with_pinned else None
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, 2.5), gradient)
    whole = round_to_steps(weight, steps, curvature, pins, ROWS)
    for chunk in (7, 23, 1000):
        rounded = round_to_steps(weight, steps, curvature, pins, chunk)
        assert torch.equal(rounded.integers, whole.integers)
        assert torch.equal(rounded.row_exponent, whole.row_exponent)
        assert torch.equal(rounded.col_exponent, whole.col_exponent)
    if pins is not None:
        assert (whole.integers[pins] == 0).all()


def test_the_target_of_a_pinned_weight_does_not_change_the_others(
    weight: Tensor, gradient: Tensor, curvature: Curvature, pinned: Tensor
) -> None:
    """It only matters that it is pinned: it has no error, whatever its target."""
    steps = row_steps(weight, multiplier_for(weight, gradient, curvature, 2.5), gradient)
    plain = round_to_steps(weight, steps, curvature, pinned, ROWS)
    other = round_to_steps(weight.masked_fill(pinned, 7.0), steps, curvature, pinned, ROWS)
    assert torch.equal(other.integers, plain.integers)
    assert torch.equal(other.row_exponent, plain.row_exponent)
    assert not torch.equal(round_to_steps(weight, steps, curvature, None, ROWS).integers, plain.integers)


def test_gains_and_passes_lower_the_error_of_the_feedback(
    weight: Tensor, gradient: Tensor, curvature: Curvature
) -> None:
    """In every row."""
    for bits in (1.0, 2.0, 4.0):
        steps = row_steps(weight, multiplier_for(weight, gradient, curvature, bits), gradient)
        plain = feedback(weight, start_of(weight, steps, curvature), curvature, None)
        before = row_error(weight - plain.dense(), curvature.H)
        after = row_error(weight - round_to_steps(weight, steps, curvature, None, ROWS).dense(), curvature.H)
        assert (after <= before * (1 + 1e-9)).all()
        assert float((gradient * after).sum()) < 0.999 * float((gradient * before).sum())


def test_steps_are_the_multiplier_times_the_factor_over_the_roots_of_the_gradient(
    weight: Tensor, gradient: Tensor, curvature: Curvature
) -> None:
    """Within two roundings to sixteenths of an octave, if steps are so fine that no gain changes them."""
    multiplier = multiplier_for(weight, gradient, curvature, 8.0)
    rounded = round_to_steps(weight, row_steps(weight, multiplier, gradient), curvature, None, ROWS)
    ideal = multiplier * curvature.upper.diagonal() / gradient.sqrt()[:, None]
    off = (slow_steps(rounded) / ideal).log2()
    assert off.abs().max() <= 1 / 16
    assert int(rounded.col_exponent.min()) == 0
    again = feedback(weight, start_of(weight, row_steps(weight, multiplier, gradient), curvature), curvature, None)
    assert torch.equal(again.row_exponent, rounded.row_exponent)
    assert torch.equal(again.col_exponent, rounded.col_exponent)


def test_the_steps_of_a_row_follow_its_gradient_or_else_its_size(weight: Tensor, gradient: Tensor) -> None:
    assert torch.equal(row_steps(weight, 0.75, gradient), 0.75 / gradient.sqrt())
    size = weight.square().mean(dim=1).sqrt()
    assert torch.allclose(row_steps(weight, 0.75, None), size / 16)
    weight[3] = 0
    weight[4] = weight[0] * 2.0**-40
    steps = row_steps(weight, 0.75, None)
    assert float(steps[3]) == float(steps[4]) == pytest.approx(float(size.max()) / 16 * 2.0**-16)


def test_rows_and_columns_of_very_different_steps_are_kept_within_a_byte(generator: torch.Generator) -> None:
    """Rows over sixteen octaves and columns over twenty: a step beyond a byte becomes finer."""
    moments = torch.diag(4.0 ** torch.linspace(-10, 10, 40, dtype=torch.float64))
    curvature = factorize(moments, damp=1e-14)
    weight = torch.randn(31, 40, generator=generator, dtype=torch.float64)
    steps = 2.0 ** torch.linspace(-6, 10, 31, dtype=torch.float64)
    rounded = round_to_steps(weight, steps, curvature, None, 7)
    ideal = steps[:, None] * curvature.upper.diagonal()
    assert int(rounded.row_exponent.max() - rounded.row_exponent.min()) <= 255
    assert int(rounded.col_exponent.max()) == 255
    assert (slow_steps(rounded) <= ideal * 2 ** (1 / 16) * 4).all()
    error = (weight - rounded.dense()).abs()
    assert (error <= slow_steps(rounded) * 0.51).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_part_stands_for_what_was_chosen_to_the_last_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(17, 90, generator=generator)
    weight[torch.rand(17, 90, generator=generator) < 0.02] *= 300
    curvature = factorize(correlated(90, generator).float())
    gradient = 10 ** (6 * torch.rand(17, generator=generator) - 8)
    rounded = round_to_steps(weight, row_steps(weight, 4.0 ** (seed - 7), gradient), curvature, None, 5)
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
    assert torch.equal(part.dense(), rounded.dense())
    assert torch.equal(part.decoded().values(), rounded.integers)


# ----------------------------------------------------------------------------------------------------- water-filling


@pytest.fixture(scope="module")
def filled() -> tuple[Tensor, Tensor, Curvature, float]:
    """A weight, the gradients of its rows, its curvature, and a multiplier for five bits."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(256, 256, generator=generator, dtype=torch.float64) * 0.02
    gradient = 10 ** (3 * torch.rand(256, generator=generator, dtype=torch.float64) - 6)
    curvature = factorize(correlated(256, generator))
    return weight, gradient, curvature, multiplier_for(weight, gradient, curvature, 5.0)


Filled = tuple[Tensor, Tensor, Curvature, float]


def test_the_weighted_error_is_the_same_for_every_row_and_column(filled: Filled) -> None:
    """In the feedback's own basis, weighted by the gradient: uniform in a step of the multiplier everywhere."""
    weight, gradient, curvature, multiplier = filled
    rounded = feedback(weight, start_of(weight, row_steps(weight, multiplier, gradient), curvature), curvature, None)
    residual = weight - rounded.dense()
    own = torch.linalg.solve_triangular(curvature.upper, residual, upper=True, left=False)
    assert torch.allclose(own.square().sum(dim=1), row_error(residual, curvature.H), rtol=1e-6)
    share = own.square() * gradient[:, None] / (multiplier**2 / 12)
    assert float(share.mean()) == pytest.approx(1, abs=0.02)
    for per in (share.mean(dim=0), share.mean(dim=1)):
        assert 0.75 < per.min() < per.max() < 1.3, "sixteen to an octave, and chance"


def test_every_weight_costs_a_24th_of_the_squared_multiplier(filled: Filled) -> None:
    """Gains and passes make it a little less."""
    weight, gradient, curvature, multiplier = filled
    for finer in (1, 4, 16):
        steps = row_steps(weight, multiplier / finer, gradient)
        plain = feedback(weight, start_of(weight, steps, curvature), curvature, None)
        loss = 0.5 * float(gradient @ row_error(weight - plain.dense(), curvature.H))
        expected = (multiplier / finer) ** 2 / 24 * weight.numel()
        assert loss == pytest.approx(expected, rel=0.02)
        rounded = round_to_steps(weight, steps, curvature, None, 256)
        assert 0.8 < 0.5 * float(gradient @ row_error(weight - rounded.dense(), curvature.H)) / expected < 1


def bits_and_loss(rounded: RoundedToSteps, filled: Filled) -> tuple[float, float]:
    weight, gradient, curvature, _ = filled
    bits, tables = code_length(rounded.integers, rounded.row_exponent, rounded.col_exponent)
    return bits + 8 * tables, 0.5 * float(gradient @ row_error(weight - rounded.dense(), curvature.H))


@pytest.mark.parametrize("equal", ["rows", "columns", "everything"])
def test_equal_steps_cost_more_at_equal_bits(equal: str, filled: Filled) -> None:
    weight, gradient, curvature, multiplier = filled
    start = start_of(weight, row_steps(weight, multiplier, gradient), curvature)
    bits, loss = bits_and_loss(feedback(weight, start, curvature, None), filled)
    row, col = start.row_exponent, start.col_exponent
    even = replace(
        start,
        row_exponent=row if equal == "columns" else torch.full_like(row, int(row.double().mean())),
        col_exponent=col if equal == "rows" else torch.zeros_like(col),
    )
    low, high = -100, 200
    while high - low > 1:  # the finest steps that take no more bits
        middle = (low + high) // 2
        tried = replace(even, row_exponent=even.row_exponent + middle)
        fits = bits_and_loss(feedback(weight, tried, curvature, None), filled)[0] <= bits
        low, high = (low, middle) if fits else (middle, high)
    # one exponent finer, which takes a little more than the bits
    tried = replace(even, row_exponent=even.row_exponent + low)
    assert bits_and_loss(feedback(weight, tried, curvature, None), filled)[1] > 1.25 * loss


# ------------------------------------------------------------------------------------------------------- hard cases


def zeros(weight: Tensor) -> Tensor:
    return weight * 0


def some_zero_rows(weight: Tensor) -> Tensor:
    return weight.index_fill(0, torch.tensor([0, 5, 6]), 0.0)


def enormous(size: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[2, 7] = size
        return weight

    return change


def tiny(weight: Tensor) -> Tensor:
    return weight * 1e-30


def one_value(weight: Tensor) -> Tensor:
    return torch.full_like(weight, 0.3)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.clone,
    "zeros": zeros,
    "some zero rows": some_zero_rows,
    "one weight of 1e4": enormous(1e4),
    "one weight of -1e5": enormous(-1e5),
    "tiny": tiny,
    "one value": one_value,
}


def plain_moments(moments: Tensor) -> Tensor:
    return moments


def no_moments(moments: Tensor) -> Tensor:
    return torch.zeros_like(moments)


def dead_columns(moments: Tensor) -> Tensor:
    alive = torch.ones(len(moments))
    alive[[0, 3, len(moments) - 1]] = 0
    return moments * alive * alive[:, None]


def one_token(moments: Tensor) -> Tensor:
    return torch.outer(moments[0], moments[0]) / moments[0, 0]


MOMENTS = {"plain": plain_moments, "none": no_moments, "dead columns": dead_columns, "one token": one_token}

GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "plain": lambda g: g,
    "none": lambda _: None,
    "all zero": lambda g: shrunk_gradient(g * 0, 100),
    "one row": lambda g: shrunk_gradient(g * (torch.arange(len(g)) == 4), 10**6),
    "vanishing": lambda g: shrunk_gradient(g * 1e-30, 100),
}


PAIRS = [
    *((weight, moments, "plain") for weight, moments in itertools.product(WEIGHTS, MOMENTS)),
    *((weight, "plain", gradient) for weight, gradient in itertools.product(WEIGHTS, GRADIENTS)),
    *(("plain", moments, gradient) for moments, gradient in itertools.product(MOMENTS, GRADIENTS)),
]
HARD = [(*case, 1e-3) for case in dict.fromkeys(PAIRS)]  # every two of them together
COARSE = [(*case, 1.0) for case in PAIRS if case[2] == "plain" and "plain" in case[:2]]


@pytest.mark.parametrize(("of_weight", "of_moments", "of_gradient", "multiplier"), HARD + COARSE)
def test_hard_cases_give_finite_weights(of_weight: str, of_moments: str, of_gradient: str, multiplier: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = WEIGHTS[of_weight](torch.randn(9, 20, generator=generator) * 0.05)
    curvature = factorize(MOMENTS[of_moments](correlated(20, generator).float()))
    gradient = GRADIENTS[of_gradient](torch.rand(9, generator=generator) * 1e-4 + 1e-6)
    mean = 1.0 if gradient is None else float(gradient.mean())
    rounded = round_to_steps(weight, row_steps(weight, multiplier * mean**0.5, gradient), curvature, None, 4)
    dense = rounded.dense()
    assert bool(dense.isfinite().all())
    assert torch.equal(rounded.integers, rounded.integers.round())
    assert (row_error(weight - dense, curvature.H) <= row_error(weight, curvature.H) * (1 + 1e-4) + 1e-30).all()
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
    assert torch.equal(part.dense(), dense)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (2, 129)])
def test_matrices_of_one_row_or_column(shape: tuple[int, int], generator: torch.Generator) -> None:
    weight = torch.randn(shape, generator=generator)
    curvature = factorize(correlated(shape[1], generator).float())
    rounded = round_to_steps(weight, row_steps(weight, 0.01, torch.ones(shape[0])), curvature, None, 64)
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
    assert torch.equal(part.dense(), rounded.dense())
    assert float((part.dense() - weight).abs().max()) < 0.05


def test_an_enormous_weight_leaves_the_rest_of_its_row_as_good(generator: torch.Generator) -> None:
    """No value is clipped, and no step becomes coarser."""
    weight = torch.randn(9, 70, generator=generator) * 0.05
    curvature, gradient = factorize(correlated(70, generator).float()), torch.ones(9)
    steps = row_steps(weight, 0.02, gradient)
    plain = row_error(weight - round_to_steps(weight, steps, curvature, None, 9).dense(), curvature.H)
    weight[2, 7] = 1e4
    hurt = row_error(weight - round_to_steps(weight, steps, curvature, None, 9).dense(), curvature.H)
    assert float(hurt[2]) < 1.3 * float(plain[2])
    assert torch.equal(hurt[[0, 1, *range(3, 9)]], plain[[0, 1, *range(3, 9)]])


# -------------------------------------------------------------------------------------------------------- gradients


def test_few_tokens_draw_gradients_to_their_mean(gradient: Tensor) -> None:
    mean = gradient.mean()
    assert torch.allclose(shrunk_gradient(gradient, 0), mean.expand(ROWS))
    assert torch.allclose(shrunk_gradient(gradient, 10**12), gradient, rtol=1e-6)
    away = [(shrunk_gradient(gradient, tokens) - mean).abs() for tokens in (0, 1, 16, 64, 256, 4096)]
    assert all(bool((more > less).all()) for less, more in itertools.pairwise(away))
    assert torch.allclose(shrunk_gradient(gradient, 64), (gradient + mean) / 2), "64 tokens' worth of the mean"
    assert torch.allclose(shrunk_gradient(gradient, 500).mean(), mean)


def test_rows_without_any_gradient_get_a_share_of_the_mean() -> None:
    shrunk = shrunk_gradient(torch.tensor([0.0, 3.0, 0.0]), 128)
    assert shrunk.tolist() == pytest.approx([1 / 3, 2 + 1 / 3, 1 / 3])


@pytest.mark.parametrize("tokens", [0, 1, 10**9])
def test_no_gradient_at_all_counts_every_row_alike(tokens: int) -> None:
    assert shrunk_gradient(torch.zeros(5), tokens).tolist() == [1.0] * 5


# ------------------------------------------------------------------------------------------- what coding will take

Priced = tuple[Tensor, Tensor, Curvature, Tensor]


@pytest.fixture(scope="module", params=[100, 300], ids=["all rows", "some rows"])
def priced(request: pytest.FixtureRequest) -> Priced:
    """A weight of so many rows, their gradients, the curvature, and their `coded_points`."""
    generator = torch.Generator().manual_seed(11)
    rows = int(request.param)
    weight = torch.randn(rows, 192, generator=generator) * 0.02
    gradient = 10 ** (torch.rand(rows, generator=generator) / 2 - 5)
    curvature = factorize(correlated(192, generator, octaves=0.5).float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "CODED_ROWS", 100)
        return weight, gradient, curvature, costs.coded_points(weight, gradient, curvature)


def test_bytes_fall_and_loss_rises_along_the_multipliers(priced: Priced) -> None:
    weight, gradient, curvature, points = priced
    at, nbytes, loss = points
    assert points.dtype == torch.float64
    assert (at.diff() > 0).all()
    assert (nbytes.diff() < 0).all()
    assert (loss.diff() > 0).all()
    nothing = 0.5 * float(gradient @ curvature.output_error(weight))
    assert float(loss[0]) < 1e-3 * nothing
    assert 0.5 * nothing < float(loss[-1]) <= (1.01 if len(weight) == 100 else 1.05) * nothing, "nearly all are 0"
    assert float(nbytes[-1]) < 0.3 * weight.numel() / 8


def test_bits_come_to_none_at_the_middle_of_the_points_if_fine_steps_are_extrapolated(priced: Priced) -> None:
    """If steps are fine, an octave is a bit."""
    weight, _, _, (at, nbytes, _) = priced
    beside = sum(weight.shape) + math.ceil(len(weight) / 16) * 4.5
    for octave in (-5.0, -4.0, -3.5):
        i = costs.OCTAVES.index(octave)
        assert (float(nbytes[i]) - beside) * 8 / weight.numel() == pytest.approx(-octave, abs=0.15)
        assert float(at[i] - at[costs.OCTAVES.index(0.0)]) == pytest.approx(octave)


def test_bytes_and_loss_are_nearly_those_of_the_part_that_is_made(priced: Priced) -> None:
    """Equal if every row is tried; if some are tried, bytes and loss differ as the rows do."""
    weight, gradient, curvature, points = priced
    exact = len(weight) == 100
    for octave in (-5.0, -3.0, -1.5, 0.0, 1.0):
        log_multiplier, nbytes, loss = points[:, costs.OCTAVES.index(octave)].tolist()
        steps = row_steps(weight, 2.0**log_multiplier, gradient)
        rounded = round_to_steps(weight, steps, curvature, None, len(weight))
        part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
        assert parts.nbytes([part]) == pytest.approx(nbytes, rel=0.01 if exact else 0.03)
        cost = 0.5 * float(gradient @ curvature.output_error(weight - rounded.dense()))
        assert cost == pytest.approx(loss, rel=1e-3 if exact else 0.03)


def test_the_rows_that_are_tried_stand_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth row is large: evenly spread in the order of the weight, the tried rows would be all large or none."""
    generator = torch.Generator().manual_seed(5)
    rows = 5 * costs.CODED_ROWS
    weight = torch.randn(rows, 64, generator=generator)
    weight[::5] *= 16
    gradient = 10 ** torch.rand(rows, generator=generator)
    curvature = factorize(correlated(64, generator, octaves=0.5).float())
    tried = costs.coded_points(weight, gradient, curvature)
    monkeypatch.setattr(costs, "CODED_ROWS", rows)
    exact = costs.coded_points(weight, gradient, curvature)
    assert torch.equal(tried[0], exact[0])
    middle = slice(costs.OCTAVES.index(-4.0), costs.OCTAVES.index(0.0))
    assert torch.allclose(tried[1:, middle], exact[1:, middle], rtol=0.03)


def test_the_code_length_is_that_of_streams_and_tables(weight: Tensor, curvature: Curvature) -> None:
    steps = row_steps(weight, 1.0, torch.linspace(1000, 40_000, ROWS, dtype=torch.float64))
    rounded = round_to_steps(weight, steps, curvature, None, ROWS)
    bits, tables = code_length(rounded.integers, rounded.row_exponent, rounded.col_exponent)
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
    assert tables == len(part.streams.tables)
    streams, escapes = len(part.streams.lengths), part.escape_index.nbytes + part.escape_value.nbytes
    assert bits > 10_000
    assert escapes > 100
    assert 16 * len(part.streams.words) + 8 * escapes == pytest.approx(bits + 24 * streams, rel=0.003)


@pytest.mark.parametrize("of", ["weight", "moments"])
def test_integers_beyond_32_bits_are_not_chosen(of: str, generator: torch.Generator) -> None:
    """Steps as fine as those of an absurd budget."""
    weight = torch.randn(6, 40, generator=generator)
    curvature = factorize(correlated(40, generator).float() * (1e12 if of == "moments" else 1))
    steps = row_steps(weight, 1e-20 if of == "weight" else 1e-9, torch.ones(6))
    rounded = round_to_steps(weight, steps, curvature, None, 3)
    assert 2**24 < float(rounded.integers.abs().max()) < 2**31
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, torch.bfloat16)
    assert torch.equal(part.dense(), rounded.dense())
    assert torch.allclose(part.dense(), weight, atol=1e-4)


def test_every_multiplier_has_all_octaves_that_a_byte_holds(generator: torch.Generator) -> None:
    """Gradients ten octaves apart: coarse steps priced together with fine ones equal those priced alone."""
    weight = torch.randn(12, 60, generator=generator) * 0.05
    gradient = 4.0 ** -torch.linspace(0, 10, 12)
    curvature = factorize(correlated(60, generator).float())
    at, nbytes, loss = costs.coded_points(weight, gradient, curvature)
    for i in (0, 6, len(at) - 1):
        alone = round_to_steps(weight, row_steps(weight, 2.0 ** float(at[i]), gradient), curvature, None, 12)
        part = Coded.from_integers(alone.integers, alone.row_exponent, alone.col_exponent, torch.bfloat16)
        assert parts.nbytes([part]) == pytest.approx(float(nbytes[i]), rel=0.01, abs=8)
        cost = 0.5 * float(gradient @ curvature.output_error(weight - alone.dense()))
        assert cost == pytest.approx(float(loss[i]), rel=1e-4)


@pytest.mark.parametrize(
    ("of_weight", "of_moments"),
    [("some zero rows", "plain"), ("one weight of 1e4", "plain"), *(("one value", moments) for moments in MOMENTS)],
)
def test_hard_cases_have_finite_prices(of_weight: str, of_moments: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = WEIGHTS[of_weight](torch.randn(9, 20, generator=generator) * 0.05)
    curvature = factorize(MOMENTS[of_moments](correlated(20, generator).float()))
    points = costs.coded_points(weight, shrunk_gradient(torch.zeros(9), 3), curvature)
    assert bool(points.isfinite().all())
    assert (points[1] > 0).all()
    assert (points[2] >= 0).all()


def test_the_constants_of_the_module_agree() -> None:
    """The gains of all rounds together keep the step of a row within its byte."""
    assert 2 * coded.GAIN_OCTAVES * 16 < 255
