"""The stopwatch: exclusive times by clocks that the test turns, threads, and what it costs to be idle: nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmsqueeze.progress import stopwatch
from llmsqueeze.progress.stopwatch import STAGES, Stopwatch, timed


class Hands:
    """Two clocks that a test moves on."""

    def __init__(self) -> None:
        self.wall = self.processor = 100.0

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(lambda: self.wall, lambda: self.processor)

    def pass_by(self, wall: float, processor: float | None = None) -> None:
        self.wall += wall
        self.processor += wall if processor is None else processor


@pytest.fixture
def hands() -> Iterator[Hands]:
    """Those of the stopwatch that runs during the test."""
    hands = Hands()
    with stopwatch.running(hands.stopwatch()):
        yield hands


def seconds(kind: str = "seconds") -> dict[str, float]:
    times: Any = stopwatch.measured()
    return {stage: one[kind] for stage, one in times.items()}


def test_a_moment_belongs_to_the_innermost_stage(hands: Hands) -> None:
    @timed("forward")
    def run() -> str:
        hands.pass_by(4)
        return "ran"

    hands.pass_by(1)
    with timed("moments"):
        hands.pass_by(2)
        assert run() == "ran"
        hands.pass_by(8)
    hands.pass_by(16)
    assert seconds() == {"forward": 4, "moments": 10, "other": 17}


def test_wall_and_processor_time_are_told_apart(hands: Hands) -> None:
    with timed("read"):
        hands.pass_by(3, 0.5)
    with timed("round"):
        hands.pass_by(2, 4)  # two threads
    assert seconds() == {"read": 3, "round": 2}
    assert seconds("processor_seconds") == {"read": 0.5, "round": 4}


def test_the_stages_sum_up_to_the_run(hands: Hands) -> None:
    for i, stage in enumerate(STAGES, 1):
        hands.pass_by(0.5)
        with timed(stage), timed("read"):
            hands.pass_by(i)
    assert sum(seconds().values()) == hands.wall - 100.0


def test_verification_counts_all_that_happens_inside_it(hands: Hands) -> None:
    with timed("verify"):
        with timed("read"), timed("pack"):
            hands.pass_by(1)
        hands.pass_by(2)
    with timed("read"):
        hands.pass_by(4)
    assert seconds() == {"verify": 3, "read": 4}


def test_the_age_of_the_process_is_a_stage(hands: Hands) -> None:
    aged = Stopwatch(lambda: hands.wall, lambda: hands.processor, age=7)
    hands.pass_by(1)
    assert aged.times() == {
        "start": {"seconds": 7, "processor_seconds": 100},
        "other": {"seconds": 1, "processor_seconds": 1},
    }


def test_an_error_ends_its_stage(hands: Hands) -> None:
    with pytest.raises(KeyError), timed("write"):
        raise KeyError
    hands.pass_by(1)
    assert seconds() == {"other": 1}


def test_another_thread_changes_no_stage(hands: Hands) -> None:
    def behind() -> None:
        with timed("read"):
            hands.pass_by(1)

    with timed("round"):
        thread = threading.Thread(target=behind)
        thread.start()
        thread.join()
        hands.pass_by(2)
    assert seconds() == {"round": 3}


def test_a_stage_that_began_before_the_stopwatch(hands: Hands) -> None:
    stage = timed("read")
    stage.__enter__()
    with stopwatch.running(hands.stopwatch()):
        hands.pass_by(1)
        stage.__exit__()
        hands.pass_by(2)
        assert seconds() == {"other": 3}
    assert seconds() == {"read": 3}


def test_kernels_are_waited_for_at_the_borders(hands: Hands) -> None:
    """A kernel's time belongs to the stage that called it."""
    running, queue = hands.stopwatch(), list[float]()

    def wait() -> None:
        hands.pass_by(sum(queue), 0)
        queue.clear()

    running.wait = wait
    with stopwatch.running(running):
        with timed("forward"):
            queue.append(5)
        with timed("moments"):
            queue.append(7)
        assert seconds() == {"forward": 5, "moments": 7}


def test_on_a_gpu_the_stopwatch_waits_and_only_there(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    stopwatch.computes_on("cpu")
    with timed("round"):
        pass
    assert waited == []
    stopwatch.computes_on("cuda:1")
    with timed("round"):
        pass
    assert waited == ["cuda:1", "cuda:1"]


def test_without_a_stopwatch_nothing_is_measured() -> None:
    @timed("round")
    def double(value: int, *, more: int = 0) -> int:
        """Twice."""
        return 2 * value + more

    assert stopwatch.measured() is None
    assert double(3, more=1) == 7
    assert double.__doc__ == "Twice."
    with timed("read"):
        stopwatch.computes_on("cuda")  # asks no GPU


def test_a_stage_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="no stage forwards; there are start, read, forward"):
        timed("forwards")
