"""The trial of dtypes with an injected clock, and what follows from its seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from llmsqueeze.model import precision
from llmsqueeze.model.precision import ROUNDS, choose_fastest, computing_dtype, fastest_dtype, timed, trial_seconds

CPU = torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_trial_before() -> Iterator[None]:
    trial_seconds.cache_clear()
    yield
    trial_seconds.cache_clear()


class Clock:
    """Time passes only in tasks: a task takes its seconds, one number per round."""

    def __init__(self) -> None:
        self.now, self.order = 100.0, list[torch.dtype]()

    def task(self, dtype: torch.dtype, *seconds: float) -> tuple[torch.dtype, Callable[[], object]]:
        left = list(seconds)

        def run() -> None:
            self.order.append(dtype)
            self.now += left.pop(0)

        return dtype, run


def test_the_least_time_of_a_dtype_counts_but_not_its_first() -> None:
    """The first call is the slowest or, as here, wrongly the fastest; the dtypes take turns."""
    clock = Clock()
    tasks = [clock.task(F32, 0.1, 3.0, 2.0), clock.task(BF16, 9.0, 5.0, 7.0)]
    assert timed(tasks, lambda: clock.now) == {F32: 2.0, BF16: 5.0}
    assert clock.order == [F32, BF16] * ROUNDS


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({F32: 1.0, BF16: 7.0}, F32),
        ({F32: 1.0, BF16: 0.5}, BF16),
        ({F32: 1.0, BF16: 0.95}, F32),  # not clearly faster: the first stays
        ({BF16: 1.0, F32: 0.95}, BF16),
        ({F32: 1.0, BF16: 0.7, F16: 0.3}, F16),
    ],
)
def test_the_first_dtype_stays_unless_another_is_clearly_faster(
    seconds: dict[torch.dtype, float], chosen: torch.dtype
) -> None:
    assert choose_fastest(seconds) == chosen


def test_one_trial_per_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def product(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
        tried.append(dtype)
        return lambda: None

    monkeypatch.setattr(precision, "product", product)
    for _ in range(3):
        assert fastest_dtype(CPU) in (F32, BF16)
    assert tried == [F32, BF16]
    fastest_dtype(CPU, [F16, F32])
    assert tried == [F32, BF16, F16, F32]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_a_trial_multiplies(dtype: torch.dtype) -> None:
    tokens, width = precision.SHAPES["cpu"]
    assert tokens > 1
    assert precision.product(CPU, dtype)() == width, "ones: exact in every dtype"


def test_what_a_model_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half precision there is a choice, of others none."""
    asked = []

    def seconds(device: torch.device, among: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
        asked.append(among)
        return dict.fromkeys(among, 1.0) | {F32: 0.2}

    monkeypatch.setattr(precision, "trial_seconds", seconds)
    assert computing_dtype(BF16, CPU) == computing_dtype(F16, CPU) == F32
    assert asked == [(BF16, F32), (F16, F32)]
    assert computing_dtype(F32, CPU) == F32
    assert computing_dtype(torch.float64, CPU) == torch.float64
    assert computing_dtype(BF16, CPU, "stored") == BF16
    assert computing_dtype(BF16, CPU, "float32") == F32
    assert len(asked) == 2
    monkeypatch.setattr(precision, "trial_seconds", lambda _, among: dict.fromkeys(among, 1.0) | {F32: 5.0})
    assert computing_dtype(BF16, CPU) == BF16
