"""A LoRA adapter (Hu et al. 2021, arXiv:2106.09685), merged into a model's weights as they are read.

    W' = W + s B A      W [rows, cols], B [rows, rank], A [rank, cols]; the sum in float32, the result in W's dtype

PEFT reads the adapter: its scale s, ranks that differ, layers that store W transposed. Memory: the adapter, and one W'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import CheckpointError, UnsupportedError, foreign
from llmsqueeze.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.config import empty_model, load_config
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.tensors import shard
from llmsqueeze.model.tensors.sources import Source, Stored

PREFIX, FACTORS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
BY_PEFT = "merge it with PEFT (merge_and_unload), and compress what that saves"
Change = Callable[[], Tensor]  # what is added to a weight, float32, as it is stored


@dataclass(frozen=True)
class Merged:
    """A weight with an adapter's change."""

    base: Source
    change: Change

    @property
    def names(self) -> tuple[str, ...]:
        return self.base.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def read(self, checkpoint: Checkpoint) -> Tensor:
        return (self.base.read(checkpoint).float() + self.change()).to(self.dtype)


def merged(skeleton: Skeleton, path: Path, adapter: Path, trust_remote_code: bool = False) -> Skeleton:
    """The model of the folder `path` with an adapter merged. Raises CheckpointError or UnsupportedError."""
    found = changes(path, adapter, trust_remote_code)
    for name in found:
        if not isinstance(skeleton.sources.get(name), Stored):
            raise UnsupportedError(f"the adapter {adapter} changes {name}, which the file has in another form")
    sources = {
        name: Merged(source, found[name]) if name in found else source for name, source in skeleton.sources.items()
    }
    return replace(skeleton, sources=sources)


def changes(path: Path, adapter: Path, trust_remote_code: bool = False) -> Mapping[str, Change]:
    """Parameter -> what the adapter adds to it, for the model whose config is in the folder `path`.

    Raises CheckpointError if the adapter is damaged or of another model, UnsupportedError if it changes more than
    weights of linears.
    """
    check_adapter(adapter)
    try:
        from peft import PeftModel
        from peft.tuners.lora import Linear, LoraLayer
    except ImportError as error:
        raise UnsupportedError("adapters are merged with the package peft: pip install 'llmsqueeze[peft]'") from error

    model: Any = empty_model(path, load_config(path, trust_remote_code), trust_remote_code)
    with foreign(CheckpointError, f"{adapter} is no adapter for {path}"):
        adapted: Any = PeftModel.from_pretrained(
            model, str(adapter), low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
    stored = shard.read(adapter / ADAPTER_WEIGHTS)
    found: dict[str, Change] = {}
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            (active,) = layer.active_adapters
            if type(layer) is not Linear or active in layer.lora_variant or layer.lora_bias[active]:
                raise UnsupportedError(
                    f"the adapter {adapter} changes {name} in a way that is no plain LoRA; {BY_PEFT}"
                )
            if not all(f"{PREFIX}{name}{leaf}" in stored for leaf in FACTORS):
                raise CheckpointError(f"{adapter} has no factors for {name}")
            factors = [stored.pop(f"{PREFIX}{name}{leaf}") for leaf in FACTORS]
            found[f"{name}.weight"] = partial(_change, layer, active, factors)
    if stored:
        raise UnsupportedError(
            f"the adapter {adapter} holds more than the factors of linears ({next(iter(stored))}); {BY_PEFT}"
        )
    return found


def check_adapter(adapter: Path) -> None:
    """Raises CheckpointError unless the folder holds a LoRA adapter in safetensors."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{adapter} holds no adapter: there is no {ADAPTER_CONFIG}")
    kind = read_json(adapter / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{adapter} is an adapter of the kind {kind}; only LORA can be merged")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{adapter} has no {ADAPTER_WEIGHTS}; an adapter is read from safetensors alone")


def _change(layer: Any, active: str, factors: list[Tensor]) -> Tensor:
    """s B A of a layer of PEFT, in float32 and in the orientation of the layer's weight. PEFT has the factors on the
    device of the model, which has no data."""
    with torch.no_grad():
        for module, factor in zip((layer.lora_A, layer.lora_B), factors, strict=True):
            module[active].weight = torch.nn.Parameter(factor.float(), requires_grad=False)
        change: Tensor = layer.get_delta_weight(active)
    return change
