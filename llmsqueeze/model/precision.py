"""The dtype in which a device multiplies fastest, by a short trial of each; no list of processors would stay right.

A processor without units for bfloat16 multiplies it several times slower than float32, one with them faster. The trial
is a product of a typical shape, about 50 ms in all. It runs once per process, device and choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from llmsqueeze.parallel import processes

ROUNDS = 3  # the first one warms up
CLEARLY = 0.8  # another dtype is chosen if it takes at most this share of the first one's time
SHAPES = {"cpu": (128, 1024), "cuda": (4096, 4096)}  # tokens, width


def fastest_dtype(device: torch.device, among: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> torch.dtype:
    """The dtype of `among` in which `device` multiplies matrices fastest.

    The first is the one to keep: another must be clearly faster, so that a busy machine does not change the choice.
    """
    return processes.of_first(lambda: choose_fastest(trial_seconds(device, tuple(among))))


def choose_fastest(seconds: dict[torch.dtype, float]) -> torch.dtype:
    """The dtype with the shortest time if it is at most `CLEARLY` of the first one's, else the first."""
    first = next(iter(seconds))
    best = min(seconds, key=lambda dtype: seconds[dtype])
    return best if seconds[best] <= CLEARLY * seconds[first] else first


@cache
def trial_seconds(device: torch.device, among: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """Seconds of a product in each dtype, the least of some rounds, in which the dtypes take turns."""
    return timed([(dtype, product(device, dtype)) for dtype in among])


def timed(
    tasks: Sequence[tuple[torch.dtype, Callable[[], object]]], clock: Callable[[], float] = time.perf_counter
) -> dict[torch.dtype, float]:
    """Seconds of each task by `clock`, the least of all rounds but the first."""
    seconds = {dtype: float("inf") for dtype, _ in tasks}
    for number in range(ROUNDS):
        for dtype, task in tasks:
            start = clock()
            task()
            if number:
                seconds[dtype] = min(seconds[dtype], clock() - start)
    return seconds


def product(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A linear layer on `device` in `dtype`; a call returns when it is computed."""
    tokens, width = SHAPES[device.type]
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)

    def run() -> object:
        with torch.no_grad():
            return torch.nn.functional.linear(x, weight)[0, 0].item()  # the value cannot be read before it is there

    return run


DTYPES = ("auto", "stored", "float32")


def computing_dtype(stored: torch.dtype, device: torch.device, wanted: str = "auto") -> torch.dtype:
    """The dtype that a model of dtype `stored` computes in. wanted: one of DTYPES.

    `auto`: float32 for a bfloat16 or float16 model if the device is clearly faster in it, else that of the model.
    """
    if wanted == "float32":
        return torch.float32
    if wanted == "auto" and stored in (torch.bfloat16, torch.float16):
        return fastest_dtype(device, (stored, torch.float32))
    return stored
