"""Loops over the columns of a weight as Triton kernels for NVIDIA GPUs. Nothing here imports Triton before it is used.

The torch form of a loop starts about ten small kernels of the GPU for each column. Here a program takes 4 rows
through the columns of a panel, with their weights or their gradient in registers, and one matrix product carries a
panel to the columns after it.

    scales.py     scale and zero of a group, from its range or searched
    feedback.py   the columns of a panel rounded in order, with error feedback: of GPTQ, and of coded weights
    sweep.py      one pass of coordinate descent over the columns of a panel: of grids, and of coded weights
    levels.py     what these share: the level nearest to a value

Not here, because they are a few large operations in torch already: the refit of scales (normal equations and a batched
solve) and the gains of coded weights. Every weight sees the operations of the torch form in the same order, so codes
are equal bit by bit; only the sums of a fit (the errors in a search, the mean of one bit) have another order.

WHAT IS NOT PROVEN: these kernels were run in Triton's interpreter and compiled for GPUs, but no GPU has run them yet.
So they are tried on each GPU once (trial.py): if a kernel does not compile, or differs from the torch form, the torch
form is used for everything.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can round `tensor`: float32, on a GPU where they were tried with success."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and _tried(tensor.device)


@functools.cache
def _tried(device: torch.device) -> bool:
    # a build for AMD says "cuda" too; Windows and builds for CPUs have no Triton
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        from llmsqueeze.quantizers.kernels.trial import differences

        wrong = ", ".join(differences(device))
    except Exception as error:  # no C compiler, a driver that is too old, anything: there is another way
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(f"Triton's kernels do not work on this GPU, so rounding is slower ({wrong})", stacklevel=2)
    return not wrong
