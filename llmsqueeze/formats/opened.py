"""A model folder that is opened: its tensors, its compressed linears, its record, and its model without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.formats.entries import Entry, format_of, is_compressed, read_entries
from llmsqueeze.formats.experts import joined
from llmsqueeze.formats.imports.padded import packed_again, padded_linears
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.blockwise.heads import stack_heads
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.config import auto_class, empty_model, load_config
from llmsqueeze.model.experts.find import stack_experts
from llmsqueeze.model.linears import find_blocks


@dataclass(frozen=True)
class Folder:
    """`entries`: its compressed linears, none if it is dense. `model`: on the meta device. `padded`: the linears whose
    codes the file holds in the packing of compressed-tensors up to 0.17."""

    checkpoint: Checkpoint
    entries: Mapping[str, Entry]
    model: PreTrainedModel
    trust_remote_code: bool
    padded: Sequence[str] = ()

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def format(self) -> str:
        return format_of(self.checkpoint)

    @property
    def auto_class(self) -> str:
        """The name of the Auto class of transformers that opens it."""
        name: str = auto_class(self.model.config).__name__
        return name

    @cached_property
    def record(self) -> dict[str, Any]:
        """Its `llmsqueeze.json`, empty if there is none."""
        return read_record(self.path)


def open_folder(checkpoint: Checkpoint, trust_remote_code: bool) -> Folder:
    """Reads the config and, of compressed-tensors, the shapes. Raises CheckpointError or UnsupportedError."""
    checkpoint = joined(checkpoint)
    entries = read_entries(checkpoint) if is_compressed(checkpoint) else {}
    return _with_model(checkpoint, entries, trust_remote_code)


def open_compressed(folder: str, purpose: str, trust_remote_code: bool) -> Folder:
    """A folder that llmsqueeze compressed. Raises RecipeError if there is no folder; `purpose` says what it was for.
    Raises CheckpointError, or UnsupportedError if llmsqueeze did not compress it."""
    path = Path(folder)
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; {purpose}")
    checkpoint = joined(open_checkpoint(path))
    return _with_model(checkpoint, read_entries(checkpoint), trust_remote_code)


def _with_model(checkpoint: Checkpoint, entries: Mapping[str, Entry], trust_remote_code: bool) -> Folder:
    if entries and checkpoint.absent:
        raise CheckpointError(f"{checkpoint.path} lacks {checkpoint.absent[0]}, which its index names")
    config = load_config(checkpoint.path, trust_remote_code)
    model = empty_model(checkpoint.path, config, trust_remote_code)
    if entries:
        stack_experts(model, blocks := find_blocks(model))
        stack_heads(model, blocks)
    padded = padded_linears(checkpoint, entries)
    return Folder(packed_again(checkpoint, entries), entries, model, trust_remote_code, padded)
