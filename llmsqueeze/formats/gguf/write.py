"""A GGUF file with the metadata of its base, in which some tensors are others.

Memory: one tensor. The file appears under its name when it was opened again and every tensor was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmsqueeze.errors import VerificationError
from llmsqueeze.formats.gguf.base import dense, open_base
from llmsqueeze.formats.gguf.types import BlockType

READERS_OWN = "GGUF."  # fields that the reader makes of the file's head
FILE_TYPE = "general.file_type"


def write(
    base: Any,
    replaced: Mapping[str, tuple[BlockType, Callable[[], NDArray[np.uint8]]]],
    about: Mapping[str, str],
    file_type: int,
    file: Path,
) -> int:
    """Writes `file` and returns the bytes of its tensors.

    base: the reader of the base. replaced: tensor -> its new type, and what gives its blocks, uint8 [rows, bytes of a
    row]. about: keys of ours -> text; file_type: llama.cpp's number for what most tensors are.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(file), _text(base, "general.architecture"))
    for name, field in base.fields.items():
        if name == "general.architecture" or name.startswith(READERS_OWN) or name in about:
            continue
        kind, *inner = field.types
        value = file_type if name == FILE_TYPE else field.contents()
        writer.add_key_value(name, value, kind, inner[-1] if inner else None)
    if FILE_TYPE not in base.fields:
        writer.add_file_type(file_type)
    for name, text in about.items():
        writer.add_string(name, text)
    for tensor in base.tensors:
        shape, kind = tensor.data.shape, tensor.tensor_type
        if tensor.name in replaced:
            block = replaced[tensor.name][0]
            rows, cols = reversed(tensor.shape.tolist())
            shape, kind = (rows, cols // 32 * block.nbytes), GGMLQuantizationType[block.name]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), rows * shape[1], kind)
        else:
            writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, tensor.data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    nbytes = 0
    for tensor in base.tensors:
        data = replaced[tensor.name][1]() if tensor.name in replaced else tensor.data
        writer.write_tensor_data(data)
        nbytes += data.nbytes
    writer.close()
    return nbytes


def verify(file: Path, base: Any, expected: Mapping[str, Callable[[], Any]]) -> None:
    """Opens the file again and compares every tensor: with the dense weight that it stands for, bit by bit, or with the
    base's. Raises VerificationError."""
    written = {tensor.name: tensor for tensor in open_base(file).tensors}
    for tensor in base.tensors:
        name = tensor.name
        if name not in written:
            raise VerificationError(f"{file} lacks {name}")
        same = (
            dense(written[name]).equal(expected[name]())
            if name in expected
            else np.array_equal(written[name].data.view(np.uint8), tensor.data.view(np.uint8))
        )
        if not same:
            raise VerificationError(f"{name} in {file} is not what was written")


def _text(base: Any, field: str) -> str:
    return str(base.fields[field].contents())
