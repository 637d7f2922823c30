"""A model's config: which class of transformers opens it, whether it is supported, and the model without weights."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import UnsupportedError, foreign
from llmsqueeze.files import read_json_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEPT = 8  # models without weights; a run opens the same folder several times, and a copy is made much faster
_EMPTY: dict[Hashable, PreTrainedModel] = {}


def load_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config in a folder. Raises UnsupportedError if transformers cannot read it."""
    from transformers import AutoConfig

    from llmsqueeze.model.tensors.bounds import check_numbers, weight_bytes

    raw = read_json_if_there(path / "config.json")
    check_numbers(raw, weight_bytes(path))
    own_code = not trust_remote_code and "auto_map" in raw
    hint = "the model has its own code, which only --trust-remote-code runs" if own_code else ""
    with foreign(UnsupportedError, f"transformers cannot read {path / 'config.json'}", hint):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers that opens the model: for text, or for text and images.

    Raises UnsupportedError if neither gives the class that the config names.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    mappings = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    classes = {auto: mapping[config.model_type] for auto, mapping in mappings.items() if config.model_type in mapping}
    named = config.architectures or []
    for auto, name in classes.items():
        if not named or name in named or set(name) & set(named):  # some types have several classes
            return auto
    if "auto_map" in vars(config) or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named) and AutoModelForCausalLM in classes:
        return AutoModelForCausalLM
    kind = named[0] if named else f"model type {config.model_type}"
    raise UnsupportedError(f"{kind} is not a causal language model; encoders and classifiers are not supported")


def check_supported(raw: Mapping[str, object], config: PreTrainedConfig) -> None:
    """Raises UnsupportedError if the model is quantized already, has an encoder, or does not predict text."""
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "an unnamed method")
        raise UnsupportedError(f"this model is already quantized (by {method}); start from the original weights")
    if config.is_encoder_decoder:
        raise UnsupportedError(f"{config.model_type} is an encoder-decoder model; only decoders are supported")
    auto_class(config)


def empty_model(path: Path, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's config, without weights. Raises UnsupportedError if transformers cannot build it, and
    CheckpointError if it is far larger than the folder's files."""
    from llmsqueeze.model.tensors.bounds import weight_bytes

    nbytes = weight_bytes(path)
    if trust_remote_code:  # code of its own may keep anything
        return laid_out(path, config, nbytes, trust_remote_code)
    key = type(config), config.to_json_string(use_diff=False), config._attn_implementation, nbytes
    model = _EMPTY.pop(key, None) or laid_out(path, config, nbytes)
    _EMPTY[key] = model
    if len(_EMPTY) > KEPT:
        del _EMPTY[next(iter(_EMPTY))]
    return copy.deepcopy(model)


def laid_out(path: Path, config: PreTrainedConfig, nbytes: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model, made by transformers; `nbytes`: those of the folder's files."""
    from accelerate import init_empty_weights

    from llmsqueeze.model.tensors.bounds import bounded

    auto = auto_class(config)
    with (
        foreign(UnsupportedError, f"transformers cannot build the model of {path}"),
        init_empty_weights(include_buffers=False),
        bounded(nbytes),
    ):
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    model.eval()
    return model


def vocabulary(config: PreTrainedConfig) -> int:
    """How many tokens the text of the model has."""
    text: Any = config.get_text_config(decoder=True)
    return int(text.vocab_size)


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that the config names for a text; None if it names none."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
