"""Opening our folders with transformers: importing this module registers the `llmsqueeze` quantization method.

After `import llmsqueeze.hf`, `AutoModelForCausalLM.from_pretrained(folder)` puts a `SumOfParts` layer where the file
holds parts. The layer rebuilds its weight for every call and multiplies with it as nn.Linear would: the memory of the
compressed model plus one dense weight. `model.dequantize()` turns the layers back into ordinary linears, for speed.
Coded weights are decoded once, one linear after the other, into ordinary layers (the memory of the dense model), or on
request into layers of one byte a weight. Without the import, transformers warns of an unknown method and fills the
weights that it misses with random values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, SqueezeError, UnsupportedError, first_line
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.entries import is_compressed, native_config, read_entries
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import is_transposed
from llmsqueeze.model.original import locate
from llmsqueeze.model.skeleton import load_config
from llmsqueeze.parts import Spec


def load(model: str, *, keep_codes: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The model in a folder or Hub repository, or 'demo'; `kwargs` go to `from_pretrained`. Compressed or not.

    Coded weights are decoded once, into ordinary ones, or with `keep_codes` into integers of one byte. What we wrote as
    compressed-tensors is opened as what we wrote natively, and stays compressed in memory.
    Raises CheckpointError if the folder is damaged or any weight is missing, where transformers would only warn.
    """
    path = locate(model, kwargs.pop("revision", None))
    checkpoint = open_checkpoint(path)
    config: Any = load_config(path, kwargs.get("trust_remote_code", False))
    quantization = checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == native.METHOD:
        native.weight_entries(quantization)
    elif is_compressed(checkpoint):
        with suppress(UnsupportedError):  # another tool's, which transformers opens
            config.quantization_config = native_config(read_entries(checkpoint))
            kwargs |= {"config": config, "key_mapping": compressed_tensors.OWN_NAMES}
    if keep_codes and isinstance(getattr(config, "quantization_config", None), dict):
        config.quantization_config["keep_codes"] = True
        kwargs["config"] = config
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) and "compressed" in str(error):
            raise UnsupportedError(
                f"{model} is in compressed-tensors, which transformers opens with the package of that name: "
                "pip install 'llmsqueeze[compressed-tensors]'"
            ) from error
        if isinstance(error.__cause__, SqueezeError):
            raise error.__cause__ from error
        if "ignore_mismatched_sizes" in str(error):
            raise CheckpointError(
                f"{model} holds tensors of other shapes than its config says; `llmsqueeze check` names them"
            ) from error
        raise UnsupportedError(f"transformers cannot open {model}: {first_line(error)}") from error
    loaded, info = opened
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(f"{model} lacks {len(lost)} weights that its config asks for, among them {lost[0]}")
    model_: PreTrainedModel = loaded.eval()
    return model_


class SumOfParts(nn.Module):
    """A linear layer whose weight [rows, cols] is a sum of parts; their tensors are buffers `parts.<i>.<name>`."""

    def __init__(self, shape: tuple[int, int], specs: Sequence[Spec], bias: bool, transposed: bool) -> None:
        """Laid out empty, on the default device. `transposed`: it stands for a Conv1D."""
        super().__init__()
        self.shape, self.specs, self.transposed = shape, list(specs), transposed
        self.out_features, self.in_features = shape
        self.parts = nn.ModuleList()
        for spec in specs:
            holder = nn.Module()
            for name, (size, dtype) in parts.layout(shape, spec).items():
                holder.register_buffer(name, torch.empty(size, dtype=dtype))
            self.parts.append(holder)
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if bias else None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols]: the weight that the parts stand for, summed in float32."""
        held = zip(self.specs, self.parts, strict=True)
        return parts.dense_as([parts.restore(self.shape, spec, dict(h.named_buffers())) for spec, h in held], dtype)

    def decode(self) -> None:
        """Entropy-coded parts become plain ones: integers of one byte, or codes of a fixed width."""
        for i, (spec, holder) in enumerate(zip(self.specs, self.parts, strict=True)):
            if parts.is_coded(spec):
                found = parts.decoded(parts.restore(self.shape, spec, dict(holder.named_buffers())))
                self.specs[i], self.parts[i] = found.spec(), nn.Module()
                for name, tensor in found.tensors().items():
                    self.parts[i].register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the scales' dtype, for code that looks at a linear's weight; made anew every time."""
        made = self.dense(getattr(torch, self.specs[0]["dtype"]))
        made._is_hf_initialized = True  # type: ignore[attr-defined]  # GPT-2 would draw it at random on loading
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def as_linear(self, dtype: torch.dtype) -> nn.Module:
        """The ordinary layer with the same weight."""
        weight = nn.Parameter(self.dense(dtype), requires_grad=False)
        make: Any = Conv1D if self.transposed else nn.Linear
        with torch.device("meta"):
            layer: Any = make(*self.shape) if self.transposed else make(*reversed(self.shape))
        layer.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if self.transposed else weight
        layer.bias = self.bias
        linear: nn.Module = layer
        return linear

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{s['part']}{s.get('bits', '')}" for s in self.specs)
        return f"in_features={self.in_features}, out_features={self.out_features}, parts=[{kinds}]"


def attach(model: PreTrainedModel, name: str, module: Any, entry: dict[str, Any]) -> None:
    """Room for the parts of embeddings or head beside its weight, which others may share: it is not replaced."""
    with torch.device("meta"):
        holder = SumOfParts(tuple(entry["shape"]), entry["parts"], bias=False, transposed=False)
    module.parts, module.parts_of_weight = holder.parts, True
    ties: Any = model.all_tied_weights_keys
    sharing = [f"{name}.weight", *(alias for alias, source in ties.items() if source == f"{name}.weight")]
    ignored: Any = model._keys_to_ignore_on_load_missing or ()
    model._keys_to_ignore_on_load_missing = {*ignored, *map(re.escape, sharing)}


def settle(name: str, module: Any, entry: dict[str, Any]) -> None:
    """The weight of embeddings or head from the parts that were loaded beside it."""
    held = [dict(holder.named_buffers()) for holder in module.parts]
    shape = (entry["shape"][0], entry["shape"][1])
    pairs = zip(entry["parts"], held, strict=True)
    try:
        dense = parts.sum_of_parts([parts.restore(shape, spec, tensors) for spec, tensors in pairs])
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    module.weight.data.copy_(dense)
    del module.parts, module.parts_of_weight


@register_quantization_config(native.METHOD)
class LlmsqueezeConfig(QuantizationConfigMixin):
    """`quantization_config` of a native folder, as formats/native.py describes it."""

    def __init__(self, format_version: int, weights: dict[str, Any], keep_codes: bool = False, **_: Any) -> None:
        self.quant_method: Any = native.METHOD  # transformers types it as its own closed enum
        self.format_version = format_version
        self.weights = weights
        self.keep_codes = keep_codes

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "keep_codes"}


@register_quantizer(native.METHOD)
class LlmsqueezeQuantizer(HfQuantizer):
    """Lays out the parts before transformers loads them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, entry in native.weight_entries(self.quantization_config.to_dict()).items():
            try:
                old: Any = model.get_submodule(name)
            except AttributeError as error:
                raise CheckpointError(f"quantization_config names {name}, which the model does not have") from error
            if old in (model.get_input_embeddings(), model.get_output_embeddings()):
                attach(model, name, old, entry)
                continue
            with torch.device("meta"):
                rows, cols = entry["shape"]
                layer = SumOfParts((rows, cols), entry["parts"], old.bias is not None, is_transposed(old))
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.to(old.bias.dtype), requires_grad=False)
            model.set_submodule(name, layer)
        # a linear's shape, which compressed-tensors stores, is in the config too
        ignored: Any = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.weight_shape$"}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Decodes coded weights, one after the other."""
        config: Any = self.quantization_config
        for name in [name for name in config.weights if hasattr(model.get_submodule(name), "parts_of_weight")]:
            settle(name, model.get_submodule(name), config.weights.pop(name))
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
                config.weights[name]["parts"] = module.specs
        if not config.weights:
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            # or it would be saved with a model that is an ordinary one now
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, SumOfParts):
                model.set_submodule(name, module.as_linear(dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
