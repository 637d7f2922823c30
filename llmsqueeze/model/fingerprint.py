"""Which weights a measurement or a plan is of: SHA-256 of the files, remembered with their size and time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from llmsqueeze.model.checkpoint import Checkpoint


def file_digests(checkpoint: Checkpoint, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """File name -> its size, modification time and SHA-256.

    A file whose size and time are those in `known` is taken to be the one that was read then, and not read again.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        stat = file.stat()
        about = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = (known or {}).get(file.name, {})
        if not about.items() <= before.items():
            with file.open("rb") as stream:
                before = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        found[file.name] = about | {"sha256": before["sha256"]}
    return found


def weights_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 for all files; names count, times do not."""
    text = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
