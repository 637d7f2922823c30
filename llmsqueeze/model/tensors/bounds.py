"""Numbers in a config are checked against the size of the model's files before anything is made by them.

A config can ask for a billion layers. So, before transformers sees it, counts of layers must fit to the files; and
while the model is laid out, whatever would be allocated is summed up first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llmsqueeze.errors import CheckpointError

COUNT = re.compile(r"(^|_)(n_?|num_?)?(\w*_)?(layers?|blocks?|depth)$")  # the names of numbers of modules in configs
FEW, LAYER = 1000, 4096  # layers that any config may have, and bytes of the files for each one above
LARGEST = 1 << 40  # any other whole number in a config
PER_BYTE, SLACK = 256, 1 << 28  # bytes of a laid out model for each byte of its files, and beside that
META = torch.device("meta")


def weight_bytes(folder: Path) -> int:
    """Bytes of all files with weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.is_file())


def check_numbers(config: Mapping[str, Any], nbytes: int) -> None:
    """Raises CheckpointError for a whole number that no config has whose model's files have so many bytes."""
    for name, value in whole_numbers(config):
        most = max(FEW, nbytes // LAYER) if COUNT.search(name) else LARGEST
        if abs(value) > most:
            raise CheckpointError(
                f"config.json says {name} is {value}; at most {most} fits to the files of the model, of {nbytes} bytes"
            )


def whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in a config, each with the last key that leads to it."""
    waiting = [(name, value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """In the context tensors take at most so many bytes as fit to files of `nbytes`, or CheckpointError is raised
    before they are made. Without files (0) there is no bound."""
    if not nbytes:
        yield
        return
    with Bound(PER_BYTE * nbytes + SLACK, nbytes):
        yield


class Bound(TorchDispatchMode):
    """Sums up the bytes of all new tensors; asks the meta device how large each will be."""

    def __init__(self, most: int, files: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.files = most, files

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") != META and not any(isinstance(arg, torch.Tensor) for arg in args):
            self.left -= asked(func, args, kwargs)
            if self.left < 0:
                raise CheckpointError(
                    f"config.json describes a model far larger than its files, which have {self.files} bytes"
                )
        return func(*args, **kwargs)


def asked(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Bytes of the tensors that a call makes; 0 if the meta device cannot tell."""
    try:
        moved = tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device=META), args)
        result = func(*moved, **{**kwargs, "device": META})
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return 0
    return math.prod(result.shape) * result.dtype.itemsize if isinstance(result, torch.Tensor) else 0
