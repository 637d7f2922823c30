"""The files of a model that a result takes over: all that are not weights or config.

A folder is data: a link in it is followed only to a file in the folder itself, or in the Hub's cache that the folder is
part of. What they take is known before the run, and bounded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import (
    ADAPTER_CONFIG,
    COMPARISON,
    EVALUATION,
    FRONTIER,
    OTHER_WEIGHTS,
    PICKLES,
    SIDECAR,
    TEMPLATES,
    is_pointer,
)

MOST = 1 << 30  # bytes of all of them
READ = {".json", ".model", ".txt", ".jinja", ".py"}  # endings of those that whoever opens the model reads
NOT_COPIED = (
    *PICKLES,
    *OTHER_WEIGHTS,
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    ADAPTER_CONFIG,
    "README.md",
    "README.before-push.md",
    "report.html",
    SIDECAR,
    EVALUATION,
    COMPARISON,
    FRONTIER,
    ".*",
)


def files_beside(folder: Path) -> dict[str, int]:
    """Name, relative to the folder, -> size of each file that a result takes over. Raises CheckpointError if together
    they are far too large for such files, if one is a link that leads out of the folder, or one of a tokenizer a
    pointer of Git."""
    sizes: dict[str, int] = {}
    for directory in (folder, folder / TEMPLATES):
        if directory.is_symlink() and directory != folder:
            raise CheckpointError(f"{directory} is a link; folders behind links are not copied")
        for file in sorted(directory.iterdir()) if directory.is_dir() else ():
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                refuse_outside(file, folder)
                if file.suffix in READ and is_pointer(file):
                    raise CheckpointError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` there")
                sizes[str(file.relative_to(folder))] = file.stat().st_size
    if (total := sum(sizes.values())) > MOST:
        largest = max(sizes, key=lambda name: sizes[name])
        raise CheckpointError(
            f"the files beside the weights of {folder} take {total} bytes, and at most {MOST} are copied into a "
            f"result: the largest is {largest} with {sizes[largest]}; move it out of the folder"
        )
    return sizes


def refuse_outside(file: Path, folder: Path) -> None:
    """Raises CheckpointError for a link that leads out of the folder, or out of the Hub's cache that it is part of."""
    root = folder.resolve()
    cache = root.parents[1] if root.parent.name == "snapshots" else root
    if not file.resolve().is_relative_to(cache):
        raise CheckpointError(
            f"{file} is a link to {file.resolve()}, outside the model folder: it goes into no result; replace it by "
            "the file, or remove it"
        )


def copy(folder: Path, out: Path) -> None:
    """Copies the files of `files_beside`."""
    for name in files_beside(folder):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
