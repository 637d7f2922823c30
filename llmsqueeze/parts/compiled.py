"""Loops that numba compiles to machine code; they release Python's global lock."""

from __future__ import annotations

from collections.abc import Callable
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
    except RuntimeError:  # neither folder is writable
        machine_code = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    typed: F = machine_code
    return typed
