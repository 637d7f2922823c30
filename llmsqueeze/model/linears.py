"""The decoder blocks of a model and the linears in them, found by type, so that no architecture is named."""

from __future__ import annotations

from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.experts.find import routers


def find_blocks(model: nn.Module) -> list[str]:
    """The decoder blocks: the members of the longest module list of one class; of equally long lists, the largest.

    Raises UnsupportedError if there is no such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1
    }
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks of one class")
    # a list inside a block (experts) can be longer than the list of blocks: only outermost lists count
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    name, members = max(
        outermost.items(), key=lambda item: (len(item[1]), sum(p.numel() for p in item[1].parameters()))
    )
    return [f"{name}.{i}" for i in range(len(members))]


def find_linears(model: nn.Module, block: str) -> list[str]:
    """Full names of the linears inside a block: nn.Linear and GPT-2's transposed Conv1D. Without those that choose
    experts: they are small, and what they choose is not to change."""
    inside, aside = model.get_submodule(block).named_modules(), routers(model, block)
    linears = (f"{block}.{name}" for name, module in inside if isinstance(module, nn.Linear) or is_transposed(module))
    return [name for name in linears if name not in aside]


def all_linears(model: nn.Module) -> set[str]:
    """Full names of every nn.Linear of the model, the head among them."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is a linear that stores its weight as [in_features, out_features]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def as_rows(module: nn.Module, stored: Tensor) -> Tensor:
    """A linear's weight as [rows, cols] = [out_features, in_features], from the stored orientation, or back."""
    return stored.T if is_transposed(module) else stored
