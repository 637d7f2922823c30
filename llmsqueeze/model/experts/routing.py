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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.experts.stack import ExpertStack

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


def sent_to_all(block: nn.Module) -> list[RemovableHandle]:
    """Hooks by which every token of a block goes to all experts; what the block then gives means nothing. Raises
    UnsupportedError when the block runs, if its experts do not get the numbers of the experts of each token."""
    owners = {
        module: len(child)
        for module in block.modules()
        for child in module.children()
        if isinstance(child, ExpertStack)
    }

    def everywhere(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        chosen = [x for x in leaves if isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()]
        if len(chosen) != 1:
            raise UnsupportedError(
                "--all-experts needs a model whose experts get the numbers of the experts of each token, and this one "
                "passes them on otherwise; leave it out"
            )
        tokens, count = chosen[0].shape[0], owners[module]
        numbers = torch.arange(count, device=chosen[0].device).expand(tokens, count)
        weights = [x for x in leaves if isinstance(x, Tensor) and x.shape == chosen[0].shape and x is not chosen[0]]
        for at, x in enumerate(leaves):
            if x is chosen[0]:
                leaves[at] = numbers
            elif any(x is one for one in weights):
                leaves[at] = x.new_ones(tokens, count)
        return pytree.tree_unflatten(leaves, structure)

    return [module.register_forward_pre_hook(everywhere, with_kwargs=True) for module in owners]
