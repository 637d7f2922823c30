"""How much memory the process has needed so far."""

from __future__ import annotations

import sys


def peak_memory_mb() -> float:
    """The most memory that the process ever held, in MB (10**6 bytes); 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def peak_device_memory_mb(device: str = "cuda") -> float:
    """The most memory that tensors ever held on a CUDA device, in MB; 0 for any other."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
