"""What a compressed folder holds, read from its config and the headers of its files."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import SIDECAR, read_json_if_there
from llmsqueeze.formats.entries import Entry, read_entries
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.original import locate


@dataclass(frozen=True)
class Row:
    """Linears that differ only by numbers in their names: how many, what they hold, their bytes."""

    pattern: str
    count: int
    holds: str
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.weights


@dataclass(frozen=True)
class Contents:
    """A folder's linears, folded, and its bytes: `nbytes` of all tensors, `kept_nbytes` of what was not compressed.

    `bits`: mean width of the codes. `recipe`: what makes the folder again. `plane_zeros`: share of zeros in the two
    planes of dual-binary parts, None where there are none. `distillation`: every one that the folder has been through.
    """

    path: str
    model: str | None
    method: str | None
    bits: float
    recipe: dict[str, Any]
    rows: list[Row]
    nbytes: int
    kept_nbytes: int
    nbytes_original: int | None
    plane_zeros: tuple[float, float] | None
    distillation: list[dict[str, Any]]

    @property
    def bits_per_weight(self) -> float:
        return sum(row.nbytes for row in self.rows) * 8 / sum(row.weights for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"bits_per_weight": round(row.bits_per_weight, 6)} for row in self.rows]
        return asdict(self) | {"bits_per_weight": round(self.bits_per_weight, 6), "rows": rows}


def contents(folder: str) -> Contents:
    """Reads the folder (or Hub repository). Raises UnsupportedError if llmsqueeze did not write it."""
    path = locate(folder)
    checkpoint = open_checkpoint(path)
    entries = read_entries(checkpoint)
    sizes = {name: _stored_nbytes(checkpoint, entry) for name, entry in entries.items()}
    record = read_json_if_there(path / SIDECAR)
    return Contents(
        path=folder,
        model=record.get("model"),
        method=record.get("recipe", {}).get("method"),
        bits=round(_code_bits(entries), 6),
        recipe=asked(record.get("recipe", {})),
        rows=_fold(entries, sizes),
        nbytes=checkpoint.nbytes,
        kept_nbytes=checkpoint.nbytes - sum(sizes.values()),
        nbytes_original=record.get("nbytes_original"),
        plane_zeros=_plane_zeros(checkpoint, entries),
        distillation=record.get("distillation", []),
    )


def asked(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stored recipe that are not open."""
    return {key: value for key, value in recipe.items() if value is not None and value != []}


def _code_bits(entries: dict[str, Entry]) -> float:
    """Mean width of the codes over all weights."""
    total = 0
    for entry in entries.values():
        rows, cols = entry.shape
        total += sum(parts.spec_grid(s).bits * s.get("rows", rows) * cols for s in parts.with_grid(entry.specs))
        total += sum(16 * s["words"] for s in entry.specs if s["part"] == parts.Coded.kind)
    return total / sum(_numel(entry) for entry in entries.values())


def _stored_nbytes(checkpoint: Checkpoint, entry: Entry) -> int:
    """Bytes of everything stored of a linear, after checking that the file holds what the config says."""
    for spec, names in zip(entry.specs, entry.names, strict=True):
        for kind, (shape, dtype) in parts.layout(entry.shape, spec).items():
            stored = checkpoint.tensors.get(names[kind])
            if stored is None:
                raise CheckpointError(f"{checkpoint.path} lacks {names[kind]}, which its config describes")
            if stored.shape != shape or (stored.dtype != dtype and not dtype.is_floating_point):
                raise CheckpointError(
                    f"{names[kind]} is {list(stored.shape)} {parts.dtype_name(stored.dtype)}, but its config says "
                    f"{list(shape)} {parts.dtype_name(dtype)}"
                )
    return sum(checkpoint.tensors[name].nbytes for name in entry.tensors)


def _fold(entries: dict[str, Entry], sizes: dict[str, int]) -> list[Row]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        mixed = any("rows" in spec for spec in entry.specs)
        grids = "" if mixed else " + ".join(str(parts.spec_grid(spec)) for spec in parts.with_grid(entry.specs))
        if any(spec["part"] == parts.Coded.kind for spec in entry.specs):
            grids = "coded"
        groups.setdefault((pattern, grids), []).append(name)
    return [
        Row(
            pattern,
            len(names),
            (grids or _describe_mix([entries[name] for name in names]))
            + _describe_ranks([entries[name] for name in names])
            + _describe_outliers([entries[name] for name in names]),
            sum(_numel(entries[name]) for name in names),
            sum(sizes[name] for name in names),
        )
        for (pattern, grids), names in groups.items()
    ]


def _describe_mix(entries: list[Entry]) -> str:
    """'12 % 4 bit, 88 % 3 bit g128': shares of the rows of linears whose rows are on different grids."""
    counts: dict[parts.Grid, int] = {}
    for entry in entries:
        for spec in parts.with_grid(entry.specs):
            grid = parts.spec_grid(spec)
            counts[grid] = counts.get(grid, 0) + spec.get("rows", entry.shape[0])
    total = sum(counts.values())
    ordered = sorted(counts, key=lambda grid: -grid.bits)
    same = len({str(grid).partition(" bit ")[2] for grid in ordered}) == 1
    tail = str(ordered[0]).partition(" bit ")[2]
    names = [f"{grid.bits} bit" if same else str(grid) for grid in ordered]
    shares = ", ".join(f"{100 * counts[g] / total:.3g} % {name}" for g, name in zip(ordered, names, strict=True))
    return f"rows {shares}{' ' + tail if same else ''}"


def _describe_ranks(entries: list[Entry]) -> str:
    ranks = {sum(s["rank"] for s in entry.specs if s["part"] == "lowrank") for entry in entries}
    if ranks == {0}:
        return ""
    return f" + rank {min(ranks)}" if len(ranks) == 1 else f" + rank {min(ranks)} to {max(ranks)}"


def _describe_outliers(entries: list[Entry]) -> str:
    shares = [100 * sum(s["count"] for s in e.specs if s["part"] == "sparse") / _numel(e) for e in entries]
    low, high = f"{min(shares):.2g}", f"{max(shares):.2g}"
    if max(shares) == 0:
        return ""
    return f" + {low} % outliers" if low == high else f" + {low} to {high} % outliers"


def _plane_zeros(checkpoint: Checkpoint, entries: dict[str, Entry]) -> tuple[float, float] | None:
    """Share of zeros in each plane over all dual-binary parts; reads the planes, one part at a time."""
    zeros, total = [0.0, 0.0], 0
    for entry in entries.values():
        for spec, names in zip(entry.specs, entry.names, strict=True):
            if spec["part"] == parts.DualBinary.kind:
                stored = {kind: checkpoint.read_raw(name) for kind, name in names.items()}
                part = parts.DualBinary.restore(entry.shape, spec, stored)
                held = len(part.plane1) * entry.shape[1]
                zeros = [sum_ + share * held for sum_, share in zip(zeros, part.zero_shares(), strict=True)]
                total += held
    return (zeros[0] / total, zeros[1] / total) if total else None


def _numel(entry: Entry) -> int:
    rows, cols = entry.shape
    return int(rows * cols)
