"""The experts of a model: which parameters hold their matrices, how these lie, and which linears route tokens.

A module that holds experts' matrices names their number in an attribute (`num_experts`, `moe_num_experts`). How the
matrices lie is what the module tells transformers (`is_transposed`), or what the shapes tell: all but the last take the
hidden states of the model, and the last gives them. A use of them the other way is refused when the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from llmsqueeze.model.experts.linear import is_dense
from llmsqueeze.model.experts.stack import ExpertStack, stacked

COUNTS = re.compile("expert")  # in the names of attributes


def stack_experts(model: nn.Module, blocks: Sequence[str]) -> dict[str, ExpertStack]:
    """Puts a stack of linears in the place of every parameter in the blocks that holds experts' matrices; parameter ->
    stack. The linears have no data. transformers is asked for its plain loop over experts, which takes them out one by
    one."""
    stacks = {}
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            for leaf, shape, transposed in list(_matrices(module, hidden_size(model))):
                stack = stacked(getattr(module, leaf), shape, transposed)
                delattr(module, leaf)
                setattr(module, leaf, stack)
                stacks[".".join(part for part in (block, name, leaf) if part)] = stack
                if getattr(module, "config", None) is not None:
                    module.config._experts_implementation_internal = "eager"
    return stacks


def merge_stacks(model: nn.Module) -> None:
    """Puts the parameter back in the place of every stack whose linears are all plain."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertStack) and all(is_dense(linear) for linear in module.linears):
            parent, _, leaf = name.rpartition(".")
            owner, dense = model.get_submodule(parent), module.dense()
            delattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(dense, requires_grad=False))


def stacks_of(model: nn.Module) -> dict[str, ExpertStack]:
    """The stacks of experts of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def expert_linears(model: nn.Module) -> dict[str, str]:
    """Linear of an expert -> the stack that it is in."""
    return {f"{name}.{index}": name for name, stack in stacks_of(model).items() for index in range(len(stack))}


def routers(model: nn.Module, block: str) -> set[str]:
    """The linears of a block that choose experts, or weigh them: those in modules from which transformers records the
    choice, and those with one output, or one per expert, in the modules around experts."""
    inside, chosen = model.get_submodule(block), set()
    for name, module in inside.named_modules():
        if _records_choice(model, name, module) and not any(isinstance(m, ExpertStack) for m in module.modules()):
            chosen |= {_joined(block, name, inner) for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name, stack in inside.named_modules():
        mixture = name.rpartition(".")[0].rpartition(".")[0]
        if isinstance(stack, ExpertStack) and mixture and not stack.of_heads:
            chosen |= {_joined(block, mixture, n) for n in _choosing(inside.get_submodule(mixture), len(stack))}
    return chosen


def _choosing(mixture: nn.Module, experts: int) -> Iterator[str]:
    """The linears of a mixture with one output, or one per expert, that stand alone in it or in a module of it."""
    for owner, module in [("", mixture), *mixture.named_children()]:
        linears = [(name, child) for name, child in module.named_children() if isinstance(child, nn.Linear)]
        for name, linear in linears:
            if linear.out_features in (1, experts) and (not owner or len(linears) == 1):
                yield _joined(owner, name)


def hidden_size(model: nn.Module) -> int:
    """The width of the blocks."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size: int = getattr(text, "hidden_size", 0) or 0
    return size


def _matrices(module: nn.Module, hidden: int) -> Iterator[tuple[str, tuple[int, int, int], bool]]:
    """The parameters of a module that hold experts' matrices: name, [experts, ...] and whether the matrices lie as
    [cols, rows]."""
    if type(module).__module__.startswith("torch.nn"):
        return
    counts = {value for key, value in vars(module).items() if COUNTS.search(key) and type(value) is int and value > 1}
    shapes: dict[str, tuple[int, int, int]] = {}
    for leaf, parameter in module.named_parameters(recurse=False):
        sizes = tuple(parameter.shape)
        if len(sizes) == 3 and sizes[0] in counts:
            shapes[leaf] = (sizes[0], sizes[1], sizes[2])
        elif len(sizes) == 2 and (count := next((n for n in counts if sizes[0] > n and not sizes[0] % n), 0)):
            shapes[leaf] = (count, sizes[0] // count, sizes[1])
    flat = any(getattr(module, leaf).dim() == 2 for leaf in shapes)
    if flat and len(shapes) == 1:  # a router with several rows for every expert
        return
    for leaf, shape in shapes.items():
        yield leaf, shape, _transposed(module, shape, hidden, leaf == list(shapes)[-1], flat, len(shapes))


def _transposed(
    module: nn.Module, shape: tuple[int, int, int], hidden: int, last: bool, flat: bool, matrices: int
) -> bool:
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    _, first, second = shape
    if flat:  # every matrix begins with its expert's own units
        return last and matrices > 1
    of_stream, other = (first, second) if last else (second, first)
    return matrices > 1 and of_stream != hidden and other == hidden


def _records_choice(model: Any, name: str, module: nn.Module) -> bool:
    recorders = getattr(model, "_can_record_outputs", None) or {}
    recorders = recorders.get("router_logits", []) if isinstance(recorders, dict) else []
    for recorder in recorders if isinstance(recorders, list) else [recorders]:
        kind, layer = getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None)
        if isinstance(kind, type) and isinstance(module, kind) and (layer is None or layer in name):
            return True
    return False


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
