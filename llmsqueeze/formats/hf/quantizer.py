"""The `llmsqueeze` quantization method of transformers: the import of this module registers it.

`AutoModelForCausalLM.from_pretrained(folder)` then puts a `SumOfParts` layer where the file has the parts of a linear.
`model.dequantize()` turns the layers into ordinary linears, for speed. Without the import, transformers warns of an
unknown method and fills the weights that it misses with random values.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.hf.layer import SumOfParts, buffers
from llmsqueeze.formats.inspection.damage import refuse_changed_config, refuse_damaged
from llmsqueeze.model.blockwise.heads import put_stack
from llmsqueeze.model.experts.find import merge_stacks, stack_experts
from llmsqueeze.model.linears import find_blocks, is_transposed, output_head

Pieces = list[tuple[str, int]]


def add_parts(model: PreTrainedModel, name: str, module: Any, entry: dict[str, Any]) -> None:
    """Gives embeddings or head the tensors of their parts beside the weight. Others may share the weight, so the module
    is not replaced."""
    with torch.device("meta"):
        layer = SumOfParts(tuple(entry["shape"]), entry["parts"], bias=False, transposed=False)
    module.parts, module.parts_of_weight = layer.parts, True
    ties: Any = model.all_tied_weights_keys
    sharing = [f"{name}.weight", *(alias for alias, source in ties.items() if source == f"{name}.weight")]
    ignored: Any = model._keys_to_ignore_on_load_missing or ()
    model._keys_to_ignore_on_load_missing = {*ignored, *map(re.escape, sharing)}


def sum_parts(name: str, module: Any, entry: dict[str, Any]) -> None:
    """Sets the weight of embeddings or head to the sum of the parts that were loaded beside it, and removes these."""
    shape = (entry["shape"][0], entry["shape"][1])
    pairs = zip(entry["parts"], module.parts, strict=True)
    try:
        dense = parts.sum_of_parts([parts.restore(shape, spec, dict(part.named_buffers())) for spec, part in pairs])
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    module.weight.data.copy_(dense)
    del module.parts, module.parts_of_weight


def set_aside(model: PreTrainedModel, linear: str) -> list[str]:
    """Takes the other linears out of the model that share the weight of this one, so that the file needs nothing for
    them; their names."""
    ties: Any = model.all_tied_weights_keys
    sharing = [alias.removesuffix(".weight") for alias, source in ties.items() if source == f"{linear}.weight"]
    for name in sharing:
        model.set_submodule(name, nn.Identity())
        for alias in [alias for alias in ties if alias.startswith(f"{name}.")]:
            del ties[alias]
    return sharing


class PieceNames(WeightRenaming):
    """Renames tensors of which one is made, each by a new name of its own."""

    __slots__ = ("names",)

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__("weight_packed", "weight_packed")  # transformers wants patterns, which are not asked
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.names.get(source_key, source_key), None


def take_apart(layer: SumOfParts, pieces: Pieces) -> None:
    """Gives an empty layer of one part a part for each of the pieces that the file has of it."""
    (spec,), (_, cols) = layer.specs, layer.shape
    with torch.device("meta"):
        layer.parts = nn.ModuleList([SumOfParts((rows, cols), [spec], False, False).parts[0] for _, rows in pieces])


def put_together(layer: SumOfParts) -> None:
    """Makes one part of all the pieces of a layer."""
    tensors = [dict(piece.named_buffers()) for piece in layer.parts]
    layer.parts = nn.ModuleList([buffers({kind: torch.cat([one[kind] for one in tensors]) for kind in tensors[0]})])


def dense_already(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """`dequantize` of a model whose weights were decoded when it was opened."""
    of_model: Any = model
    return model if dtype is None else of_model.to(dtype)


@register_quantization_config(native.METHOD)
class LlmsqueezeConfig(QuantizationConfigMixin):
    """`quantization_config` of a native folder, as formats/native.py describes it. pieces: linear -> the linears in the
    file that have its rows, in compressed-tensors, and how many each has."""

    def __init__(
        self,
        format_version: int,
        weights: dict[str, Any],
        keep_codes: bool = False,
        pieces: dict[str, Pieces] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = native.METHOD  # transformers types it as its own closed enum
        self.format_version = format_version
        self.weights = weights
        self.keep_codes = keep_codes
        self.pieces = pieces or {}

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in ("keep_codes", "pieces")}


@register_quantizer(native.METHOD)
class LlmsqueezeQuantizer(HfQuantizer):
    """Places empty layers before transformers loads the tensors, and decodes coded weights after."""

    requires_calibration = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharing: dict[str, str] = {}  # linear -> the one whose weight it shares

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        files = [Path(file) for file in checkpoint_files or ()]
        for folder in dict.fromkeys(file.parent for file in files):
            refuse_changed_config(folder)
        refuse_damaged(files)
        stack_experts(model, find_blocks(model))
        config: Any = self.quantization_config
        parameters = {name for name, _ in model.named_parameters()}
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in config.weights):
            if owner in parameters:  # of the matrices of heads
                put_stack(model, owner)
        for name, entry in native.weight_entries(config.to_dict()).items():
            try:
                old: Any = model.get_submodule(name)
            except AttributeError as error:
                raise CheckpointError(f"quantization_config names {name}, which the model does not have") from error
            if old in (model.get_input_embeddings(), output_head(model)):
                add_parts(model, name, old, entry)
                continue
            with torch.device("meta"):
                rows, cols = entry["shape"]
                layer = SumOfParts((rows, cols), entry["parts"], old.bias is not None, is_transposed(old))
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(old.bias.dtype), requires_grad=False)
            layer.compute_as(old)
            if name in config.pieces:
                take_apart(layer, config.pieces[name])
            model.set_submodule(name, layer)
            self.sharing.update(dict.fromkeys(set_aside(model, name), name))
        # a linear's shape, which compressed-tensors stores, is in the config too
        ignored: Any = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.weight_shape$"}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Decodes coded weights, one after the other, and puts linears that share a weight in their places."""
        config: Any = self.quantization_config
        for name in config.pieces:
            layer: Any = model.get_submodule(name)
            put_together(layer)
        config.pieces = {}
        for name in [name for name in config.weights if hasattr(model.get_submodule(name), "parts_of_weight")]:
            sum_parts(name, model.get_submodule(name), config.weights.pop(name))
        for name in list(config.weights):  # of names, not of modules: what a list holds would not be freed
            module: Any = model.get_submodule(name)
            if any(parts.is_coded(spec) for spec in module.specs):
                on_grids = all(spec["part"] != parts.Coded.kind for spec in module.specs)
                try:
                    if config.keep_codes or on_grids:
                        module.decode()
                    else:
                        model.set_submodule(name, module.as_linear(model.dtype))
                        del config.weights[name]
                except CheckpointError as error:
                    raise CheckpointError(f"{name}: {error}") from error
        for name, module in model.named_modules():
            if isinstance(module, SumOfParts):
                module.weight_dtype = model.dtype
                config.weights[name]["parts"] = module.specs
        for alias, name in self.sharing.items():
            model.set_submodule(alias, model.get_submodule(name))
        if not config.weights:
            merge_stacks(model)
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            # an ordinary model now, which is saved without it
            of_model: Any = model
            of_model.dequantize = MethodType(dense_already, model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dense: dict[SumOfParts, nn.Module] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, SumOfParts):
                dense[module] = dense.get(module) or module.as_linear(dtype or model.dtype)
                model.set_submodule(name, dense[module])
        merge_stacks(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Without those that merge or split tensors: the folder has the model's own names, or those of `pieces`."""
        config: Any = self.quantization_config
        names = {
            f"{stored}.{in_file}": f"{linear}.parts.{at}.{kind}"
            for linear, pieces in config.pieces.items()
            for at, (stored, _) in enumerate(pieces)
            for kind, in_file in compressed_tensors.NAMES.items()
        }
        others = [one for one in weight_conversions if not isinstance(one, WeightConverter)]
        return [PieceNames(names), *others] if names else others

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are; the parts are not."""
        return True
