"""What a page says of a compressed folder, read from its JSON files and the headers of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, nearest
from llmsqueeze.files import COMPARISON, EVALUATION, SIDECAR, read_json_if_there
from llmsqueeze.formats.entries import Entry, is_compressed, read_entries
from llmsqueeze.formats.public import shown
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.publish.card import read_sidecar
from llmsqueeze.publish.page.words import number

BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # what configs call it


@dataclass(frozen=True)
class Linear:
    """One of the compressed linears; None where the folder does not tell."""

    name: str
    holds: str
    weights: int | None
    nbytes: int | None
    error: float | None

    @property
    def bits(self) -> float | None:
        return self.nbytes * 8 / self.weights if self.nbytes is not None and self.weights else None


@dataclass(frozen=True)
class Folder:
    """A folder's records, fit for publication, and its linears. `dense`: exported as ordinary weights."""

    name: str
    record: dict[str, Any]
    evaluation: dict[str, Any]
    comparison: dict[str, Any]
    linears: list[Linear]
    blocks: int
    nbytes: int
    dense: bool

    @property
    def linear_nbytes(self) -> int:
        return sum(linear.nbytes or 0 for linear in self.linears)

    @property
    def bits_per_weight(self) -> float:
        """Of everything stored for the linears, as it lies in the files."""
        weights = sum(linear.weights or 0 for linear in self.linears)
        return self.linear_nbytes * 8 / weights if weights else float(self.record["bits_per_weight"])


def read_folder(given: str | Path) -> Folder:
    """Raises CheckpointError or UnsupportedError for a folder that is not ours or not whole."""
    path = existing(Path(given).expanduser())
    record = read_sidecar(path)
    checkpoint = open_checkpoint(path)
    compressed = is_compressed(checkpoint)
    errors = errors_of(record)
    blocks = [number(checkpoint.config.get(key)) for key in BLOCK_COUNTS]
    return Folder(
        name=path.resolve().name,
        record=shown(record),
        evaluation=shown(read_json_if_there(path / EVALUATION)),
        comparison=shown(read_json_if_there(path / COMPARISON)),
        linears=compressed_linears(checkpoint, errors) if compressed else dense_linears(checkpoint, errors),
        blocks=int(next((count for count in blocks if count), 0)),
        nbytes=checkpoint.nbytes,
        dense=not compressed,
    )


def existing(path: Path) -> Path:
    """The folder, if it is one that llmsqueeze wrote; else the error names the nearest that is."""
    if (path / SIDECAR).is_file():
        return path
    ours = [other.parent for place in (path, path.parent) if place.is_dir() for other in place.glob(f"*/{SIDECAR}")]
    hint = nearest(path.name, [folder.name for folder in ours])
    if path.is_dir():
        inside = next((folder for folder in ours if folder.parent == path), None)
        hint = f"; did you mean '{inside}'?" if inside else hint
        raise CheckpointError(f"{path} has no {SIDECAR}; name a folder that llmsqueeze wrote{hint}")
    raise CheckpointError(f"there is no folder {path}; name one that llmsqueeze wrote{hint}")


def errors_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    found = record.get("errors")
    return {str(name): number(value) for name, value in found.items()} if isinstance(found, dict) else {}


def compressed_linears(checkpoint: Checkpoint, errors: Mapping[str, float | None]) -> list[Linear]:
    """In the order in which they were compressed, where that is known."""
    entries = read_entries(checkpoint)
    if missing := next((t for e in entries.values() for t in e.tensors if t not in checkpoint.tensors), None):
        raise CheckpointError(f"{checkpoint.path} lacks {missing}, which its config describes")
    order = {name: i for i, name in enumerate(errors)}
    return [
        Linear(
            name,
            holds(entry),
            entry.shape[0] * entry.shape[1],
            sum(checkpoint.tensors[tensor].nbytes for tensor in entry.tensors),
            errors.get(name),
        )
        for name, entry in sorted(entries.items(), key=lambda item: order.get(item[0], len(order)))
    ]


def dense_linears(checkpoint: Checkpoint, errors: Mapping[str, float | None]) -> list[Linear]:
    """What was compressed once, by the errors that are remembered of it."""
    found = []
    for name, error in errors.items():
        stored = checkpoint.tensors.get(f"{name}.weight")
        weights = stored.nbytes // stored.dtype.itemsize if stored else None
        what = parts.dtype_name(stored.dtype) if stored else ""
        found.append(Linear(name, what, weights, stored.nbytes if stored else None, error))
    return found


def holds(entry: Entry) -> str:
    """'4 bit g128', or with shares of the rows '12 % 4 bit, 88 % 3 bit, g128 + rank 8 + 0.5 % outliers'."""
    rows, cols = entry.shape
    counts: dict[parts.Grid, int] = {}
    for spec in parts.with_grid(entry.specs):
        grid = parts.spec_grid(spec)
        counts[grid] = counts.get(grid, 0) + spec.get("rows", rows)
    rank = sum(spec["rank"] for spec in entry.specs if spec["part"] == parts.LowRank.kind)
    kept = sum(spec["count"] for spec in entry.specs if spec["part"] == parts.Sparse.kind)
    said = [
        "coded" if any(spec["part"] == parts.Coded.kind for spec in entry.specs) else "",
        mixture({str(grid): count / rows for grid, count in sorted(counts.items(), key=lambda it: -it[0].bits)}),
        f"rank {rank}" if rank else "",
        f"{100 * kept / (rows * cols):.2g} % outliers" if kept else "",
    ]
    return " + ".join(one for one in said if one)


def mixture(shares: Mapping[str, float]) -> str:
    """Grids and the shares of the rows that have them; a group size that all have is said once, at the end."""
    if len(shares) < 2:
        return "".join(shares)
    groups = {grid.split()[2] for grid in shares}
    common = groups.pop() if len(groups) == 1 else ""
    texts = [
        f"{100 * share:.2g} % {grid.replace(f' {common}', '', 1) if common else grid}" for grid, share in shares.items()
    ]
    return ", ".join([*texts, common] if common else texts)
