"""A plan for llama.cpp: for each linear, the llama.cpp type whose bits per weight are nearest to those of the folder.

llama.cpp rounds the original itself, with its own types and importance matrix; the plan gives it only the bits of each
linear. `llama-quantize --tensor-type-file` reads `pattern=type` pairs, separated by white space and without comments; a
pattern is a regular expression over llama.cpp's tensor names, which the package `gguf` knows. Sizes of the types:
blocks of 256 or 32 columns (`gguf.GGML_QUANT_SIZES`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from llmsqueeze.errors import UnsupportedError, nearest

# the types that llama-quantize offers for a single tensor; those of 256 columns are K- and I-types
TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
SMALL_TYPES = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
FORMAT = "gguf-map"
MAP = "tensor-types.txt"
WHOLE = "F16"
BASE_TYPE = "Q4_K_M"  # of tensors that the map does not name; llama-quantize reads a map only beside a type that rounds
NAME = "NAME-OF-THE-MODEL"
SCRIPT = """\
#!/bin/sh
# usage: sh quantize.sh [FOLDER OF THE ORIGINAL]; needs llama.cpp's programs and a calibration.txt
set -e
"""
# model types of transformers that have another name in llama.cpp
SAME = {"mistral": "llama", "gpt_neox": "gptneox", "gemma3_text": "gemma3", "phi": "phi2", "command_r": "command-r"}


def tensor_names(model_type: str, blocks: int, linears: list[str]) -> dict[str, str]:
    """linear -> its weight's name in a GGUF file. Raises UnsupportedError if llama.cpp has no such model or tensor."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "llama.cpp's names come from the package gguf: pip install 'llmsqueeze[gguf]'"
        ) from error
    architectures: dict[str, Any] = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    name = SAME.get(model_type, model_type)
    if name not in architectures:
        raise UnsupportedError(f"llama.cpp has no architecture {model_type}{nearest(model_type, architectures)}")
    table = gguf.get_tensor_name_map(architectures[name], blocks)
    counterparts = {linear: table.get_name(linear) for linear in linears}
    if lost := next((linear for linear, other in counterparts.items() if other is None), None):
        raise UnsupportedError(f"{lost} has no counterpart in llama.cpp's {name}, which joins or renames it")
    return {linear: f"{other}.weight" for linear, other in counterparts.items()}


def nearest_type(bits: float, cols: int) -> tuple[str, float]:
    """The type whose bits per weight are nearest to `bits` for rows of `cols`, and those bits."""
    import gguf

    sizes = {kind.name: (block, 8 * nbytes / block) for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items()}
    fitting = [(name, sizes[name][1]) for name in (*TYPES, *SMALL_TYPES, WHOLE) if cols % sizes[name][0] == 0]
    return min(fitting, key=lambda one: abs(one[1] - bits))


def tensor_type_file(types: Mapping[str, str]) -> str:
    """The file's text; `types`: llama.cpp's tensor name -> type."""
    return "".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in types.items())


def commands(model: str) -> list[str]:
    """The commands that make a GGUF file of the original `model` by the map, with llama.cpp's programs."""
    whole = WHOLE.lower()
    quantize = ["llama-quantize", "--imatrix", "imatrix.gguf", "--tensor-type-file", MAP]
    quantize += ["--token-embedding-type", whole, "--output-tensor-type", whole]
    return [
        shlex.join(["python", "convert_hf_to_gguf.py", model, "--outtype", whole, "--outfile", "original.gguf"]),
        "llama-imatrix -m original.gguf -f calibration.txt -o imatrix.gguf",
        shlex.join([*quantize, "original.gguf", "model.gguf", BASE_TYPE]),
    ]


def script(model: str) -> str:
    """`quantize.sh`, which runs the commands with the map beside it, on $1 if that is given. The name of the model
    comes from a file, so it is nowhere but in quotes."""
    lines = [line.replace(MAP, f'"$(dirname "$0")/{MAP}"').replace(NAME, '"$model"') for line in commands(NAME)]
    return SCRIPT + "\n".join([f"model={shlex.quote(model)}", 'model="${1:-$model}"', *lines, ""])
