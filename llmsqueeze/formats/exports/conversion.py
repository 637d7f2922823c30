"""The tensors of a compressed folder in another format, file by file.

compressed-tensors: the same codes and scales under its names; coded weights, which it cannot represent, are rounded
onto a grid (reround.py). peft: the same without the low-rank parts. dense: the sum of the parts. Memory: the tensors of
one new file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.errors import UnsupportedError
from llmsqueeze.formats import compressed_tensors, verify
from llmsqueeze.formats.entries import DENSE, Entry, read_parts
from llmsqueeze.formats.experts import KEY, StoredAs
from llmsqueeze.formats.exports import peft
from llmsqueeze.formats.exports.reround import reround
from llmsqueeze.formats.folder import Output, digest, rewrite
from llmsqueeze.formats.inspection.opening import Opened
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.adapter import Change, changes
from llmsqueeze.model.experts.find import expert_linears
from llmsqueeze.model.experts.names import experts_in_files
from llmsqueeze.model.experts.stack import ExpertStack
from llmsqueeze.model.linears import all_linears, is_transposed, output_head
from llmsqueeze.parts import Grid, LowRank, Part, spec_grid
from llmsqueeze.progress import Progress


@dataclass(frozen=True)
class Conversion:
    """A compressed folder and the format to write it in. dtype: of dense weights, None for the model's own; grid: onto
    which coded weights are rounded, None if they are not; transposed: linears that the model stores so; ends:
    compressed embeddings and head, which other formats have dense; changes: parameter -> what an adapter adds to it.
    """

    folder: Folder
    format: str
    dtype: torch.dtype | None
    grid: Grid | None
    transposed: frozenset[str]
    ends: frozenset[str]
    experts: StoredAs
    changes: Mapping[str, Change]

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self.folder.entries

    @property
    def numel(self) -> int:
        """How many weights the compressed linears have."""
        return sum(entry.numel for entry in self.entries.values())

    @property
    def kept_nbytes(self) -> int:
        """Bytes of everything but the compressed linears' weights."""
        compressed = {name for entry in self.entries.values() for name in entry.tensors}
        checkpoint = self.folder.checkpoint
        return checkpoint.nbytes - sum(checkpoint.tensors[name].nbytes for name in compressed)

    def stored_dtype(self, linear: str) -> torch.dtype:
        """The dtype of a linear's dense weight."""
        own: torch.dtype = getattr(torch, self.entries[linear].specs[0]["dtype"])
        return self.dtype or own


@dataclass
class Converted:
    """What a conversion notes beside the new folder: digests of the weights that its parts sum to, squared errors in
    steps of weights that were rounded, low-rank parts that it leaves out, the runtimes' verdicts, and those that opened
    it."""

    digests: dict[str, bytes] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    factors: dict[str, LowRank] = field(default_factory=dict)
    opens: dict[str, str] = field(default_factory=dict)
    opened: Opened = field(default_factory=Opened)


def conversion(
    folder: Folder, to: str, dtype: torch.dtype | None, grid: Grid | None, adapter: Path | None = None
) -> Conversion:
    """How to write the folder. Raises CheckpointError or UnsupportedError for an adapter that cannot be merged."""
    model = folder.model
    transposed = frozenset(name for name in folder.entries if is_transposed(model.get_submodule(name)))
    ends = (model.get_input_embeddings(), output_head(model))
    compressed_ends = frozenset(name for name in folder.entries if model.get_submodule(name) in ends)
    added = changes(folder.path, adapter, folder.trust_remote_code) if adapter is not None else {}
    for name in added:
        if name.removesuffix(".weight") not in folder.entries and name not in folder.checkpoint.tensors:
            raise UnsupportedError(f"the adapter {adapter} changes {name}, which {folder.path} has in another form")
    return Conversion(folder, to, dtype, grid, transposed, compressed_ends, stored_experts(folder, to), added)


def write_folder(plan: Conversion, out: Path, overwrite: bool, notes: Converted, progress: Progress) -> int:
    """Writes a model folder (of peft: the base) and verifies it; returns the bytes of its tensors."""
    checkpoint = plan.folder.checkpoint
    config = converted_config(plan)

    def sidecar(nbytes: int) -> Mapping[str, Any]:
        bits = round((nbytes - plan.kept_nbytes) * 8 / plan.numel, 6)
        written_as = DENSE if plan.format == DENSE else compressed_tensors.METHOD
        record = {key: value for key, value in plan.folder.record.items() if key != KEY}
        record |= {KEY: plan.experts} if plan.experts else {}
        return record | {"nbytes": nbytes, "bits_per_weight": bits, "format": written_as}

    def inspect(output: Output) -> None:
        trust = plan.folder.trust_remote_code
        verdicts, notes.opened = verify.rewritten(output, notes.digests, trust, progress)
        notes.opens |= verdicts

    needed, of = dense_nbytes(plan) + plan.kept_nbytes if plan.format == DENSE else 2 * checkpoint.nbytes, plan.experts
    return rewrite(checkpoint, out, needed, overwrite, converter(plan, notes), config, sidecar, inspect, progress, of)


def converted_config(plan: Conversion) -> dict[str, Any]:
    """The new folder's `config.json`. Raises UnsupportedError if compressed-tensors cannot represent a part."""
    config = {key: value for key, value in plan.folder.checkpoint.config.items() if key != "quantization_config"}
    if plan.format == DENSE:
        return config | ({"dtype": parts.dtype_name(plan.dtype)} if plan.dtype else {})
    entries = {name: entry for name, entry in plan.entries.items() if name not in plan.ends}
    if plan.format == peft.FORMAT:
        entries = {name: without_factors(entry) for name, entry in entries.items()}
    if plan.grid is not None:
        entries = {name: on_grid(entry, plan.grid) for name, entry in entries.items()}
    refuse_loss(plan, entries)
    grids = {name: (spec_grid(entry.specs[0]), entry.shape[1]) for name, entry in entries.items()}
    ignored, experts = all_linears(plan.folder.model) - set(entries), expert_linears(plan.folder.model)
    if plan.experts and (what := compressed_tensors.experts_that_differ(grids, experts)) is not None:
        raise UnsupportedError(f"{plan.folder.path}: {what}; export --to dense")
    return config | {"quantization_config": compressed_tensors.quantization_config(grids, ignored, experts)}


def converter(plan: Conversion, notes: Converted) -> Callable[[list[str]], dict[str, Tensor]]:
    """Names of the tensors in a file -> tensors of the new file; a linear goes where the first of its tensors was."""
    linear_of = {name: linear for linear, entry in plan.entries.items() for name in entry.tensors}
    first = {entry.tensors[0] for entry in plan.entries.values()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name not in linear_of:
                tensors[name] = kept(plan, name, plan.folder.checkpoint.read(name))
            elif name in first:
                tensors |= converted(plan, linear_of[name], notes)
        return with_merged_experts(plan.folder.model, tensors)

    return shard_of


def with_merged_experts(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with one for all experts' matrices in the place of one for each, as the model has them."""
    for name, stack in model.named_modules():
        if isinstance(stack, ExpertStack) and f"{name}.0.weight" in tensors:
            matrices = [tensors.pop(f"{name}.{index}.weight") for index in range(len(stack))]
            tensors[name] = stack.merged(matrices)
    return tensors


def stored_experts(folder: Folder, to: str) -> StoredAs:
    """How the files of a format call experts' tensors. Raises UnsupportedError if it has no place for those of the
    folder."""
    experts = [name for name in expert_linears(folder.model) if name in folder.entries]
    if to == DENSE or not experts:
        return {}
    names = experts_in_files(folder.model) if to == compressed_tensors.METHOD else f"{to} has no place for experts"
    if isinstance(names, str):
        raise UnsupportedError(
            f"{experts[0]} in {folder.path} lies with others in one tensor: {names}; export --to dense"
        )
    return names


def kept(plan: Conversion, name: str, tensor: Tensor) -> Tensor:
    """A tensor that was not compressed, in the dtype of the new folder."""
    if name in plan.changes:
        tensor = (tensor.float() + plan.changes[name]()).to(tensor.dtype)
    return tensor.to(plan.dtype) if plan.format == DENSE and plan.dtype and tensor.is_floating_point() else tensor


def converted(plan: Conversion, linear: str, notes: Converted) -> dict[str, Tensor]:
    """A linear's tensors in the new format. Raises UnsupportedError for weights beyond the dtype's range."""
    weight_parts: list[Part] = read_parts(plan.folder.checkpoint, plan.entries[linear])
    if plan.format == peft.FORMAT:
        for part in (part for part in weight_parts if isinstance(part, LowRank)):
            notes.factors[linear] = part
        weight_parts = [part for part in weight_parts if not isinstance(part, LowRank)]
    if plan.grid is not None and linear not in plan.ends:
        rounded, notes.squares[linear] = reround(weight_parts, plan.grid)
        weight_parts = [rounded]
    if plan.format != DENSE and linear not in plan.ends:
        notes.digests[linear] = digest(parts.sum_of_parts(weight_parts))
        return compressed_tensors.stored_tensors(linear, weight_parts)
    dense = parts.sum_of_parts(weight_parts)
    if (change := plan.changes.get(f"{linear}.weight")) is not None:
        dense = dense + (change().T if linear in plan.transposed else change())
    dense = dense.to(plan.stored_dtype(linear))
    if not bool(dense.isfinite().all()):
        dtype = parts.dtype_name(dense.dtype)
        raise UnsupportedError(f"{linear} has weights beyond the range of {dtype}; use --dtype bf16")
    return {f"{linear}.weight": dense.T.contiguous() if linear in plan.transposed else dense}


def refuse_loss(plan: Conversion, entries: Mapping[str, Entry]) -> None:
    """Raises UnsupportedError if compressed-tensors cannot represent one of the entries."""
    for linear, entry in entries.items():
        what = "a transposed weight (Conv1D)" if linear in plan.transposed else None
        what = what or compressed_tensors.lost(entry.shape, entry.specs)
        if what is not None:
            adapted = " or --to peft" if what == "a low-rank part" else ""
            raise UnsupportedError(
                f"{linear} in {plan.folder.path} holds {what}, which compressed-tensors cannot represent; "
                f"export --to dense{adapted}"
            )


def on_grid(entry: Entry, grid: Grid) -> Entry:
    """The entry of the weight after it is rounded onto the grid."""
    spec = parts.grid_spec(grid, getattr(torch, entry.specs[0]["dtype"]))
    return replace(entry, specs=(spec,), names=entry.names[:1])


def without_factors(entry: Entry) -> Entry:
    """The entry without its low-rank parts."""
    others = [i for i, spec in enumerate(entry.specs) if spec["part"] != LowRank.kind]
    return replace(entry, specs=tuple(entry.specs[i] for i in others), names=tuple(entry.names[i] for i in others))


def dense_nbytes(plan: Conversion) -> int:
    """Bytes of the linears' dense weights."""
    return sum(entry.numel * plan.stored_dtype(name).itemsize for name, entry in plan.entries.items())
