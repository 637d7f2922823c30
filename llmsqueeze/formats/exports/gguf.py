"""A compressed folder as a GGUF file that llama.cpp opens: the same codes and scales in its types.

Nothing is rounded again where a type holds it.

The base has the metadata, the tokenizer and all other tensors: what llama.cpp's converter makes of the folder's dense
weights, or a file that the user gives. What no type holds (outliers, low-rank factors, coded integers, two planes) is
rounded to Q8_0, and counted. A weight that the base has nothing of stays as it is there, and is named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmsqueeze import __version__, parts
from llmsqueeze.errors import CheckpointError, OutputError
from llmsqueeze.formats.entries import DENSE, read_parts
from llmsqueeze.formats.exports.conversion import Conversion, Converted, write_folder
from llmsqueeze.formats.gguf.base import Match, matches, open_base
from llmsqueeze.formats.gguf.convert import converted, converter
from llmsqueeze.formats.gguf.types import BLOCK, Q8_0, BlockType, Levels, encode, levels_of
from llmsqueeze.formats.gguf.write import verify, write
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.rtn import rtn

FORMAT = "gguf"


@dataclass(frozen=True)
class Replaced:
    """A tensor of the base that becomes one of ours. exact: whether its type holds what the folder has."""

    weight: str
    match: Match
    type: BlockType
    exact: bool


def write_gguf(plan: Conversion, out: Path, base: Path | None, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Writes the file `out`; returns its part of the summary.

    Raises CheckpointError for a base of another model, UnsupportedError if the converter is missing or refuses.
    """
    check_file(out, overwrite)
    with base_of(plan, base, out, progress) as file:
        reader = open_base(file)
        found = replacements(plan, reader)
        if not found:
            raise CheckpointError(f"{file} has no tensor like one of {plan.folder.path}: it is of another model")
        types = Counter(one.type for one in found.values())
        written = out.with_name(f".{out.name}.partial")
        try:
            blocks = {name: (one.type, partial(blocks_of, plan, one)) for name, one in found.items()}
            nbytes = write(reader, blocks, about(plan), types.most_common(1)[0][0].file_type, written)
            verify(written, reader, {name: partial(decoded, plan, one) for name, one in found.items()})
            written.replace(out)
        finally:
            written.unlink(missing_ok=True)
    linears = [one for one in found.values() if one.weight not in plan.ends]
    numel, stored = (sum(of(plan.entries[one.weight].numel, one.type) for one in linears) for of in (_count, _bits))
    matched = {one.weight for one in found.values()}
    return {
        "nbytes": nbytes,
        "types": {kind.name: count for kind, count in types.items()},
        "bits_per_weight": round(stored / numel, 4) if numel else None,
        "bits_per_weight_before": plan.folder.record.get("bits_per_weight"),
        "rounded": [one.weight for one in found.values() if not one.exact],
        "left_in_base": [name for name in plan.entries if name not in matched],
    }


def _count(numel: int, _: BlockType) -> float:
    return numel


def _bits(numel: int, kind: BlockType) -> float:
    return numel * kind.bits_per_weight


def check_file(out: Path, overwrite: bool) -> None:
    """Raises OutputError unless the file may be written."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder; --out names a file, such as {out.name}.gguf")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists already; choose another --out, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {out.parent} for {out.name}")


@contextmanager
def base_of(plan: Conversion, given: Path | None, out: Path, progress: Progress) -> Iterator[Path]:
    """The base in the context: the given file, or what the folder's dense weights are converted to, beside `out`."""
    if given is not None:
        if not given.is_file():
            raise CheckpointError(f"there is no file {given} (--gguf-base)")
        yield given
        return
    converter()  # that it is missing is told before anything is written
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as folder:
        dense, file = Path(folder) / "dense", Path(folder) / "base.gguf"
        write_folder(replace(plan, format=DENSE), dense, False, Converted(), progress)
        progress.note("llama.cpp's converter reads the dense weights")
        converted(dense, file)
        yield file


def replacements(plan: Conversion, reader: Any) -> dict[str, Replaced]:
    """Tensor of the base -> what it becomes."""
    weights = {name: partial(dense_of, plan, name) for name in plan.entries}
    found = matches(reader.tensors, weights, {name: entry.shape for name, entry in plan.entries.items()})
    replaced: dict[str, Replaced] = {}
    for name, match in found.items():
        entry = plan.entries[name]
        if entry.shape[1] % BLOCK:
            continue
        exact = levels_of(read_parts(plan.folder.checkpoint, entry), entry.shape)
        kind = exact.type if exact is not None else None
        replaced[match.tensor] = Replaced(name, match, kind or Q8_0, kind is not None)
    return replaced


def held(plan: Conversion, one: Replaced) -> Levels:
    """The weight as its type holds it, its rows in the order of the base."""
    entry = plan.entries[one.weight]
    levels = levels_of(read_parts(plan.folder.checkpoint, entry), entry.shape) if one.exact else None
    if levels is None:
        rounded = rtn(dense_of(plan, one.weight), Grid(Q8_0.bits, BLOCK, True), torch.float16)
        levels = Levels(rounded.codes.to(torch.int16) - (1 << (Q8_0.bits - 1)), rounded.scale)
    if one.match.order is None:
        return levels
    return Levels(levels.levels[one.match.order], levels.scale[one.match.order])


def blocks_of(plan: Conversion, one: Replaced) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]."""
    return encode(held(plan, one), one.type)


def decoded(plan: Conversion, one: Replaced) -> Tensor:
    """float32 [rows, cols], as llama.cpp has to decode it."""
    return held(plan, one).dense()


def dense_of(plan: Conversion, name: str) -> Tensor:
    """float32 [rows, cols]."""
    return parts.sum_of_parts(read_parts(plan.folder.checkpoint, plan.entries[name])).float()


def about(plan: Conversion) -> dict[str, str]:
    """Keys of ours in the file."""
    record = plan.folder.record
    told = {"version": __version__, "recipe": json.dumps(record.get("recipe", {}))}
    if (predicted := record.get("predicted_loss_increase")) is not None:
        told["predicted_loss_increase"] = f"{predicted:.6g}"
    return {f"llmsqueeze.{name}": text for name, text in told.items()}
