"""The peak memory of the process, and the return of freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SLACK = 48 << 20  # bytes
SPARE = 0.1  # of the free memory that stays free
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of glibc's mallopt
GROUP = "/sys/fs/cgroup/memory"
CGROUPS = (  # of version 2 and of version 1: the files of the limit and of what is in use
    (f"{GROUP}.max", f"{GROUP}.current"),
    (f"{GROUP}/memory.limit_in_bytes", f"{GROUP}/memory.usage_in_bytes"),
)
_after = 0  # the memory of the process after the last `give_back`


def peak_memory_mb() -> float:
    """The peak resident memory of the process, in MB (10**6 bytes); 0 if the platform does not tell it.

    Linux tells it in /proc. Its `getrusage` counts in what the caller of the process had when it called.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def free_memory() -> int | None:
    """Bytes that the process may still take without swapping: what the system and its control group leave; None if the
    platform does not tell."""
    rooms = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        rooms.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            rooms.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(rooms)) if rooms else None


def total_on(device: torch.device) -> int | None:
    """Bytes of memory that a device has, or that the machine and the control group give to the process; None if nobody
    tells."""
    if device.type != "cpu":
        import torch

        try:
            total: int = torch.cuda.mem_get_info(device)[1]
        except (AssertionError, RuntimeError):
            return None
        return total
    rooms = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        rooms.append(int(next(line for line in lines if line.startswith("MemTotal:")).split()[1]) * 1024)
    for limit, _ in CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            rooms.append(int(Path(limit).read_text()))
    return min(rooms) if rooms else None


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a device, as `free_memory`; None if nobody tells."""
    if device.type == "cpu":
        return free_memory()
    import torch

    try:
        free: int = torch.cuda.mem_get_info(device)[0]
    except (AssertionError, RuntimeError):  # torch or the driver cannot tell
        return None
    return free


def fits(needed: int, free: int | None) -> bool:
    """Whether so many bytes leave a tenth of those that are free; yes if nobody knows how many are."""
    return free is None or needed <= (1 - SPARE) * free


def memory_mb() -> float:
    """The resident memory of the process now, in MB; 0 if the platform does not tell it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return round(pages * mmap.PAGESIZE / 1e6, 1)
    return 0.0


def keep_within_block() -> None:
    """Tells the C library (glibc) to take pieces up to 32 MB, the most it allows, from its heap.

    Anything larger it takes from the system, and every first touch of a page costs the kernel's time: with its default
    of 128 kB a fifth of a run. The heap keeps what is freed for the next of its size, also up to 32 MB at its end,
    which it would give back at once; `give_back` empties it after every fusion group. All threads share one heap, else
    each would keep memory of its own.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_TRIM_THRESHOLD, 32 << 20)


def keep_freed() -> None:
    """Tells the C library (glibc) to take all memory from its heap and to keep what is freed.

    Tensors of the same sizes come and go with every batch, and every first touch of a page costs the kernel's time.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back() -> None:
    """Returns the free memory of the C library's heap to the system (glibc), if the process has grown by `SLACK` since.

    Every page that is needed again costs the kernel a few microseconds, so little is not given back.
    """
    global _after
    now = _resident_nbytes()
    if 0 < now < _after + SLACK:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    _after = _resident_nbytes()


def _resident_nbytes() -> int:
    """The memory of the process as it is; 0 if the platform does not tell it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0


def peak_device_memory_mb(device: str = "cuda") -> float:
    """The peak memory of tensors on a CUDA device, in MB; 0 for any other device."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 0.0
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
