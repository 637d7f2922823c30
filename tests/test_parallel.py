"""Numbers computed in lanes: used in order, by one thread at a time, and an error ends all lanes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from llmsqueeze.parallel.threads import in_lanes, shared_out


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of torch."""
    before, threads = torch.get_num_threads(), int(request.param)
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "lanes", "each"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (5, 2, 2), (9, 3, 3), (16, 2, 8)]
)
def test_few_lanes_use_the_threads(threads: int, lanes: int, each: int) -> None:
    assert shared_out(threads) == (lanes, each)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_numbers_are_used_in_order(threads: int, count: int) -> None:
    used: list[tuple[int, int]] = []
    in_lanes(count, lambda number: number * number, lambda number, result: used.append((number, result)))
    assert used == [(number, number * number) for number in range(count)]
    assert torch.get_num_threads() == threads


def test_a_number_that_is_computed_early_waits_for_its_turn(threads: int) -> None:
    lanes, _ = shared_out(threads)
    early, used = threading.Event(), list[int]()

    def compute(number: int) -> None:
        if number == 0 and lanes > 1:
            assert early.wait(60)
        if number == 1:
            early.set()

    in_lanes(4, compute, lambda number, _: used.append(number))
    assert used == [0, 1, 2, 3]


def test_lanes_compute_at_the_same_time_with_their_share_of_the_threads(threads: int) -> None:
    """Each of the first numbers waits until all lanes have one."""
    lanes, each = shared_out(threads)
    together = threading.Barrier(lanes, timeout=60)
    seen: list[int] = []

    def compute(number: int) -> int:
        if number < lanes:
            together.wait()
        return torch.get_num_threads()

    in_lanes(3 * lanes, compute, lambda _, result: seen.append(result))
    assert seen == [each] * (3 * lanes)


def test_single_numbers_get_all_threads(threads: int) -> None:
    seen: list[tuple[int, int]] = []
    compute = lambda _: (torch.get_num_threads(), threading.get_ident())  # noqa: E731
    in_lanes(3, compute, lambda _, result: seen.append(result), single=True)
    assert seen == [(threads, threading.get_ident())] * 3


@pytest.mark.parametrize("broken", ["compute", "use"])
@pytest.mark.parametrize("at", [0, 5])
def test_an_error_ends_the_lanes(threads: int, broken: str, at: int) -> None:
    used: list[int] = []

    def compute(number: int) -> int:
        if broken == "compute" and number == at:
            raise ValueError("no such number")
        return number

    def use(number: int, _result: int) -> None:
        if broken == "use" and number == at:
            raise ValueError("no such number")
        used.append(number)

    with pytest.raises(ValueError, match="no such number"):
        in_lanes(20, compute, use)
    assert used == list(range(at))
    assert torch.get_num_threads() == threads
