"""A model folder written again, shard by shard, with other tensors in the place of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsqueeze.files import SIDECAR
from llmsqueeze.formats.folder import Output, output_folder
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.progress import Progress


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    needed: int,
    overwrite: bool,
    shard_of: Callable[[list[str]], dict[str, Tensor]],
    config: Mapping[str, Any],
    sidecar: Callable[[int], Mapping[str, Any]],
    inspect: Callable[[Output], None],
    progress: Progress | None = None,
) -> int:
    """Writes `out` from the checkpoint's folder; returns the bytes of its tensors.

    `shard_of`: names of the tensors in a file -> what the new file holds. `sidecar`: bytes of all tensors -> the record
    of what was done. `inspect` sees the finished folder before it gets its name. `needed` bytes must be free.
    """
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    with output_folder(out, len(files), needed, overwrite) as output:
        for file in (progress or Progress()).over(files, "rewrite", len(files)):
            names = sorted(name for name, stored in checkpoint.tensors.items() if stored.file == file)
            output.write_shard(shard_of(names))
        output.copy_rest(checkpoint.path)
        output.write_json("config.json", config)
        output.write_json(SIDECAR, sidecar(output.nbytes))
        output.finish()
        inspect(output)
    return output.nbytes
