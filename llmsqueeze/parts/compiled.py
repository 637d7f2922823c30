"""Loops that numba compiles to machine code; they release Python's global lock. Their files call each other only within
a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function in machine code, cached beside its file or in the cache folder of the user."""
    return _compile(function, False)


def compiled_sums(function: F) -> F:
    """As `compiled`, for sums whose order is free: a processor adds up several parts side by side."""
    return _compile(function, {"reassoc", "nsz", "contract"})


def _compile(function: F, fastmath: bool | set[str]) -> F:
    machine_code: Any
    try:
        machine_code = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath, cache=True)(function)
        # numba compiles again if the function's file changes, but the function may call those of its neighbours
        machine_code._cache._cache_file._source_stamp = _stamps(Path(function.__code__.co_filename).parent)
    except RuntimeError:  # neither folder is writable
        machine_code = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    typed: F = machine_code
    return typed


@functools.cache
def _stamps(folder: Path) -> tuple[tuple[str, float, int], ...]:
    """Name, time and size of every Python file of a folder."""
    files = sorted(folder.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)
