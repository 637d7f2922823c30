"""The share of second moments that is chance, against its definition entry by entry, and what shrinking by it wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmsqueeze.measure import shrinkage
from llmsqueeze.measure.moments import SecondMoments
from llmsqueeze.measure.shrinkage import Chance, shrink

CPU = torch.device("cpu")
COLS = 24


def mixed(generator: torch.Generator) -> Tensor:
    """[COLS, COLS]: what makes independent columns correlated ones of very different size."""
    mix = torch.eye(COLS) + 0.2 * torch.randn(COLS, COLS, generator=generator)
    return mix * torch.logspace(-1.5, 1.5, COLS)


def texts(mix: Tensor, count: int, length: int, generator: torch.Generator, topics: float = 1.0) -> list[Tensor]:
    """Samples [length, COLS] whose tokens have much in common: each sample has its own sizes of the causes."""
    own = torch.exp(topics * torch.randn(count, 1, COLS, generator=generator))
    return list(torch.randn(count, length, COLS, generator=generator) * own @ mix)


Pairs = list[tuple[Tensor, Tensor]]


def share_by_entry(pairs: Pairs, power: Tensor, diagonal: bool) -> float:
    """The definition: sums over all entries, divided by the mean squares of rows, and of columns by 1 / `power`."""
    x, y = pairs[0]
    half, tokens = len(y) // 2, sum(len(y) for _, y in pairs)
    pieces = [(x, y) for x, y in ((x[:half], y[:half]), (x[half:], y[half:]), *pairs[1:]) if len(y)]
    mean = sum(x.T @ y for x, y in pieces) / tokens
    weights = (tokens / sum(y.square().sum(dim=0) for _, y in pieces))[:, None] * power
    if not diagonal:
        weights.fill_diagonal_(0)
    count = len(pieces)
    spread = sum((weights * (x.T @ y - len(y) * mean).square()).sum() for x, y in pieces) / tokens**2
    return min(1.0, float(spread * count / (count - 1) / (weights * mean.square()).sum()))


def share(samples: list[Tensor]) -> float:
    """Of second moments."""
    return share_of([(y, y) for y in samples], diagonal=False)


def share_of(pairs: Pairs, diagonal: bool) -> float:
    chance = Chance(pairs[0][1].shape[1], pairs[0][1].dtype, CPU, diagonal=diagonal)
    for x, y in pairs:
        chance.add(x, y)
    every = torch.cat([y for _, y in pairs])
    return chance.share(every.square().mean(dim=0), len(every))


@pytest.mark.parametrize("lengths", [(30,) * 6, (50, 3, 0, 20, 1), (40,)], ids=["equal", "unequal", "one"])
@pytest.mark.parametrize("of", ["moments", "drift"])
def test_many_probes_come_to_the_sum_over_all_entries(
    of: str, lengths: tuple[int, ...], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinkage, "PROBES", 20_000)
    mix = mixed(generator)
    samples = [texts(mix, 1, length, generator)[0] for length in lengths]
    pairs = [(y, y) for y in samples]
    if of == "drift":
        turn = torch.eye(COLS) + 0.3 * torch.randn(COLS, COLS, generator=generator)
        pairs = [(y @ turn + 0.1 * torch.randn(y.shape, generator=generator), y) for y in samples]
    power = samples[0].square().mean(dim=0)  # by which the probes are divided
    expected = share_by_entry(pairs, 1 / power.clamp(min=1e-3 * power.mean()), of == "drift")
    assert 0.01 < expected < 1
    assert share_of(pairs, of == "drift") == pytest.approx(expected, rel=0.03)


def test_shrunk_moments_are_nearer_to_those_of_all_text(generator: torch.Generator) -> None:
    """In the error of correlations: from few samples much nearer, from many not farther."""
    mix = mixed(generator)
    everything = torch.cat(texts(mix, 4000, 16, generator))
    truth = everything.T @ everything / len(everything)
    size = truth.diagonal().rsqrt()

    def error(moments: Tensor) -> float:
        return float(((moments - truth) * size * size[:, None]).fill_diagonal_(0).norm())

    gains = []
    for count in (3, 10, 1000):
        moments = SecondMoments(COLS, torch.float32, CPU)
        for y in texts(mix, count, 16, generator):
            moments.add(y)
        raw = moments.mean().clone()
        gains.append(error(moments.shrunk(raw.clone())[0]) / error(raw))
    assert gains[0] < 0.8
    assert gains[1] < 0.95
    assert gains[2] < 1.01


def test_tokens_of_one_text_are_not_independent(generator: torch.Generator) -> None:
    """More tokens of the same samples say little more; the same tokens in samples of their own say much more."""
    samples = texts(mixed(generator), 12, 200, generator, topics=1.5)
    apart = list(torch.cat(samples)[torch.randperm(2400, generator=generator)].split(1))
    assert share(samples) > 0.5 * share([y[:100] for y in samples])
    assert share(samples) > 3 * share(apart)


def test_without_two_samples_to_compare_nothing_is_chance() -> None:
    chance = Chance(3, torch.float32, CPU)
    assert chance.share(torch.zeros(3), 0) == 0
    chance.add(torch.ones(0, 3), torch.ones(0, 3))
    chance.add(torch.ones(1, 3), torch.ones(1, 3))
    assert chance.share(torch.ones(3), 1) == 0


def test_columns_that_are_never_active_do_not_count(generator: torch.Generator) -> None:
    samples = [torch.randn(20, 5, generator=generator) for _ in range(4)]
    padded = [torch.cat([y, torch.zeros(20, 3)], dim=1) for y in samples]
    value = share(padded)
    assert 0 < value <= 1
    assert share([torch.zeros(4, 3)] * 3) == 0
    samples = texts(mixed(generator), 60, 30, generator)
    nearly = [torch.cat([y, torch.full((30, 1), 1e-20)], dim=1) for y in samples]  # whose square has no reciprocal
    assert 0 < share(nearly) < 0.5


def test_shrinking_leaves_the_diagonal(generator: torch.Generator) -> None:
    moments = torch.randn(6, 6, generator=generator)
    shrunk = shrink(moments.clone(), 0.25)
    assert torch.equal(shrunk.diagonal(), moments.diagonal())
    off = ~torch.eye(6, dtype=torch.bool)
    assert torch.allclose(shrunk[off], 0.75 * moments[off])
