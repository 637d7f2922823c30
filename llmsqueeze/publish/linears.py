"""The linears of a compressed folder: their sizes by the headers of the weights, and their parts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError
from llmsqueeze.formats.entries import Entry
from llmsqueeze.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Linear:
    """A compressed linear: its name, its parts in words, its number of weights, its bytes in the file, its relative
    output error. None: unknown.
    """

    name: str
    parts: str
    weights: int | None
    nbytes: int | None
    error: float | None

    @property
    def bits(self) -> float | None:
        """Bits per weight of all its tensors."""
        return self.nbytes * 8 / self.weights if self.nbytes is not None and self.weights else None


def compressed_linears(
    checkpoint: Checkpoint, entries: Mapping[str, Entry], errors: Mapping[str, float | None]
) -> list[Linear]:
    """In the order of their compression if the record has it."""
    order = {name: i for i, name in enumerate(errors)}
    return [
        Linear(name, describe([entry]), entry.numel, stored_nbytes(checkpoint, entry), errors.get(name))
        for name, entry in sorted(entries.items(), key=lambda item: order.get(item[0], len(order)))
    ]


def dense_linears(checkpoint: Checkpoint, errors: Mapping[str, float | None]) -> list[Linear]:
    """The linears that were compressed before the export, by their errors in the record."""
    linears = []
    for name, error in errors.items():
        stored = checkpoint.tensors.get(f"{name}.weight")
        if stored is None:
            linears.append(Linear(name, "", None, None, error))
        else:
            weights = stored.nbytes // stored.dtype.itemsize
            linears.append(Linear(name, parts.dtype_name(stored.dtype), weights, stored.nbytes, error))
    return linears


def stored_nbytes(checkpoint: Checkpoint, entry: Entry) -> int:
    """Bytes of all tensors of a linear. Raises CheckpointError if a tensor does not match the config."""
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


def describe(entries: Sequence[Entry]) -> str:
    """The parts of similar linears in words: '12 % 4 bit, 88 % 3 bit, g128 + rank 4 to 8 + 0.5 % outliers'."""
    ranks = [sum(s["rank"] for s in entry.specs if s["part"] == parts.LowRank.kind) for entry in entries]
    shares = [
        100 * sum(s["count"] for s in entry.specs if s["part"] == parts.Sparse.kind) / entry.numel for entry in entries
    ]
    texts = [
        "coded" if any(spec["part"] == parts.Coded.kind for entry in entries for spec in entry.specs) else "",
        describe_grids(entries),
        f"rank {span(ranks, 'd')}" if any(ranks) else "",
        f"{span(shares, '.2g')} % outliers" if any(shares) else "",
    ]
    return " + ".join(text for text in texts if text)


def span(values: Sequence[float], form: str) -> str:
    """'4', or '4 to 8'."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def describe_grids(entries: Sequence[Entry]) -> str:
    """'4 bit g128', or the share of the rows on each grid. A group size of all grids is written once, at the end."""
    specs = [(spec, entry.shape[0]) for entry in entries for spec in parts.with_grid(entry.specs)]
    if not any("rows" in spec for spec, _ in specs):
        return " + ".join(dict.fromkeys(str(parts.spec_grid(spec)) for spec, _ in specs))
    counts: dict[parts.Grid, int] = {}
    for spec, rows in specs:
        grid = parts.spec_grid(spec)
        counts[grid] = counts.get(grid, 0) + spec.get("rows", rows)
    if len(counts) == 1:
        return str(next(iter(counts)))
    groups = {str(grid).split()[2] for grid in counts}
    common = groups.pop() if len(groups) == 1 else ""
    texts = [
        f"{100 * count / sum(counts.values()):.2g} % {str(grid).replace(f' {common}', '', 1) if common else grid}"
        for grid, count in sorted(counts.items(), key=lambda item: -item[0].bits)
    ]
    return ", ".join([*texts, common] if common else texts)
