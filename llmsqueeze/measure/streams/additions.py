"""What the output of a linear is added to, seen while a block runs: for blocks that have no trace (trace.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
MUL = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)


class Followed(Exception):  # noqa: N818 - no error
    """Ends a block's forward pass: something else than an addition takes the output of the linear, or its sum."""


class Additions(TorchDispatchMode):
    """Follows the output of a linear, as `BlockTrace.added_to` does: `total` is the sum of the values that stood before
    the linear was called, and to which its output times `factor` is added; None if there are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: Tensor | None = None
        self.factor = 1.0
        self._now: Tensor | None = None
        self._later: list[Tensor] = []  # they are kept, so that no other tensor gets their place

    def follow(self, output: Tensor) -> None:
        """output: of the linear"""
        self._now = output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        now = self._now
        if now is None:
            return func(*args, **(kwargs or {}))
        if not any(value is now for value in args):
            result = func(*args, **(kwargs or {}))
            self._later += [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            return result
        others = [value for value in args if value is not now]
        other = others[0] if len(others) == 1 else None
        if func in ADD and not kwargs and isinstance(other, Tensor) and other.shape == now.shape:
            if not any(value is other for value in self._later):
                self.total = other.clone() if self.total is None else self.total + other
        elif func in MUL and isinstance(other, int | float) and self.total is None:
            self.factor *= other
        else:
            raise Followed
        self._now = func(*args)
        return self._now
