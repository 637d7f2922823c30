"""The time of a run by stage: wall time, and processor time of all threads. While none runs, a stage costs nearly
nothing.

    with timed("read"): ...        @timed("forward")

A stage inside another one is not counted in the outer one: every moment belongs to the innermost stage, so the stages
and `other` sum up to the time of the run. Only `verify` counts all that happens inside it. A stage in another thread is
not counted apart: its wall time is nobody's, its processor time that of the stage which the first thread is in. Kernels
on a GPU run on after the call: the stopwatch waits for them at the borders of stages.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar

LOADED = time.perf_counter()  # the package imports this first: about when a command's process began

STAGES = {
    "start": "Python and its libraries, before the run",
    "read": "weights, text and profiles read, and cast",
    "forward": "the model run block by block",
    "backward": "gradients",
    "moments": "sums over inputs and gradients",
    "factorise": "factors of the second moments",
    "round": "codes, integers, scales; their prices",
    "compensate": "drift of the inputs; low-rank factors",
    "pack": "codes packed or entropy-coded",
    "write": "files, their digests",
    "verify": "the result read back and compared",
    "trial": "the first blocks, for the forecast",
    "other": "all else",
}
OTHER = "other"
WHOLE = "verify"  # reads, runs and decodes for itself

Clock = Callable[[], float]
Times = Mapping[str, Mapping[str, float]]
P = ParamSpec("P")
R = TypeVar("R")


def processor_time() -> float:
    """Seconds of processor time, user and system, of all threads and of the child processes that have ended."""
    try:
        import resource
    except ImportError:
        return time.process_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Stopwatch:
    """Sums up the time of each stage from now on. wall, processor: clocks, in seconds. `wait` is called at every border
    of a stage. With the `age` of the process, the time before is the stage `start`."""

    def __init__(
        self, wall: Clock = time.perf_counter, processor: Clock = processor_time, age: float | None = None
    ) -> None:
        self.wait: Callable[[], None] | None = None
        self._clocks = wall, processor
        self._thread = threading.get_ident()
        self._open = [OTHER]
        self._spent = {name: [0.0, 0.0] for name in STAGES}
        self._last = wall(), processor()
        if age is not None:
            self._spent["start"] = [age, self._last[1]]

    def enter(self, name: str) -> None:
        """A stage begins."""
        if threading.get_ident() == self._thread:
            self._charge()
            self._open.append(WHOLE if self._open[-1] == WHOLE else name)

    def leave(self) -> None:
        """The innermost stage ends."""
        if threading.get_ident() == self._thread and len(self._open) > 1:
            self._charge()
            self._open.pop()

    def times(self) -> dict[str, dict[str, float]]:
        """stage -> `seconds` and `processor_seconds` so far; stages that took none are left out."""
        self._charge()
        return {
            name: {"seconds": round(wall, 4), "processor_seconds": round(processor, 4)}
            for name, (wall, processor) in self._spent.items()
            if wall or processor
        }

    def _charge(self) -> None:
        """The time since the last border goes to the innermost stage."""
        if self.wait is not None:
            self.wait()
        now = self._clocks[0](), self._clocks[1]()
        spent = self._spent[self._open[-1]]
        for i in (0, 1):
            spent[i] += now[i] - self._last[i]
        self._last = now


_running: Stopwatch | None = None  # that of the process


@contextmanager
def running(stopwatch: Stopwatch | None) -> Iterator[None]:
    """In the context this stopwatch is that of the process; None: nothing is timed."""
    global _running
    before, _running = _running, stopwatch
    try:
        yield
    finally:
        _running = before


def of_command(wanted: bool) -> AbstractContextManager[None]:
    """A context for all that a command does: if it is wanted, a stopwatch counts that from the process's beginning."""
    return running(of_process() if wanted else None)


def of_process() -> Stopwatch:
    """A stopwatch that counts all since the process began."""
    return Stopwatch(age=time.perf_counter() - LOADED)


def measured() -> dict[str, dict[str, float]] | None:
    """The times of the stopwatch of the process so far; None if none runs."""
    return None if _running is None else _running.times()


def computes_on(device: str) -> None:
    """The stopwatch, if one runs, waits for the kernels of this device."""
    if _running is not None and device.startswith("cuda"):
        import torch

        _running.wait = functools.partial(torch.cuda.synchronize, device)


class timed:  # noqa: N801 - reads as a decorator
    """A stage, as a context or around a function. Raises ValueError for a stage that there is not."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        if name not in STAGES:
            raise ValueError(f"no stage {name}; there are {', '.join(STAGES)}")
        self._name = name

    def __enter__(self) -> None:
        if _running is not None:
            _running.enter(self._name)

    def __exit__(self, *_: object) -> None:
        if _running is not None:
            _running.leave()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            if _running is None:
                return function(*args, **kwargs)
            with self:
                return function(*args, **kwargs)

        return wrapped
