"""How much memory the process has needed so far, and how it is kept from holding what it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def peak_memory_mb() -> float:
    """The most memory that the process ever held, in MB (10**6 bytes); 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def keep_little() -> None:
    """Asks the C library (glibc) to return every freed megabyte at once, where it would keep up to 32 in pieces.

    What outlives a block lies between what does not; without this, a long run holds more and more that nobody uses.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def give_back() -> None:
    """Returns what is free in the C library's heap to the system (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_device_memory_mb(device: str = "cuda") -> float:
    """The most memory that tensors ever held on a CUDA device, in MB; 0 for any other."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
