"""Loops that numba compiles to machine code; they release Python's global lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function in machine code, cached beside its file or in the cache folder of the user."""
    machine_code: Any
    try:
        machine_code = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither folder is writable
        machine_code = numba.njit(nogil=True, error_model="numpy")(function)
    typed: F = machine_code
    return typed
