"""How much memory the process has needed so far."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def peak_memory_mb() -> float:
    """The most memory that the process ever held, in MB (10**6 bytes); 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def give_back() -> None:
    """Returns freed memory to the system, where the C library can (glibc keeps it otherwise, in pieces).

    What outlives a block lies between what does not; without this, a long run holds more and more that nobody uses.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_device_memory_mb(device: str = "cuda") -> float:
    """The most memory that tensors ever held on a CUDA device, in MB; 0 for any other."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
