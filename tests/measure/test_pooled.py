"""Moments of experts: from their own tokens, drawn towards those of all, with the original's routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from support import shrunk_moments
from torch import Tensor

from llmsqueeze.measure.moments import FusionGroup, SecondMoments, with_all_experts
from llmsqueeze.measure.streams.pooled import PRIOR, UNSEEN, PooledMoments, drawn_gradient, of_pool
from llmsqueeze.model.experts.routing import Routing

COLS = 12


class Group:
    """As `GroupMoments`, without a model."""

    def __init__(self) -> None:
        self.xtx = SecondMoments(COLS, torch.float32, torch.device("cpu"))

    def add(self, _x: Tensor | None, y: Tensor) -> None:
        self.xtx.add(y)

    def probe_with(self, _probes: Tensor) -> None:
        """It has probes of its own."""

    def mean(self) -> Any:
        from llmsqueeze.measure.moments import Moments

        tokens = self.xtx.tokens
        shrunk, chance = self.xtx.shrunk(self.xtx.mean())
        return Moments(shrunk, {"pull": torch.ones(3, COLS)}, chance, tokens)


def pooled_of(samples: list[dict[tuple[str, ...], Tensor]], names: list[tuple[str, ...]]) -> Mapping[Any, Any]:
    groups: Any = {name: Group() for name in names}
    pooled = PooledMoments(groups, torch.empty(0))
    for sample in samples:
        pooled.add({}, sample)
    return dict(pooled.mean(of_pool(pooled.sums)))


def test_experts_are_drawn_towards_what_all_get(generator: torch.Generator) -> None:
    many, few, none = ("a.0",), ("a.1",), ("a.2",)
    inputs = torch.randn(4, 300, COLS, generator=generator), torch.randn(4, 5, COLS, generator=generator)
    found = pooled_of([{many: inputs[0][i], few: inputs[1][i]} for i in range(4)], [many, few, none])
    every = torch.cat([inputs[0].flatten(0, 1), inputs[1].flatten(0, 1)])
    pool = found[none].xtx
    assert torch.allclose(pool.diagonal(), every.square().mean(dim=0))  # what is chance lies off the diagonal
    assert found[none].tokens == 0
    assert not found[none].pulls
    for names, own in ((many, inputs[0]), (few, inputs[1])):
        kept = own.shape[0] * own.shape[1] / (own.shape[0] * own.shape[1] + PRIOR)
        expected = kept * shrunk_moments(list(own)) + (1 - kept) * pool
        assert torch.allclose(found[names].xtx, expected, atol=1e-5)
        assert torch.allclose(found[names].pulls["pull"], torch.full((3, COLS), kept))


def test_nothing_is_known_of_experts_that_no_token_reaches() -> None:
    assert pooled_of([{}], [("a.0",), ("a.1",)]) == {}


def test_an_expert_counts_as_much_as_its_tokens_say(generator: torch.Generator) -> None:
    pool = torch.rand(7, generator=generator)
    assert torch.equal(drawn_gradient(None, 0, pool), pool * UNSEEN)
    tokens = 40
    own = tokens * torch.rand(7, generator=generator)
    found = drawn_gradient(own, tokens, pool)
    assert torch.allclose(found.sum() - UNSEEN * pool.sum(), own.sum(), rtol=1e-4)
    assert torch.allclose(drawn_gradient(1e6 * own, 10**8 * tokens, pool) / (1e6 * own), torch.ones(7), rtol=1e-2)


def test_groups_are_completed_with_experts_that_were_not_chosen() -> None:
    seen = [
        FusionGroup(("q", "k"), 1),
        FusionGroup(("in.2",), 1),
        FusionGroup(("out.2",), 1),
        FusionGroup(("in.0",), 1),
    ]
    found = with_all_experts(seen, {"in": 3, "out": 3, "other": 2})
    expected = [("q", "k"), *((f"{s}.{i}",) for s, n in (("in", 3), ("out", 3), ("other", 2)) for i in range(n))]
    assert [group.names for group in found] == expected
    assert found[1].pool == ("in",)


def test_a_second_run_goes_to_the_same_experts(generator: torch.Generator) -> None:
    scores, others = (torch.rand(5, 6, generator=generator) for _ in range(2))

    def choose(score: Tensor) -> tuple[Tensor, Tensor]:
        values, _ = torch.topk(score, 2)
        return score.topk(3, dim=0).indices, values

    first: Callable[[], Any] = lambda: choose(scores)  # noqa: E731
    with Routing() as noted:
        chosen = first()
    with Routing(follows=noted):
        again, values = choose(others)
    assert torch.equal(again, chosen[0])
    assert torch.equal(values, others.gather(-1, scores.topk(2).indices))
    assert not torch.equal(choose(others)[0], chosen[0])
