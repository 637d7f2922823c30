"""A model run as compressed-tensors leaves it: its linears have no weight, and no tensor has data.

A module that reads the weight of a linear itself, in its forward or when transformers initializes it, then fails, as
it does when stock transformers opens such a folder. torch computes shapes alone (fake tensors). One block of every
kind is run, after the model's own `_init_weights` has seen every module. Before that, transformers prepares the
conversions of stored tensors.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmsqueeze.errors import first_line
from llmsqueeze.model.blockwise.recorder import Returns, first_parameter, kind_of, replaced
from llmsqueeze.model.blockwise.trace import unchanged
from llmsqueeze.model.casting import is_plain
from llmsqueeze.model.experts.find import expert_linears
from llmsqueeze.model.linears import is_linear, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8
OF_FOLDERS = ("_name_or_path", "quantization_config", "transformers_version")  # not of the model
_KNOWN: dict[Hashable, str | None] = {}
READ_BY_OTHERS = "another module reads its weight, which stock transformers does not have in compressed-tensors"


def obstacle_in_stock(model: PreTrainedModel, blocks: Sequence[str], linears: Sequence[str]) -> str | None:
    """Why stock transformers does not open a compressed-tensors folder of the model, whose `linears` are compressed;
    None if nothing is in the way. `model`: on the meta device. Kept for the models of this process: a run asks when it
    plans, and again of what it wrote."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in OF_FOLDERS}
    key = type(model), json.dumps(settings, sort_keys=True, default=str), tuple(blocks), tuple(sorted(linears))
    if key not in _KNOWN:
        _KNOWN[key] = _obstacle(model, blocks, linears)
    return _KNOWN[key]


def _obstacle(model: PreTrainedModel, blocks: Sequence[str], linears: Sequence[str]) -> str | None:
    if (failure := failing_conversion(model, linears)) is not None:
        return f"it cannot convert the model's stored tensors if some are compressed: {failure}"
    name = weight_read_by_others(model, blocks, linears)
    return None if name is None else f"{name}: {READ_BY_OTHERS}"


def failing_conversion(model: PreTrainedModel, linears: Sequence[str]) -> str | None:
    """What transformers says when it prepares the conversions for compressed linears; None if it does not fail."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    quantizer: Any = object.__new__(CompressedTensorsHfQuantizer)  # its constructor needs the package
    quantizer.pre_quantized = True
    try:
        quantizer.update_weight_conversions(get_model_conversion_mapping(model), _Compressed(model, linears))
    except ValueError as error:
        return first_line(error)
    except AttributeError:  # what comes after the model's conversions asks for a config
        return None
    return None


def called(model: PreTrainedModel, blocks: Sequence[str], linears: Sequence[str]) -> set[str] | None:
    """Those of `linears` that a forward pass on text calls; None if torch cannot compute it without data. `model`: on
    the meta device; one block of every kind runs."""
    seen: set[str] = set()
    with ExitStack() as stack, torch.no_grad():
        for name in linears:
            note = partial(_note, seen, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        try:
            _forward(model, blocks)
        except Exception:  # a path that depends on data: torch has many errors for it, and the models their own
            return None
    return seen


def choosing(model: PreTrainedModel, blocks: Sequence[str]) -> set[str]:
    """The linears inside the blocks in modules that give whole numbers alone, such as the tokens that attention looks
    at. They are small, and what they choose is not to change. Only modules are looked at whose forward takes the
    largest of some numbers. `model`: on the meta device."""
    modules = {
        f"{block}.{name}": module
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if name and _takes_largest(module) and any(map(is_linear, module.modules()))
    }
    choose: dict[type[nn.Module], bool] = {}

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        given = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor)]
        whole = bool(given) and not any(one.is_floating_point() for one in given)
        choose[type(module)] = choose.get(type(module), True) and whole

    with ExitStack() as stack, torch.no_grad(), suppress(Exception):  # what depends on data comes behind, as experts do
        for module in modules.values():
            stack.callback(module.register_forward_hook(note).remove)
        if modules:
            _forward(model, blocks)
    found = [(name, module) for name, module in modules.items() if choose.get(type(module))]
    return {f"{name}.{inner}" for name, module in found for inner, one in module.named_modules() if is_linear(one)}


def _takes_largest(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "topk" in code.co_names


def _note(seen: set[str], name: str, *_: Any) -> None:
    seen.add(name)


class _Compressed:
    """What transformers asks of a model with compressed linears: its parameters by name."""

    def __init__(self, model: nn.Module, linears: Sequence[str]) -> None:
        self._model, self._linears = model, linears

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        yield from self._model.named_parameters()
        yield from ((f"{name}.weight_scale", None) for name in self._linears)


def weight_read_by_others(model: PreTrainedModel, blocks: Sequence[str], linears: Sequence[str]) -> str | None:
    """The first of `linears` found whose weight another module than itself reads; None if there is none.

    `model`: on the meta device. A part of the model that torch cannot compute without data is not looked into, and the
    linears of experts, which other formats hold in their own way, keep their weights.
    """
    read: list[str] = []
    experts = expert_linears(model)
    linears = [name for name in linears if name not in experts]
    with without_weights(model, linears, read), torch.no_grad():
        for run in (_initialize, _forward):
            read.clear()
            try:
                run(model, blocks)
            except AttributeError:
                if read:
                    return read[-1]
            except Exception:  # a path that depends on data: torch has many errors for it, and the models their own
                continue
    return None


@contextmanager
def without_weights(model: nn.Module, linears: Sequence[str], read: list[str]) -> Iterator[None]:
    """In the context the linears have no weight, and compute without it; `read` gets the name of each whose weight is
    asked for."""
    with ExitStack() as stack:
        for name in linears:
            module: Any = model.get_submodule(name)
            stack.enter_context(_watched(module, name, read))
            if is_plain(module):
                rows = module.weight.shape[1] if is_transposed(module) else module.weight.shape[0]
                stack.enter_context(replaced(module, _shapes_alone(rows)))
        weights = {name: model.get_submodule(name)._parameters.pop("weight") for name in linears}
        try:
            read.clear()
            yield
        finally:
            for name, weight in weights.items():
                model.get_submodule(name)._parameters["weight"] = weight


@contextmanager
def _watched(module: nn.Module, name: str, read: list[str]) -> Iterator[None]:
    """In the context `read` gets the name of the module whenever its weight is asked for."""
    kind: Any = type(module)

    def weight(self: nn.Module) -> Tensor:
        read.append(name)
        parameter: Any = self._parameters.get("weight")
        if parameter is None:
            raise AttributeError(f"{name} has no weight")
        return parameter  # type: ignore[no-any-return]

    module.__class__ = type(kind.__name__, (kind,), {"weight": property(weight)})
    try:
        yield
    finally:
        module.__class__ = kind


def _shapes_alone(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_empty(*x.shape[:-1], rows)


def _initialize(model: PreTrainedModel, _blocks: Sequence[str]) -> None:
    """Lets the model initialize every module, as on loading. No tensor changes: all are marked as loaded."""
    from transformers import PreTrainedModel

    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor._is_hf_initialized = True

    def visit(module: nn.Module, owner: Any) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            visit(child, owner)
        owner._init_weights(module)

    visit(model, model)


def _forward(model: PreTrainedModel, blocks: Sequence[str]) -> None:
    run_without_data(model, blocks, lambda _: nullcontext())


def run_without_data(
    model: PreTrainedModel,
    blocks: Sequence[str],
    watching: Callable[[Mapping[str, Tensor]], AbstractContextManager[object]],
) -> None:
    """A forward pass in which one block of every kind computes, in the context that `watching` gives for the
    parameters. Raises what torch and the model raise where a path depends on data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    returns: dict[Hashable, Returns] = {}

    def once(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            kind = kind_of(module)
            if kind not in returns:
                output = forward(*args, **kwargs)
                returns[kind] = Returns.of(output)
                return output
            return returns[kind].holding(args[0] if args else kwargs[first_parameter(type(module).forward)])

        return run

    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in map(model.get_submodule, blocks):
            stack.enter_context(replaced(module, once(module, module.forward)))
        tensors = {name: torch.empty(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        stack.enter_context(watching(tensors))
        torch.func.functional_call(model, tensors, (), {"input_ids": ids, "use_cache": False}, tie_weights=False)
