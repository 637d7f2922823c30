"""Bytes that changed after a folder was written: what was written has checksums, which reading compares.

Every tensor has one in the metadata of its shard (model/tensors/shard.py). The index has two of `config.json`: of what
it says of the compressed weights, and of the whole file, which a user may edit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import INDEX, read_json, read_json_if_there
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.tensors import shard

CONFIG = "config.json"
WHOLE, COMPRESSED = "config_crc32", "quantization_config_crc32"  # in the metadata of the index
CHANGED = "quantization_config is not what was written: its checksum differs"
EDITED = f"{CONFIG} is not what was written: it was edited, or is damaged"


def config_checksums(folder: Path) -> dict[str, str]:
    """The checksums of a folder's `config.json`, for its index."""
    compressed = json.dumps(read_json(folder / CONFIG).get("quantization_config"), sort_keys=True).encode()
    return {
        WHOLE: f"{zlib.crc32((folder / CONFIG).read_bytes()):08x}",
        COMPRESSED: f"{zlib.crc32(compressed):08x}",
    }


def changed_config(folder: Path) -> str | None:
    """Which of its checksums the folder's `config.json` does not have; None: it has all that there are."""
    written: Any = read_json_if_there(folder / INDEX).get("metadata")
    if not isinstance(written, dict):
        return None
    sums = config_checksums(folder)
    return next((key for key in (COMPRESSED, WHOLE) if written.get(key, sums[key]) != sums[key]), None)


def refuse_changed_config(folder: Path) -> None:
    """Raises CheckpointError if `config.json` says something else of the compressed weights than was written."""
    if changed_config(folder) == COMPRESSED:
        raise CheckpointError(f"{folder / CONFIG}: {CHANGED}")


def refuse_damaged(files: Iterable[Path]) -> None:
    """Reads shards and raises CheckpointError if a tensor is not what was written."""
    for file in files:
        shard.read(file)


def without_checksums(checkpoint: Checkpoint) -> str | None:
    """What cannot be told of a folder that has tensors without checksums."""
    files = {s.file.name for n, s in checkpoint.tensors.items() if not {n, *s.pieces} & checkpoint.checksums.keys()}
    if not files:
        return None
    return f"{min(files)} has no checksums (earlier versions wrote none), so this cannot tell whether a byte changed"
