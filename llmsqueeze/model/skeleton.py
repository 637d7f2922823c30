"""The model without its weights: transformers' own modules on the meta device, with a few real at a time.

transformers itself tells which checkpoint tensor belongs to which parameter (it renames on loading). Decoder blocks and
linears are found by type (linears.py), so no architecture is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmsqueeze.errors import CheckpointError, UnsupportedError
from llmsqueeze.memory import give_back
from llmsqueeze.model.blockwise.dry_run import called, choosing, obstacle_in_stock
from llmsqueeze.model.blockwise.heads import stack_heads
from llmsqueeze.model.checkpoint import Checkpoint, StoredTensor, read_config
from llmsqueeze.model.config import check_supported, empty_model, load_config
from llmsqueeze.model.experts.find import stack_experts
from llmsqueeze.model.experts.linear import ExpertLinear, Weight, real
from llmsqueeze.model.experts.names import StoredAs, experts_in_files
from llmsqueeze.model.experts.stack import ExpertStack
from llmsqueeze.model.linears import (
    find_blocks,
    find_linears,
    find_linears_around,
    find_tower_linears,
    find_towers,
    is_transposed,
    output_head,
)
from llmsqueeze.model.tensors.sources import Compressed, Converted, Slice, Source, Stored, described, find_sources
from llmsqueeze.model.tensors.ties import settle
from llmsqueeze.progress.stopwatch import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")


@dataclass(eq=False)
class Skeleton:
    """A model on the meta device, and the source of each tensor. It changes: see its contexts.

    `sources`: parameter or buffer name -> where it comes from; `tied`: parameter -> the parameter that it shares.
    `blocks`: full module names of the decoder blocks, in order. `linears`: for each block, the names of its linears.
    `outer`: the linears around the blocks that text reaches, and those that several blocks share, each once.
    `overrides`: parameter -> a function that gives its tensor; these are not read from the checkpoint. `apart`:
    parameters that the config ties, and that differ in the file from what it ties them to. `is_enclosed`: see
    `enclosed`.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, Source]
    tied: dict[str, str]
    blocks: list[str]
    linears: list[list[str]]
    outer: list[str] = field(default_factory=list)
    overrides: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    is_enclosed: bool = False

    def read(self, name: str) -> Tensor:
        """A parameter or buffer in its stored shape and dtype."""
        return self.overrides[name]() if name in self.overrides else self.read_stored(name)

    def read_stored(self, name: str) -> Tensor:
        """A parameter or buffer as the checkpoint has it, in its stored dtype."""
        return self.sources[name].read(self.checkpoint)

    def nbytes(self, name: str) -> int:
        """Bytes of a parameter or buffer in its stored dtype."""
        source = self.sources[name]
        return torch.Size(source.shape).numel() * source.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all parameters and buffers, each once, in their stored dtypes."""
        return sum(self.nbytes(name) for name in self.sources)

    @cached_property
    def unused(self) -> dict[str, StoredTensor]:
        """The tensors of the checkpoint of which the model has nothing."""
        used = {name for source in self.sources.values() for name in source.names}
        tied = self.model.all_tied_weights_keys.keys()
        return {name: stored for name, stored in self.checkpoint.tensors.items() if name not in used | tied}

    @contextmanager
    def overriding(self, tensors: Mapping[str, Tensor | Callable[[], Tensor]]) -> Iterator[None]:
        """In the context `read` gives these tensors for the named parameters, not those of the checkpoint.

        A function instead of a tensor is called at each `read`.
        """
        before = self.overrides
        self.overrides = {**before, **{name: _reader(tensor) for name, tensor in tensors.items()}}
        try:
            yield
        finally:
            self.overrides = before

    @contextmanager
    def using(self, weights: Mapping[str, Weight]) -> Iterator[None]:
        """In the context the named linears compute with these weights, in the orientation of their modules."""
        before = {name: self.weight(name) for name in weights}
        try:
            for name, weight in weights.items():
                self._use(name, weight)
            yield
        finally:
            for name, weight in before.items():
                self._use(name, weight)

    def weight(self, linear: str) -> Weight:
        """What a linear computes with, as its module stores it."""
        module = self.linear(linear)
        return module.reads if isinstance(module, ExpertLinear) and module.reads is not None else module.weight

    def _use(self, linear: str, weight: Weight) -> None:
        module = self.linear(linear)
        if isinstance(module, ExpertLinear) and module.reads is not None:
            module.reads = partial(real, weight)
        else:
            weight = real(weight)
            kept = isinstance(weight, nn.Parameter)
            module.weight = weight if kept else nn.Parameter(weight, requires_grad=False)

    @property
    def ends(self) -> list[str]:
        """The names of embeddings and head as stored; if they are tied, one name."""
        ends = [self.model.get_input_embeddings(), output_head(self.model)]
        names = [name for end in ends for name, module in self.model.named_modules() if module is end]
        return [name for name in dict.fromkeys(names) if f"{name}.weight" in self.sources]

    @property
    def ties_head(self) -> bool:
        """Whether embeddings and head share one weight."""
        return len(self.ends) == 1 and output_head(self.model) is not None

    @cached_property
    def obstacle_in_stock(self) -> str | None:
        """Why stock transformers does not open the model with compressed linears; None if nothing is in the way."""
        return obstacle_in_stock(self.model, self.blocks, self.all_linears)

    @property
    def all_linears(self) -> list[str]:
        """The linears that can be compressed: of all blocks, and the outer ones."""
        return [*(name for names in self.linears for name in names), *self.outer]

    def sharing(self, linear: str) -> list[str]:
        """The linears that share the weight of this one, which is stored under its name; itself first."""
        of_others = [alias for alias, source in self.tied.items() if source == f"{linear}.weight"]
        return [linear, *(alias.removesuffix(".weight") for alias in of_others)]

    @cached_property
    def shared(self) -> list[str]:
        """The outer linears that several blocks share."""
        return [name for name in self.outer if len(self.sharing(name)) > 1]

    @cached_property
    def experts_in_files(self) -> StoredAs | str:
        """What experts' linears are in the Hub's files, where they lie one by one; a string says why they do not."""
        return experts_in_files(self.model)

    def pieces(self, linear: str) -> int:
        """How many linears of the Hub's files a linear is, which are more than one for some experts."""
        of_experts = self.experts_in_files
        stack = linear.rpartition(".")[0]
        return len(of_experts[stack]) if isinstance(of_experts, dict) and stack in of_experts else 1

    def enclosed(self) -> Skeleton:
        """The same with one block alone, the smallest module that holds all linears that can be compressed: for a model
        that does something between its blocks, or calls them again and again."""
        paths = [name.split(".") for name in (*self.blocks, *self.all_linears)]
        same = (len(set(parts)) == 1 for parts in zip(*paths, strict=False))
        block = ".".join(part for part, _ in zip(paths[0], takewhile(bool, same), strict=False))
        while isinstance(self.module(block), nn.ModuleList):
            block = block.rpartition(".")[0]
        return replace(self, blocks=[block], linears=[self.all_linears], outer=[], is_enclosed=True)

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def linear(self, name: str) -> nn.Linear:
        """A linear by name; Conv1D has the same attributes, with its weight transposed."""
        return cast(nn.Linear, self.model.get_submodule(name))

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """[vocabulary, width] of the input embeddings."""
        rows, width = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape
        return rows, width

    def shape(self, linear: str) -> tuple[int, int]:
        """[out_features, in_features] of a linear."""
        rows, cols = self.sources[f"{linear}.weight"].shape
        return (cols, rows) if is_transposed(self.module(linear)) else (rows, cols)

    def dtype(self, linear: str) -> torch.dtype:
        """The stored dtype of a linear's weight."""
        return self.sources[f"{linear}.weight"].dtype

    def names_in(self, module: str) -> list[str]:
        """The stored parameters and buffers inside a module, but for what several blocks share."""
        shared = {f"{name}.weight" for name in self.shared}
        return [name for name in self.sources if name.startswith(module + ".") and name not in shared]

    def names_used_by(self, module: str) -> list[str]:
        """The same, and those elsewhere that the module shares."""
        prefix, own = f"{module}.", self.names_in(module)
        ties = self.tied.items()
        shared = dict.fromkeys(to for alias, to in ties if alias.startswith(prefix) or to.startswith(prefix))
        return own + [name for name in shared if name in self.sources and name not in own]

    @property
    def tower_linears(self) -> list[str]:
        """The linears of other towers and projectors that share no weight."""
        shared = {*self.tied, *self.tied.values()}
        weights = {name: f"{name}.weight" for name in find_tower_linears(self.model, self.blocks)}
        return [name for name, weight in weights.items() if weight in self.sources and weight not in shared]

    def names_outside_blocks(self) -> list[str]:
        """The stored parameters and buffers outside the blocks, and what several blocks share."""
        inside, shared = tuple(block + "." for block in self.blocks), {f"{name}.weight" for name in self.shared}
        return [name for name in self.sources if not name.startswith(inside) or name in shared]

    def stacks_in(self, index: int) -> dict[str, int]:
        """The stacks of experts in block `index`, in their order, and how many experts each has."""
        block = self.blocks[index]
        inside = self.module(block).named_modules()
        return {f"{block}.{name}": len(module) for name, module in inside if isinstance(module, ExpertStack)}

    def experts_in(self, index: int) -> dict[str, ExpertLinear]:
        """The linears of experts in block `index`, by name."""
        names = [f"{stack}.{number}" for stack, count in self.stacks_in(index).items() for number in range(count)]
        return {name: module for name in names if isinstance(module := self.module(name), ExpertLinear)}

    def of_heads(self, linear: str) -> bool:
        """Whether a linear is one of several that lie in one parameter for the heads of a block."""
        stack = self.module(linear.rpartition(".")[0])
        return isinstance(stack, ExpertStack) and stack.of_heads

    def names_around_blocks(self) -> list[str]:
        """The same without the towers for other senses, and what blocks share: what a run on text needs."""
        others = tuple(f"{name}." for name in (*find_towers(self.model), *self.blocks))
        return [name for name in self.sources if not name.startswith(others)]

    @contextmanager
    def resident(
        self,
        names: Iterable[str],
        dtype: torch.dtype | None,
        device: torch.device,
        read: Callable[[str], Tensor] | None = None,
    ) -> Iterator[None]:
        """In the context the named parameters and buffers are real, on `device`; after it they are meta again.

        Floating-point tensors are cast to `dtype`; None keeps the stored dtypes. `read`: used instead of this class's.
        """
        names, read = list(names), read or self.read
        try:
            with timed("read"):
                for name in names:
                    tensor = read(name)
                    if dtype is not None and tensor.is_floating_point():
                        tensor = tensor.to(dtype)
                    self._place(name, tensor.to(device))
            yield
        finally:
            for name in names:
                self._place(name, None)
            give_back()

    def _place(self, name: str, tensor: Tensor | None) -> None:
        aliases = [alias for alias, source in self.tied.items() if source == name]
        parent, _, leaf = name.rpartition(".")
        old = getattr(self.model.get_submodule(parent), leaf)
        value = torch.empty_like(old, device=META) if tensor is None else tensor
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for shared in (name, *aliases):
            parent, _, leaf = shared.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, value)


def _reader(tensor: Tensor | Callable[[], Tensor]) -> Callable[[], Tensor]:
    return partial(torch.Tensor.detach, tensor) if isinstance(tensor, Tensor) else tensor


def build_skeleton(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the checkpoint's causal language model.

    Raises UnsupportedError if it is no such model, CheckpointError if a tensor is missing or has the wrong shape.
    """
    config = load_config(checkpoint.path, trust_remote_code)
    check_supported(checkpoint.config, config)
    model = empty_model(checkpoint.path, config, trust_remote_code)
    sources, apart = settle(model, find_sources(model, checkpoint), checkpoint)
    tied = _tied(model, sources)
    _check_complete(model, checkpoint, sources, tied)
    blocks = find_blocks(model)
    sources = _of_experts(sources, stack_experts(model, blocks) | stack_heads(model, blocks))
    linears, outer = _own_linears(model, blocks, tied), _outer_linears(model, blocks, tied)
    _check_linears(model, blocks)
    return Skeleton(model, checkpoint, sources, tied, blocks, linears, outer, apart=apart)


def compressed_skeleton(
    checkpoint: Checkpoint, trust_remote_code: bool = False, ends: Mapping[str, Callable[[], Tensor]] | None = None
) -> Skeleton:
    """The skeleton of a folder that llmsqueeze wrote: its tensors have the model's own names.

    The weight of a compressed linear has no source. `ends`: compressed embeddings and head, each by its weight's name.
    """
    model = empty_model(checkpoint.path, load_config(checkpoint.path, trust_remote_code), trust_remote_code)
    blocks = find_blocks(model)
    stack_experts(model, blocks)
    stack_heads(model, blocks)
    overrides = ends or {}
    sources: dict[str, Source] = {}
    for name, tensor in model.state_dict().items():
        if name in checkpoint.tensors:
            sources[name] = Stored.of(checkpoint, name)
        elif name in overrides:
            sources[name] = Compressed(tuple(tensor.shape))
    tied = _tied(model, sources)
    linears, outer = _own_linears(model, blocks, tied), _outer_linears(model, blocks, tied)
    return Skeleton(model, checkpoint, sources, tied, blocks, linears, outer, overrides)


def imagine_checkpoint(path: Path, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that the folder's `config.json` describes; its tensors have shapes, but cannot be read.

    Their dtype is that of the config, or bfloat16 if the config has none.
    """
    raw = read_config(path)
    config = load_config(path, trust_remote_code)
    check_supported(raw, config)
    model = empty_model(path, config, trust_remote_code)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, shape in shapes.items() if name not in model.all_tied_weights_keys}
    return Checkpoint(path, raw, {name: StoredTensor(path, shape, dtype) for name, shape in stored.items()})


def _of_experts(sources: Mapping[str, Source], stacks: Mapping[str, ExpertStack]) -> dict[str, Source]:
    """The sources with one for every expert in the place of that of a parameter for all."""
    of_experts: dict[str, Source] = {}
    for name, source in sources.items():
        stack = stacks.get(name)
        if stack is None:
            of_experts[name] = source
            continue
        assert isinstance(source, Stored | Converted)
        for index in range(len(stack)):
            of_experts[f"{name}.{index}.weight"] = Slice(source, index, len(stack), stack.transposed)
    return of_experts


def _tied(model: PreTrainedModel, sources: Mapping[str, Source]) -> dict[str, str]:
    """Parameter that is not stored -> the stored one that it shares; either of the two can be the stored one."""
    tied = {}
    for alias, source in model.all_tied_weights_keys.items():
        if alias not in sources and source in sources:
            tied[alias] = source
        elif source not in sources and alias in sources:
            tied[source] = alias
    return tied


def _check_complete(
    model: PreTrainedModel, checkpoint: Checkpoint, sources: Mapping[str, Source], tied: Mapping[str, str]
) -> None:
    missing = [name for name in model.state_dict() if name not in sources and name not in tied]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.path} has no weight {missing[0]}{more}: is a shard missing or renamed?")
    for name, tensor in model.state_dict().items():
        source = sources[tied.get(name, name)]
        if tuple(tensor.shape) != source.shape:
            file = checkpoint.tensors[source.names[0]].file.name
            of = f", made of {described(source.names)}," if isinstance(source, Converted) else ""
            raise CheckpointError(
                f"{name}{of} has shape {list(source.shape)} in {file}, but config.json requires {list(tensor.shape)}"
            )
        if source.dtype.itemsize < 2 and source.dtype.is_floating_point:
            raise UnsupportedError(f"{name} is stored as {source.dtype}: this model is already quantized")


def _own_linears(model: PreTrainedModel, blocks: list[str], tied: Mapping[str, str]) -> list[list[str]]:
    """Of each block the linears that it shares with no other module, without those that only choose."""
    shared = {*tied, *tied.values()} | {name for pair in model.all_tied_weights_keys.items() for name in pair}
    by_block, aside = [find_linears(model, block) for block in blocks], choosing(model, blocks)
    return [[name for name in names if f"{name}.weight" not in shared and name not in aside] for names in by_block]


def _outer_linears(model: PreTrainedModel, blocks: list[str], tied: Mapping[str, str]) -> list[str]:
    """Those around the blocks, if text reaches them, and those that several blocks share with each other alone."""
    inside = {f"{name}.weight" for block in blocks for name in find_linears(model, block)}
    groups: dict[str, set[str]] = {}
    for alias, source in tied.items():
        groups.setdefault(source, {source}).add(alias)
    shared = [source.removesuffix(".weight") for source, group in groups.items() if group <= inside]
    ties = {*tied, *tied.values()} | {name for pair in model.all_tied_weights_keys.items() for name in pair}
    around = [name for name in find_linears_around(model, blocks) if f"{name}.weight" not in ties]
    if not around:
        return shared
    reached = called(model, blocks, around)
    if reached is None:  # what is for other senses alone cannot be told then
        reached = set() if find_towers(model) else set(around)
    return [*(name for name in around if name in reached), *shared]


def _check_linears(model: nn.Module, blocks: list[str]) -> None:
    linears = [find_linears(model, block) for block in blocks]
    total = sum(p.numel() for block in blocks for p in model.get_submodule(block).parameters())
    inside = sum(cast(nn.Linear, model.get_submodule(name)).weight.numel() for names in linears for name in names)
    if inside * 2 < total:
        raise UnsupportedError(
            f"only {100 * inside / max(total, 1):.0f} % of the weights of {blocks[0].rpartition('.')[0]} are in linear "
            "layers"
        )
