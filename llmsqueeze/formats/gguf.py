"""A plan for llama.cpp: which of its types comes nearest to the bytes that a linear has here.

llama.cpp rounds the original itself, with its own types and importance matrix; what it takes from us is who gets how
many bits. `llama-quantize --tensor-type-file` reads `pattern=type` pairs, separated by white space and without
comments; a pattern is a regular expression over llama.cpp's tensor names, which the package `gguf` knows. Sizes of the
types: blocks of 256 or 32 columns (`gguf.GGML_QUANT_SIZES`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmsqueeze.errors import UnsupportedError, nearest

# by what llama-quantize offers for a single tensor; those of 256 columns are K- and I-types
TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
SMALL_TYPES = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
FORMAT = "gguf-map"
WHOLE = "F16"
# transformers' model types that llama.cpp has under another name
SAME = {"mistral": "llama", "gpt_neox": "gptneox", "gemma3_text": "gemma3", "phi": "phi2", "command_r": "command-r"}


def tensor_names(model_type: str, blocks: int, linears: list[str]) -> dict[str, str]:
    """linear -> its weight's name in a GGUF file. Raises UnsupportedError for what llama.cpp does not have."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "llama.cpp's names come from the package gguf: pip install 'llmsqueeze[gguf]'"
        ) from error
    known: dict[str, Any] = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    name = SAME.get(model_type, model_type)
    if name not in known:
        raise UnsupportedError(f"llama.cpp has no architecture {model_type}{nearest(model_type, known)}")
    table = gguf.get_tensor_name_map(known[name], blocks)
    found = {linear: table.get_name(linear) for linear in linears}
    if lost := next((linear for linear, other in found.items() if other is None), None):
        raise UnsupportedError(f"{lost} has no counterpart in llama.cpp's {name}, which joins or renames it")
    return {linear: f"{other}.weight" for linear, other in found.items()}


def nearest_type(bits: float, cols: int) -> tuple[str, float]:
    """The type whose bits per weight are nearest to `bits` for rows of `cols`, and those bits."""
    import gguf

    sizes = {kind.name: (block, 8 * nbytes / block) for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items()}
    fitting = [(name, sizes[name][1]) for name in (*TYPES, *SMALL_TYPES, WHOLE) if cols % sizes[name][0] == 0]
    return min(fitting, key=lambda one: abs(one[1] - bits))


def tensor_type_file(types: Mapping[str, str]) -> str:
    """The file's text; `types`: llama.cpp's tensor name -> type."""
    return "".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in types.items())
