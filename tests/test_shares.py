"""The samples of several processes, and sums over them."""

from __future__ import annotations

import pytest
import torch

from llmsqueeze.parallel.processes import rows_of
from llmsqueeze.parallel.shares import SHARES, Shares, Sums


@pytest.mark.parametrize("total", [1, 5, 16, 33, 128])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_sample_is_one_process_s_and_every_share_is_whole(total: int, count: int) -> None:
    shares = [Shares.of(total, rank, count) for rank in range(count)]
    assert sorted(number for one in shares for number in one.numbers) == list(range(total))
    alone = Shares.of(total, 0, 1)
    assert alone.numbers == list(range(total))
    ends = sorted(one.numbers[end] for one in shares for end in one.ends)
    assert ends == list(alone.ends), "whoever has it, a share is the same samples"
    for one in shares:
        assert one.numbers == sorted(one.numbers)
    rounds = [[rank for rank, one in enumerate(shares) if len(one.ends) > at] for at in range(len(shares[0].ends))]
    assert list(shares[0].ends.values()) == rounds, "the first process waits for those that have one"


def test_a_sum_is_that_of_the_sums_of_its_shares() -> None:
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    shares, sums = Shares.of(40, 0, 1), Sums()
    for sample, value in enumerate(values):
        sums.of("added in place", 7).add_(value)
        sums.add("given", value.clone())
        if sample in shares.ends:
            sums.fold(shares.ends[sample])
    parts, start = [], 0
    for end in shares.ends:
        parts.append(in_turn(values[start : end + 1]))
        start = end + 1
    assert len(parts) == SHARES
    assert torch.equal(sums.total()["added in place"], in_turn(torch.stack(parts)))
    assert torch.equal(sums.total()["given"], in_turn(torch.stack(parts)))
    assert not torch.equal(in_turn(values), in_turn(torch.stack(parts))), "the order of additions can be seen"


def in_turn(values: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, added one after the other in float32."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


def test_all_rows_are_somebodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsqueeze.parallel.processes.count", lambda: 3)
    for rows in (48, 49, 100, 576):
        spans = [rows_of(rows, rank) for rank in range(3)]
        assert [row for span in spans for row in range(rows)[span]] == list(range(rows))
        assert all(span.start % 16 == 0 for span in spans)
