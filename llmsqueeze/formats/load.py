"""The verb `load`: a folder or Hub repository as a transformers model, compressed by llmsqueeze or not.

Coded weights are decoded once, one linear after the other, into ordinary layers (the memory of the dense model), or on
request into layers of one byte per weight. All other compressed weights stay as they are (hf/layer.py).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import llmsqueeze.formats.hf.quantizer  # noqa: F401 - makes the format known to transformers
from llmsqueeze.errors import CheckpointError, SqueezeError, UnsupportedError, first_line
from llmsqueeze.files import SIDECAR, read_json_if_there
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.entries import format_of, is_compressed, native_config, read_entries
from llmsqueeze.formats.experts import experts_of, joined, pieces_of
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.config import auto_class, load_config
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
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        raise explained(error, model) from error
    loaded, info = opened
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(f"{model} lacks {len(lost)} weights that its config asks for, among them {lost[0]}")
    evaluated: PreTrainedModel = loaded.eval()
    return evaluated


def native_form(path: Path, kwargs: dict[str, Any]) -> Any:
    """The folder's config; if llmsqueeze wrote it as compressed-tensors, `kwargs` get what opens it as a native one."""
    checkpoint = joined(open_checkpoint(path))
    config: Any = load_config(path, kwargs.get("trust_remote_code", False))
    if format_of(checkpoint) == native.METHOD:
        native.weight_entries(checkpoint.config["quantization_config"])
    elif is_compressed(checkpoint):
        with suppress(UnsupportedError):  # another tool's, which transformers opens
            entries, experts = read_entries(checkpoint), experts_of(read_json_if_there(path / SIDECAR))
            config.quantization_config = native_config(entries) | {"pieces": pieces_of(entries, experts)}
            kwargs |= {"config": config, "key_mapping": compressed_tensors.OWN_NAMES}
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
    return UnsupportedError(f"transformers cannot open {model}: {first_line(error)}")
