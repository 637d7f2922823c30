"""Which experts a model chooses for its tokens: noted in one run, and chosen again in another.

While moments are taken behind compressed layers, the compressed model's tokens have to go to the experts that the
original model chose: only then are the inputs that an expert sees in both those of the same tokens. Every router
chooses by `topk`, so its indices are what is noted. In a run that follows them, the values at these indices are those
of its own scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CHOICES = (torch.topk, Tensor.topk)


class Routing(TorchFunctionMode):
    """In the context the choices by `topk` are noted, or those of `follows` are made again, in their order."""

    def __init__(self, follows: Routing | None = None) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []
        self._follows = None if follows is None else iter(follows.chosen)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = function(*args, **kwargs)
        if function not in CHOICES or "out" in kwargs:
            return result
        again = None if self._follows is None else next(self._follows, None)
        if again is not None and again.shape == result.indices.shape:
            scores, dim = args[0] if args else kwargs["input"], args[2] if len(args) > 2 else kwargs.get("dim", -1)
            result = torch.return_types.topk((scores.gather(dim, again), again))
        self.chosen.append(result.indices)
        return result
