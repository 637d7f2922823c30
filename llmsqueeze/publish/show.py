"""`llmsqueeze show`: the parts and the bytes of each linear of a compressed folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmsqueeze import parts
from llmsqueeze.errors import UnsupportedError
from llmsqueeze.formats.entries import Entry
from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.original import locate
from llmsqueeze.publish.folder import Folder, read_folder
from llmsqueeze.publish.linears import describe
from llmsqueeze.publish.provenance import chosen

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # in the name of a linear, the first that of its block


@dataclass(frozen=True)
class Row:
    """Linears whose names differ only by a number: how many, the blocks that they are in, their parts in words, their
    weights, their bytes. beside: whether they are of other towers, embeddings or the head; what is said of all linears
    is without them."""

    pattern: str
    count: int
    blocks: tuple[int, ...]
    parts: str
    weights: int
    nbytes: int
    beside: bool = False

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.weights


@dataclass(frozen=True)
class Contents:
    """The linears of a folder, folded, and its bytes: `nbytes` of all tensors, `kept_nbytes` of the others.

    `bits`: mean width of the codes. `recipe`: the settings that make the folder again. `plane_zeros`: the share of
    zeros in each plane of the dual-binary parts, None if there are none. `distillation`: all distillations.
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
        rows = [row for row in self.rows if not row.beside]
        return sum(row.nbytes for row in rows) * 8 / sum(row.weights for row in rows)

    def as_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"bits_per_weight": round(row.bits_per_weight, 6)} for row in self.rows]
        return asdict(self) | {"bits_per_weight": round(self.bits_per_weight, 6), "rows": rows}


def contents(path: str) -> Contents:
    """The contents of a folder or a Hub repository.

    Raises UnsupportedError if llmsqueeze did not write it or if it holds ordinary weights.
    """
    folder = read_folder(locate(path))
    if folder.dense:
        raise UnsupportedError(f"{path} holds ordinary weights; name a folder with compressed weights")
    rows = _fold(folder)
    return Contents(
        path=path,
        model=folder.record.get("model"),
        method=folder.recipe.get("method"),
        bits=round(_code_bits({linear.name: folder.entries[linear.name] for linear in folder.linears}), 6),
        recipe=chosen(folder.recipe),
        rows=rows,
        nbytes=folder.nbytes,
        kept_nbytes=folder.nbytes - sum(row.nbytes for row in rows),
        nbytes_original=folder.record.get("nbytes_original"),
        plane_zeros=_plane_zeros(folder.checkpoint, folder.entries),
        distillation=[dict(one) for one in folder.distillations],
    )


def _code_bits(entries: Mapping[str, Entry]) -> float:
    """Mean width of the codes over all weights."""
    total = 0
    for entry in entries.values():
        rows, cols = entry.shape
        total += sum(parts.spec_grid(s).bits * s.get("rows", rows) * cols for s in parts.with_grid(entry.specs))
        total += sum(16 * s["words"] for s in entry.specs if s["part"] == parts.Coded.kind)
    return total / sum(entry.numel for entry in entries.values())


def _fold(folder: Folder) -> list[Row]:
    """A row for all linears with the same pattern and the same grids. The config's order is kept."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in folder.entries.items():
        pattern = NUMBER.sub("*", name)
        mixed = any("rows" in spec for spec in entry.specs)
        grids = "" if mixed else " + ".join(str(parts.spec_grid(spec)) for spec in parts.with_grid(entry.specs))
        groups.setdefault((pattern, grids), []).append(name)
    beside = {linear.name for linear in (*folder.towers, *folder.ends)}
    nbytes = {linear.name: linear.nbytes or 0 for linear in (*folder.linears, *folder.towers, *folder.ends)}
    return [
        Row(
            pattern,
            len(names),
            tuple(sorted({int(number[0]) for name in names if (number := NUMBER.search(name))})),
            describe([folder.entries[name] for name in names]),
            sum(folder.entries[name].numel for name in names),
            sum(nbytes[name] for name in names),
            names[0] in beside,
        )
        for (pattern, _), names in groups.items()
    ]


def _plane_zeros(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> tuple[float, float] | None:
    """Share of zeros in each plane over all dual-binary parts; reads the planes, one part at a time."""
    zeros, total = [0.0, 0.0], 0
    for entry in entries.values():
        for spec, names in zip(entry.specs, entry.names, strict=True):
            if spec["part"] == parts.DualBinary.kind:
                tensors = {kind: checkpoint.read_raw(name) for kind, name in names.items()}
                part = parts.DualBinary.restore(entry.shape, spec, tensors)
                weights = len(part.plane1) * entry.shape[1]
                zeros = [sum_ + share * weights for sum_, share in zip(zeros, part.zero_shares(), strict=True)]
                total += weights
    return (zeros[0] / total, zeros[1] / total) if total else None
