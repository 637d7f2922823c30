"""The experts' matrices that transformers holds in one parameter [experts, rows, cols], as one linear per expert.

`ExpertStack` takes the parameter's place in its module. What the module takes out of it (`self.down_proj[3]`) is an
`Expert`: it has the shape of a matrix, and a product with it is computed by the linear of that expert, so that hooks
and replaced weights act as on any linear. Every other use of it computes with the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.experts.linear import ExpertLinear, is_dense

LINEAR = {nn.functional.linear}
MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}


class ExpertStack(nn.Module):
    """The linears of all experts, children "0", "1", ..., in the place of a parameter of shape `shape`: [experts, rows,
    cols], or [experts * rows, cols]. transposed: the parameter holds [cols, rows] of each. of_heads: they are no
    experts, to which a router sends tokens, but the heads of a block."""

    def __init__(self, linears: Iterable[nn.Module], shape: Sequence[int], transposed: bool) -> None:
        super().__init__()
        for index, linear in enumerate(linears):
            self.add_module(str(index), linear)
        self.shape, self.transposed = torch.Size(shape), transposed
        self.of_heads = False
        self._is_hf_initialized = True  # else transformers would fill the parameter with random numbers

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (
            isinstance(index, Tensor) and index.numel() == 1 and not index.is_floating_point()
        ):
            return Expert(self, int(index) % len(self), self.transposed)
        if index == (slice(None), None) and not self.transposed:
            return Factors(self)
        return self.dense()[index]

    def linear(self, index: int) -> nn.Module:
        """The linear of an expert."""
        return cast(nn.Module, self._modules[str(index)])

    @property
    def linears(self) -> list[nn.Module]:
        return [self.linear(index) for index in range(len(self))]

    @property
    def rows(self) -> int:
        """Rows of an expert's matrix."""
        *_, first, second = self.shape
        return second if self.transposed else first if len(self.shape) == 3 else first // len(self)

    def dense(self) -> Tensor:
        """The parameter whose place this takes."""
        return self.merged([_weight(linear) for linear in self.linears])

    def merged(self, matrices: Sequence[Tensor]) -> Tensor:
        """The parameter that holds these matrices [rows, cols], one for each expert."""
        return torch.stack([one.T if self.transposed else one for one in matrices]).reshape(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return _like(self.linear(0)).dtype

    @property
    def device(self) -> torch.device:
        first = self.linear(0)
        if is_dense(first):
            return _like(first).device
        return next(first.parameters(), next(first.buffers(), torch.empty(0))).device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: Any) -> Any:
        """Itself, as one matrix per expert, or the dense parameter in another shape."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        whole = torch.empty(self.shape, device="meta").view(sizes).shape
        if len(whole) == 3 and whole[0] == len(self):
            return Experts(self, self.transposed)
        return self.dense().view(sizes)

    reshape = view

    def transpose(self, first: int, second: int) -> Any:
        if self.ndim == 3 and {first % 3, second % 3} == {1, 2}:
            return Experts(self, not self.transposed)
        return self.dense().transpose(first, second)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, dict(kwargs or {}))


class Factors:
    """All matrices of a stack as left factors, [experts, 1, rows, cols]."""

    def __init__(self, stack: ExpertStack) -> None:
        self.stack = stack

    def __matmul__(self, x: Tensor) -> Tensor:
        """x [experts, some, cols, tokens] -> [experts, some, rows, tokens]"""
        pairs = zip(self.stack.linears, x.transpose(-1, -2), strict=True)
        return torch.stack([linear(one) for linear, one in pairs]).transpose(-1, -2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stack.dense()[:, None], name)


def stacked(parameter: Tensor, shape: tuple[int, int, int], transposed: bool) -> ExpertStack:
    """A stack of linears without data for a parameter that holds matrices of this shape, [experts, rows, cols] or, if
    they lie `transposed`, [experts, cols, rows]."""
    count, rows, cols = shape
    with torch.device("meta"):
        sizes = (rows, cols) if transposed else (cols, rows)
        linears = [ExpertLinear(*sizes, bias=False, dtype=parameter.dtype) for _ in range(count)]
    return ExpertStack(linears, parameter.shape, transposed)


class Experts:
    """All matrices of a stack, [experts, ...]. transposed: each as [cols, rows]."""

    def __init__(self, stack: ExpertStack, transposed: bool) -> None:
        self.stack, self.transposed = stack, transposed

    def __getitem__(self, index: Any) -> Any:
        taken = self.stack[index]
        return Expert(self.stack, taken.index, self.transposed) if isinstance(taken, Expert) else self.dense()[index]

    def dense(self) -> Tensor:
        return torch.stack([Expert(self.stack, i, self.transposed).dense() for i in range(len(self.stack))])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, dict(kwargs or {}))


class Expert:
    """The matrix of one expert. transposed: as [cols, rows]. dtype: what it was cast to, if it was."""

    def __init__(self, stack: ExpertStack, index: int, transposed: bool, dtype: torch.dtype | None = None) -> None:
        self.stack, self.index, self.transposed, self.cast = stack, index, transposed, dtype

    def dense(self) -> Tensor:
        weight = _weight(self.stack.linear(self.index))
        weight = weight if self.cast is None else weight.to(self.cast)
        return weight.T if self.transposed else weight

    def product(self, x: Tensor) -> Tensor:
        """x [..., cols] -> [..., rows], by the expert's linear."""
        linear = self.stack.linear(self.index)
        if self.cast is not None and is_dense(linear) and _like(linear).dtype != x.dtype:
            return nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias)
        result: Tensor = linear(x)
        return result

    @property
    def T(self) -> Expert:  # noqa: N802 - torch's name
        return Expert(self.stack, self.index, not self.transposed, self.cast)

    def t(self) -> Expert:
        return self.T

    def to(self, *args: Any, **kwargs: Any) -> Any:
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        return Expert(self.stack, self.index, self.transposed, dtypes[0] if dtypes else self.cast)

    def float(self) -> Any:
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return cast(Tensor, _computed(torch.matmul, (x, self), {}))

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, dict(kwargs or {}))


def _computed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives for arguments among which are experts."""
    if len(args) >= 2 and not isinstance(args[0], Expert | Experts | ExpertStack):
        x, matrix = args[:2]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if function in LINEAR and isinstance(matrix, Expert):
            product = _oriented(matrix, by_rows=True).product(x)
            return product if bias is None else product + bias
        if function in MATMUL and isinstance(matrix, Expert):
            return _oriented(matrix, by_rows=False).product(x)
        if function in BATCHED and isinstance(matrix, Experts | ExpertStack) and x.dim() == 3:
            experts = matrix if isinstance(matrix, Experts) else Experts(matrix, matrix.transposed)
            return torch.stack([_oriented(experts[i], by_rows=False).product(one) for i, one in enumerate(x)])
    return function(*map(_dense, args), **{key: _dense(value) for key, value in kwargs.items()})


def _oriented(expert: Expert, by_rows: bool) -> Expert:
    """The expert, whose matrix is used as [rows, cols] or, not by_rows, as [cols, rows]. Raises UnsupportedError if it
    is taken to lie the other way."""
    if expert.transposed == by_rows:
        raise UnsupportedError(
            f"the model multiplies with its experts' matrices of shape {list(expert.stack.shape)} the other way round "
            "than their shapes and the module tell; this architecture is not supported"
        )
    return expert


def _dense(value: Any) -> Any:
    if isinstance(value, Expert | Experts | ExpertStack):
        return value.dense()
    return type(value)(map(_dense, value)) if type(value) in (list, tuple) else value


def _like(linear: nn.Module) -> Tensor:
    """A tensor with the dtype and device of a linear's weight."""
    like = linear.like if isinstance(linear, ExpertLinear) else None
    return _weight(linear) if like is None else like


def _weight(linear: nn.Module) -> Tensor:
    return cast(Tensor, linear.weight)
