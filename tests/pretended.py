"""A GPU that is not there: tensors on the CPU that say they are on it, and meet only their like.

Inside `pretended_gpu()`, what is moved to or made on "cuda" stays in ordinary memory but is marked, by its storage.
Marked tensors give marked results, their `device` is the GPU's, and where one meets a tensor that is not marked, or is
given to numpy, the errors of torch on a real GPU are raised. Numbers are the CPU's, so a run may be compared bit by bit
with one on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
# of these, arguments from here on may be on the CPU while the first is on the GPU
FREE = {aten.copy_.default: 0, aten._to_copy.default: 0, aten.index.Tensor: 1}


class Marks:
    """Which storages are on the GPU. A weak reference keeps an address from being used again while it is noted."""

    def __init__(self) -> None:
        self._marked: dict[int, StorageWeakRef] = {}

    def put(self, value: Any) -> Any:
        for tensor in (each for each in _tensors(value) if not each.is_meta):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._marked:
                self._marked[storage._cdata] = StorageWeakRef(storage)
        return value

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._marked

    def lift(self, tensor: Tensor) -> Tensor:
        self._marked.pop(tensor.untyped_storage()._cdata, None)
        return tensor

    def forget_the_dead(self) -> None:
        for key in [key for key, storage in self._marked.items() if storage.expired()]:
            del self._marked[key]


class Operations(TorchDispatchMode):
    """Every operation, those of a backward pass too: no tensors of two devices, and results where the inputs are."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks, self.seen = marks, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and to say so at every operation takes a third of the time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.seen += 1
        if self.seen % 10_000 == 0:
            self.marks.forget_the_dead()
        given = [tensor for tensor in _tensors((args, kwargs) if kwargs else args) if not tensor.is_meta]
        if not any(tensor in self.marks for tensor in given):
            return func(*args, **kwargs)
        bound = _tensors(args[: FREE[func]]) if func in FREE else given
        if func in (aten.index_put.default, aten.index_put_.default):
            bound = [args[0], args[2]]
        if any(tensor not in self.marks and tensor.dim() and not tensor.is_meta for tensor in bound):
            where = ", ".join(f"{tuple(each.shape)} {'cuda' if each in self.marks else each.device}" for each in given)
            raise RuntimeError(f"{MIXED} ({func} of {where})")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        result = func(*args, **kwargs)
        # a copy into the CPU's memory leaves it there
        return result if func is aten.copy_.default else self.marks.put(result)


class Calls(TorchFunctionMode):
    """What is asked of torch by name: moves, devices, makers, numpy."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # made anew at every look, so equal and not the same
            return GPU if args[0] in self.marks else func(*args)
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return (args[0] in self.marks) is (func == Tensor.is_cuda.__get__)
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in self.marks:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            return func(args[0], self.within(args[1]))
        if func is Tensor.cpu:
            return self._moved(args[0], "cpu")
        if func is Tensor.cuda:
            return self._moved(args[0], "cuda")
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        return self._made(func, args, kwargs)

    def within(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook` where the GPU is: a backward pass runs it outside of modes like this one."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self:
                return hook(*arguments, **named)

        return wrapped

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for argument in args:
            if isinstance(argument, Tensor):
                device, dtype = GPU if argument in self.marks else "cpu", argument.dtype
            elif isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, str | torch.device):
                device = argument
        moved = tensor if device is None else self._moved(tensor, device)
        return moved.to(dtype=dtype or tensor.dtype, copy=copy and moved is tensor)

    def _moved(self, tensor: Tensor, device: Any) -> Tensor:
        if torch.device(device).type == "meta" or tensor.is_meta:
            return tensor.to(device)
        wanted = torch.device(device).type == "cuda"
        if wanted is (tensor in self.marks):
            return tensor
        copy = tensor.clone()
        return self.marks.put(copy) if wanted else self.marks.lift(copy)

    def _made(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is None or isinstance(device, int) or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        return self.marks.put(func(*args, **kwargs | {"device": "cpu"}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    tensors: list[Tensor] = []
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, list | tuple | dict):
            tensors += _tensors(item)
    return tensors


@contextmanager
def pretended_gpu() -> Iterator[Calls]:
    """torch says that it has one GPU, for as long as the block lasts. What a backward pass calls and is no hook of a
    tensor goes through `within` of what is given."""
    marks = Marks()
    calls = Calls(marks)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        # a build of torch with CUDA would look for a driver, to see whether a graph is captured
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=None),
        mock.patch.object(torch.cuda, "max_memory_allocated", return_value=123_000_000),
        mock.patch("transformers.modeling_utils.caching_allocator_warmup"),  # takes what a GPU has of memory
        mock.patch(
            "llmsqueeze.quantizers.kernels._tried", return_value=False
        ),  # Triton would start kernels on a real one
        # these two belong to a thread, so transformers must not load with others
        mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
        Operations(marks),
        calls,
    ):
        yield calls
