"""bitsandbytes, to compare with: an original that is rounded while it is opened. It needs no text and writes no file.

NF4 with double quantization of its scales (QLoRA, arXiv 2305.14314), or int8 with one scale per row (LLM.int8(), arXiv
2208.07339).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmsqueeze.errors import UnsupportedError, first_line
from llmsqueeze.formats import load as hf

NAMES = {"nf4": "bitsandbytes nf4", "int8": "bitsandbytes int8"}
BITS = {"nf4": 4.0, "int8": 8.0}


def load(model: str, kind: str, **kwargs: Any) -> Any:
    """The model with its linears in `nf4` or `int8`; `kwargs` go to `from_pretrained`."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return hf.load(model, quantization_config=config, **kwargs)


@contextmanager
def translated_errors(model: str) -> Iterator[None]:
    """Raises UnsupportedError for errors of bitsandbytes, on opening or in its kernels.

    For example, on a CPU its NF4 kernel needs rows of whole blocks of 64.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"bitsandbytes cannot run {model} here: {first_line(error)}") from error


def stored_sizes(model: Any) -> tuple[int, float]:
    """Bytes of the opened model if it were stored, and bits per weight of the rounded linears."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    prefixes = tuple(f"{name}." for name in rounded)
    counted: set[int] = set()
    nbytes = in_rounded = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.data_ptr() in counted:
            continue  # tied weights are stored once
        counted.add(tensor.data_ptr())
        nbytes += tensor.nbytes
        if name.startswith(prefixes) and not name.endswith(".bias"):
            in_rounded += tensor.nbytes
    numel = sum(module.in_features * module.out_features for module in rounded.values())
    return nbytes, round(8 * in_rounded / numel, 6)
