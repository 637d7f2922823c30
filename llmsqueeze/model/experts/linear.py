"""The linear of one expert. It can read its weight at every use, so that the weights of all experts of a block, which
can be many times those of an ordinary block, are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

LEAST = 128 << 20  # bytes: a block whose experts take no more in float32 has all their weights in memory
SHARE = 16  # of the bytes of a block's experts: what a chunk of them may take beside the walk

Weight = Tensor | Callable[[], Tensor]  # a weight, or what reads or makes it
Product = Callable[[Tensor, Tensor], Tensor]  # x [..., cols], weight [rows, cols] -> [..., rows]


def chunk_nbytes(experts: int) -> int:
    """Bytes that a chunk of experts may take, of a block whose experts take so many."""
    return max(LEAST, experts // SHARE)


def real(weight: Weight) -> Tensor:
    """The weight, read if it has to be."""
    return weight if isinstance(weight, Tensor) else weight()


class ExpertLinear(nn.Linear):
    """reads: gives the weight [rows, cols] at every use, as `like` has dtype and device; without it the weight is a
    parameter, as of any linear. on_gradient: gets the gradient of a weight that is read."""

    reads: Callable[[], Tensor] | None = None
    like: Tensor | None = None
    on_gradient: Callable[[Tensor], None] | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if self.reads is not None:
            return self.reads()
        parameter = self._parameters.get("weight")
        if parameter is None:
            raise AttributeError("weight")
        return parameter


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight)


def is_dense(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear has a weight, not the parts of one (formats/hf/layer.py)."""
    return isinstance(linear, nn.Linear) and not hasattr(linear, "parts")


@contextmanager
def reading(
    linears: Iterable[tuple[ExpertLinear, Callable[[], Tensor]]], like: Tensor, product: Product = plain
) -> Iterator[None]:
    """In the context these linears read their weights by these functions, and multiply by `product`."""
    linears = list(linears)
    for linear, reads in linears:
        linear.reads, linear.like = reads, like
        linear.forward = partial(_computed, linear, product)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear, _ in linears:
            linear.reads = linear.like = None
            del linear.forward


@contextmanager
def idle(linears: Iterable[nn.Module]) -> Iterator[None]:
    """In the context these linears give zeros."""
    with ExitStack() as stack:
        for linear in linears:
            before = vars(linear).get("forward")
            linear.forward = partial(_zeros, linear)
            stack.callback(_restore, linear, before)
        yield


def _restore(linear: nn.Module, forward: Any) -> None:
    del linear.forward
    if forward is not None:
        linear.forward = forward


def _zeros(linear: Any, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], linear.out_features)


def _computed(linear: ExpertLinear, product: Product, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Reread.apply(x, linear, product)  # type: ignore[no-untyped-call]
        return result
    return product(x, linear.weight)


class _Reread(torch.autograd.Function):
    """A product whose weight is read again in the backward pass: no graph holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: ExpertLinear, product: Product) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.product = linear, product
        return product(x, linear.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        linear: ExpertLinear = ctx.linear
        wanted = linear.on_gradient is not None
        x, weight = ctx.saved_tensors[0].detach().requires_grad_(True), linear.weight.detach().requires_grad_(wanted)
        with torch.enable_grad():
            output = ctx.product(x, weight)
        of_x, *of_weight = torch.autograd.grad(output, [x, weight] if wanted else [x], gradients[0])
        if linear.on_gradient is not None:
            linear.on_gradient(of_weight[0])
        return of_x, None, None
