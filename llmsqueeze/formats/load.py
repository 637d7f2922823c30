"""The verb `load`: a folder or Hub repository as a transformers model, compressed by llmsqueeze or not.

Coded weights are decoded once, one linear after the other, into ordinary layers (the memory of the dense model), or on
request into layers of one byte per weight. All other compressed weights stay as they are (hf/layer.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import llmsqueeze.formats.hf.quantizer  # noqa: F401 - makes the format known to transformers
from llmsqueeze.errors import CheckpointError, SqueezeError, UnsupportedError, reason
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.check import refuse_misfits
from llmsqueeze.formats.entries import format_of, is_compressed, native_config
from llmsqueeze.formats.experts import experts_of, pieces_of
from llmsqueeze.formats.inspection.damage import refuse_damaged
from llmsqueeze.formats.opened import open_folder
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.config import attention_kernel, auto_class, empty_model, load_config
from llmsqueeze.model.original import locate


def load(model: str, *, keep_codes: bool = False, **kwargs: Any) -> PreTrainedModel:
    """The model in a folder or Hub repository, or 'demo'; `kwargs` go to `from_pretrained`.

    Coded weights are decoded once, into ordinary ones, or with `keep_codes` into integers of one byte. A folder that
    llmsqueeze wrote as compressed-tensors is opened as a native one, and stays compressed in memory.
    Raises CheckpointError if the folder is damaged or any weight is missing, where transformers would only warn;
    UnsupportedError if transformers cannot open it.
    """
    path = locate(model, kwargs.pop("revision", None))
    config = native_form(path, kwargs)
    if keep_codes and isinstance(getattr(config, "quantization_config", None), dict):
        config.quantization_config["keep_codes"] = True
        kwargs["config"] = config
    try:
        opened: Any = auto_class(config).from_pretrained(path, output_loading_info=True, **kwargs)
    except (SqueezeError, MemoryError):
        raise
    except Exception as error:  # transformers and the model's own code raise what they like
        raise explained(error, model) from error
    loaded, info = opened
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(f"{model} lacks {len(lost)} weights that its config asks for, among them {lost[0]}")
    keep_own_names(loaded)
    evaluated: PreTrainedModel = loaded.eval()
    return evaluated


def keep_own_names(model: Any) -> None:
    """`save_pretrained` then writes the names that the model has: it would turn around the patterns by which the
    tensors of a compressed-tensors folder got them."""
    used = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        one for one in used if not compressed_tensors.OWN_NAMES.keys() & set(one.source_patterns)
    ]


def native_form(path: Path, kwargs: dict[str, Any]) -> Any:
    """The folder's config; if llmsqueeze wrote it as compressed-tensors, `kwargs` get what opens it as a native one."""
    checkpoint, trust = open_checkpoint(path), kwargs.get("trust_remote_code", False)
    config: Any = load_config(path, trust)
    if attention_kernel(checkpoint.config) is not None and "attn_implementation" not in kwargs:
        kwargs |= {"config": config}
    if format_of(checkpoint) == native.METHOD:
        refuse_misfits(open_folder(checkpoint, trust))
    elif is_compressed(checkpoint):
        try:
            folder = open_folder(checkpoint, trust)
        except UnsupportedError:  # another tool's, which transformers opens
            return config
        if folder.padded:
            raise UnsupportedError(
                f"{path} has its codes in the packing of compressed-tensors up to 0.17, which newer versions decode "
                f"wrongly: llmsqueeze export {path} --to compressed-tensors writes it anew"
            )
        refuse_misfits(folder)
        entries, experts = folder.entries, experts_of(folder.record)
        config.quantization_config = native_config(entries) | {"pieces": pieces_of(entries, experts)}
        kwargs |= {"config": config, "key_mapping": compressed_tensors.OWN_NAMES}
    else:
        empty_model(path, config, trust)  # refuses one that is far larger than its files
        refuse_damaged(sorted({stored.file for stored in checkpoint.tensors.values()}) if checkpoint.checksums else ())
    return config


def explained(error: Exception, model: str) -> SqueezeError:
    """The error of transformers in words for the user."""
    if isinstance(error, ImportError) and "compressed" in str(error):
        return UnsupportedError(
            f"{model} is in compressed-tensors, which transformers opens with the package of that name: "
            "pip install 'llmsqueeze[compressed-tensors]'"
        )
    if isinstance(error.__cause__, SqueezeError):
        return error.__cause__
    if "ignore_mismatched_sizes" in str(error):
        return CheckpointError(
            f"{model} holds tensors of other shapes than its config says; `llmsqueeze check` names them"
        )
    return UnsupportedError(f"transformers cannot open {model}: {reason(error)}")
