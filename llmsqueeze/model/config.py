"""A model's config: which class of transformers opens it, whether it is supported, and the model without weights."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import UnsupportedError, foreign
from llmsqueeze.files import read_json_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")  # keys of a config
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
    if attention_kernel(raw) is not None:
        config._attn_implementation = None  # what transformers takes by default, which every machine has
    return config


def attention_kernel(raw: Mapping[str, Any]) -> str | None:
    """The attention that a `config.json` asks for, if it needs a package of its own, in its parts too."""
    own = (raw[key] for key in ATTENTION if isinstance(raw.get(key), str))
    of_parts = (attention_kernel(value) for value in raw.values() if isinstance(value, dict))
    return next((name for name in (*own, *of_parts) if name not in (None, "eager", "sdpa")), None)


def without_kernel(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` that leaves the choice of attention to who opens it."""
    kept = {key: value for key, value in raw.items() if key not in ATTENTION}
    return {key: without_kernel(value) if isinstance(value, dict) else value for key, value in kept.items()}


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class of transformers that opens the model: for text, or for text and images.

    Raises UnsupportedError if neither gives the class that the config names.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    mappings = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    classes = {auto: mapping[config.model_type] for auto, mapping in mappings.items() if config.model_type in mapping}
    named = config.architectures or []
    # the model without its head, as AutoModel saves it: whether the head is there is told by the tensors
    decodes = getattr(config, "is_decoder", True)
    base = modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type, ()) if decodes else ()
    for auto, name in classes.items():
        known = {*_several(name), *_several(base)}  # some types have several classes
        if not named or known & set(named):
            return auto
    if "auto_map" in vars(config) or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named) and AutoModelForCausalLM in classes:
        return AutoModelForCausalLM
    kind = named[0] if named else f"model type {config.model_type}"
    if named and not hasattr(transformers, kind):
        raise UnsupportedError(
            f"config.json names the class {kind}, which transformers {transformers.__version__} does not have: it is "
            "of another version or package"
        )
    raise UnsupportedError(f"{kind} is not a causal language model; encoders and classifiers are not supported")


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def check_supported(raw: Mapping[str, object], config: PreTrainedConfig) -> None:
    """Raises UnsupportedError if the model is quantized already, has an encoder, or does not predict text."""
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "an unnamed method")
        raise UnsupportedError(
            f"this model is already quantized (by {method}); start from the original weights, or take what is left of "
            "them with --from-quantized"
        )
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
