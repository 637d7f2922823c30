"""Parameters that the config ties to one another, and what the file has of them: either one, or both.

transformers ties two that are equal, or of which the file has one. Two that differ it leaves apart, whatever the config
says, and so do we; the config of a result then says so too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmsqueeze.model.checkpoint import Checkpoint
from llmsqueeze.model.tensors.sources import Source, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 24  # weights that are compared at a time
FLAG = "tie_word_embeddings"  # the entry of a config by which transformers decides of all ties


def settle(
    model: PreTrainedModel, sources: Mapping[str, Source], checkpoint: Checkpoint
) -> tuple[dict[str, Source], list[str]]:
    """The sources with one for each group of parameters that are tied, under the name of the one that the others are
    tied to; and the names of those that the config ties and the file has apart. Those are untied in the model."""
    settled, apart = dict(sources), []
    for alias, target in list(model.all_tied_weights_keys.items()):
        if alias not in settled:
            continue
        if target not in settled:
            settled[target] = settled.pop(alias)
        elif equal(settled[alias], settled[target], checkpoint):
            del settled[alias]
        else:
            untie(model, alias)
            apart.append(alias)
    return settled, apart


def equal(one: Source, other: Source, checkpoint: Checkpoint) -> bool:
    """Whether two parameters hold the same numbers; a few rows are in memory at a time if the file has them so."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (isinstance(one, Stored) and isinstance(other, Stored)) or not one.shape:
        return torch.equal(one.read(checkpoint), other.read(checkpoint))
    step = max(1, CHUNK // max(1, torch.Size(one.shape[1:]).numel()))
    spans = (slice(start, start + step) for start in range(0, one.shape[0], step))
    names = one.name, other.name
    return all(torch.equal(*(checkpoint.read_rows(name, rows) for name in names)) for rows in spans)


def untie(model: PreTrainedModel, alias: str) -> None:
    """Gives the parameter a place of its own in a model without weights."""
    model.all_tied_weights_keys.pop(alias)
    parent, _, leaf = alias.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf), device="meta"), requires_grad=False))


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config that ties nothing, and no part of it does."""
    parts = {key: untied_config(value) for key, value in config.items() if isinstance(value, dict) and FLAG in value}
    return {**config, **parts, FLAG: False}
