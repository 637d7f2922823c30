"""The processes of a run: `torchrun` or `accelerate launch` starts them, torch.distributed joins them.

    torchrun --nproc-per-node 2 -m llmsqueeze quantize MODEL --bits 3

Each has its shares of the samples (shares.py) and its rows of every weight. All of them decide alike, from the same
numbers; the first one reads texts, plans, writes and prints. They talk over gloo, from the memory of the CPU, so that
every device takes the same way. If there is one process, each function here gives back what it is given.

A process that ends closes its connections, and the others raise ProcessError at their next word to it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmsqueeze.errors import ProcessError, SqueezeError
from llmsqueeze.parallel import launched
from llmsqueeze.parallel.threads import SIDE_BY_SIDE

PATIENCE = timedelta(days=1)  # the others wait while the first one writes and verifies
_apart = False  # whether this process works for all of them just now
T = TypeVar("T")
OverRows = Callable[[int, Callable[[slice], Sequence[Tensor]]], list[Tensor]]  # as `over_rows`


def count() -> int:
    """How many processes have joined this run."""
    return 1 if _apart else _size()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process among those of its machine, by what the launcher says."""
    return launched.number("LOCAL_RANK")


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """In the context the processes that a launcher started are one run."""
    if launched.count() == 1 or dist.is_initialized():
        yield
        return
    with _talking():
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_first(value: Callable[[], T]) -> T:
    """What the first process computes, in all of them; an error of ours that it raises is raised in all."""
    if count() == 1:
        return value()
    outcome: tuple[T | None, SqueezeError | None] = None, None
    if first():
        try:
            with _work_apart():
                outcome = value(), None
        except SqueezeError as refusal:
            outcome = None, refusal
    result, raised = told(outcome)
    if raised is not None:
        raise raised
    return result  # type: ignore[return-value]


def side_by_side(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks give, each done by a process of its own, and by this one if there is no other. The first process
    gets all results; the others have None for those of others. An error of ours that one raises is raised in all."""
    if count() == 1:
        return [task() for task in tasks]
    own: list[Any] = [None] * len(tasks)
    refused: SqueezeError | None = None
    try:
        with _work_apart():
            for number in range(rank(), len(tasks), _size()):
                own[number] = tasks[number]()
    except SqueezeError as error:
        refused = error
    for sender, (results, raised) in enumerate(gathered(([] if first() else own, refused))):
        if raised is not None:
            raise raised
        if first() and sender != rank():
            own[sender :: count()] = results[sender :: count()]
    return own


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def told(value: T) -> T:
    """The first process's value, in all of them."""
    return _from(0, value)


def gathered(value: T) -> list[T]:
    """The value of every process, in all of them, in their order."""
    return [_from(sender, value) for sender in range(count())]


def all_of(numbers: Sequence[int], values: Sequence[T], total: int) -> list[T]:
    """The values of all numbers below `total`, in all processes; each has those of its own numbers."""
    if count() == 1:
        return list(values)
    every: dict[int, T] = {}
    for of_process in gathered(dict(zip(numbers, values, strict=True))):
        every |= of_process
    return [every[number] for number in range(total)]


def turns(total: int) -> list[int]:
    """The numbers below `total` that are this process's, if they are dealt out in turn."""
    return list(range(rank(), total, count()))


def rows_of(rows: int, number: int) -> slice:
    """The rows of a matrix that a process takes, if there are enough to share."""
    cuts = [min(rows, -(-rows * i // count() // SIDE_BY_SIDE) * SIDE_BY_SIDE) for i in range(count() + 1)]
    return slice(cuts[number], cuts[number + 1])


def all_rows(rows: int, compute: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
    """`over_rows` of what one process does alone."""
    return list(compute(slice(0, rows)))


def over_rows(rows: int, compute: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
    """compute(some rows) for all rows of a matrix, each process taking some: the tensors [rows, ...] that it gives,
    joined, in all processes. What it gives for a row may not depend on the other rows."""
    if count() == 1 or rows < SIDE_BY_SIDE * count():
        return all_rows(rows, compute)
    own = compute(rows_of(rows, rank()))
    joined_rows = [torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device) for tensor in own]
    with _talking():
        for sender in range(count()):
            span = rows_of(rows, sender)
            for tensor, whole in zip(own, joined_rows, strict=True):
                part = (tensor if sender == rank() else whole[span]).cpu().contiguous()
                dist.broadcast(_as_bytes(part), sender)
                whole[span] = part.to(whole)
    return joined_rows


def send(tensors: dict[str, Tensor]) -> None:
    """Sends named tensors to the first process, which has to `receive` them."""
    about = _pickled({name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    with _talking():
        dist.send(torch.tensor([len(about)]), 0)
        dist.send(about, 0)
        for tensor in tensors.values():
            dist.send(_as_bytes(tensor.cpu().contiguous()), 0)


def receive(sender: int) -> Iterator[tuple[str, Tensor]]:
    """The named tensors that another process sends, one after the other."""
    with _talking():
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, sender)
        about = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(about, sender)
    for name, (shape, dtype) in _unpickled(about).items():
        tensor = torch.empty(shape, dtype=dtype)
        with _talking():
            dist.recv(_as_bytes(tensor), sender)
        yield name, tensor


def of_first_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The named tensors of the first process, in all of them; the others' own are for their device alone."""
    if count() == 1:
        return tensors
    about = told({name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()})
    result = {}
    for name, (shape, dtype, kind) in about.items():
        content = tensors[name].cpu().contiguous() if first() else torch.empty(shape, dtype=dtype)
        with _talking():
            dist.broadcast(_as_bytes(content), 0)
        result[name] = tensors[name] if first() else content.to(kind)
    return result


def meet() -> None:
    """Waits for all processes."""
    gathered(None)


def _from(sender: int, value: T) -> T:
    """The value of one process, in all of them."""
    if count() == 1:
        return value
    content = _pickled(value) if sender == rank() else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(content)])
    with _talking():
        dist.broadcast(size, sender)
        if sender != rank():
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, sender)
    return value if sender == rank() else _unpickled(content)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())  # from a process of the same run


@contextmanager
def _work_apart() -> Iterator[None]:
    """In the context this process does not talk to the others, which wait for it."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


@contextmanager
def _talking() -> Iterator[None]:
    """An error of the connection is one of a process that has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"another process of this run has ended, or cannot be reached ({_reason(error)}); the same command goes on"
        ) from error


def _reason(error: RuntimeError) -> str:
    lines = [line for line in str(error).strip().splitlines() if line]
    return lines[-1] if lines else type(error).__name__
