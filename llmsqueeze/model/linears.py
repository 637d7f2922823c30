"""The decoder blocks of a model and the linears in them, found by type, so that no architecture is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.model.experts.find import routers


def find_blocks(model: nn.Module) -> list[str]:
    """The decoder blocks: the members of the module list with the most weights, of one class or of several. Lists
    without linears do not count, nor those in towers for images or sound; the members of lists in the list are blocks.

    Raises UnsupportedError if there is no such list.
    """
    towers = tuple(f"{name}." for name in find_towers(model))
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not f"{name}.".startswith(towers)
        and any(_has_matrix(inside) for inside in module.modules())
    }
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    # a list inside a block (experts) can be longer than the list of blocks: only outermost lists count
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    name, _ = max(outermost.items(), key=lambda item: sum(map(_weights_of, item[1].modules())))
    return _members(name, outermost[name])


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module is a linear, or a compressed one in the place of one."""
    return is_linear(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _weights_of(module: nn.Module) -> int:
    """How many weights the module itself has, compressed or not."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        sizes: Any = module
        return int(sizes.in_features * sizes.out_features)
    return sum(p.numel() for p in module.parameters(recurse=False))


def _members(name: str, module: nn.Module) -> list[str]:
    if not isinstance(module, nn.ModuleList):
        return [name]
    return [block for i, member in enumerate(module) for block in _members(f"{name}.{i}", member)]


def find_towers(model: nn.Module) -> list[str]:
    """The parts of a multimodal model for other senses: submodels with the config of one, or with a config that is not
    that of the text, if the text has one of its own."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return []
    config, text = model.config, model.config.get_text_config(decoder=True)
    senses = {type(getattr(config, f"{sense}_config", None)) for sense in ("vision", "audio")}
    return [
        name
        for name, one in model.named_modules()
        if isinstance(one, PreTrainedModel)
        and (type(one.config) in senses or (text is not config and type(one.config) not in (type(config), type(text))))
    ]


def output_head(model: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states; None if there is no such module. A model around a language model may not name
    it: then it is the language model's own."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    text = model.config.get_text_config(decoder=True)
    inside = (one for one in model.modules() if isinstance(one, PreTrainedModel) and one.config is text)
    heads = (one.get_output_embeddings() for one in (model, *inside))
    return next((head for head in heads if isinstance(head, nn.Module)), None)


def find_tower_linears(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The linears of a multimodal model that text does not use: those of its towers for other senses, and those between
    these and the language model."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not (towers := find_towers(model)):
        return []
    text = model.config.get_text_config(decoder=True)
    language = [name for name, one in model.named_modules() if isinstance(one, PreTrainedModel) and one.config is text]
    # without a language model of its own, what lies between cannot be told from the text's
    apart = bool(language) and "" not in language
    own, head = tuple(f"{name}." for name in (*language, *blocks)), output_head(model)
    inside = tuple(f"{name}." for name in towers)
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and (name.startswith(inside) if not apart else not name.startswith(own))
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]


def find_linears_around(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The linears outside the blocks, but for the head, those that text does not use, and those of attention modules
    that read the weight themselves."""
    head, inside = output_head(model), tuple(f"{block}." for block in blocks)
    aside = {*find_tower_linears(model, blocks), *blocks}
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and name not in aside
        and not name.startswith(inside)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]


def find_linears(model: nn.Module, block: str) -> list[str]:
    """Full names of the linears inside a block: nn.Linear and GPT-2's transposed Conv1D. Without those that choose
    experts: they are small, and what they choose is not to change."""
    inside, aside = model.get_submodule(block).named_modules(), routers(model, block)
    linears = (f"{block}.{name}" if name else block for name, module in inside if is_linear(module))
    return [name for name in linears if name not in aside]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


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
