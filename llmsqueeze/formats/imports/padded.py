"""Folders of compressed-tensors up to 0.17, whose codes of 3, 5, 6 and 7 bits lie padded in words.

A word of 32 bits has `32 // bits` whole codes there, the first in its lowest bits, and its other bits are 0. From
version 0.18 on codes lie densely, across words. Nothing in a folder says which it is but the shape of its tensors;
newer versions read the older ones wrongly, without an error. Here they are packed again as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmsqueeze.formats.entries import Entry
from llmsqueeze.model.checkpoint import Checkpoint, StoredTensor
from llmsqueeze.parts import Affine, bitpack, spec_grid


def padded_words(count: int, bits: int) -> int:
    """The number of words for `count` codes, none of which crosses from one to the next."""
    return -(-count // (32 // bits))


def unpadded(packed: Tensor, bits: int, cols: int) -> Tensor:
    """int32 [rows, padded_words(cols, bits)] -> the same codes packed densely, int32 [rows, words(cols, bits)]."""
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return bitpack.pack(codes.flatten(1)[:, :cols].to(torch.uint8), bits)


def packed_again(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> Checkpoint:
    """The checkpoint with codes that lie padded as if they lay densely; itself if there are none."""
    tensors = dict(checkpoint.tensors)
    for linear in padded_linears(checkpoint, entries):
        entry = entries[linear]
        name, (rows, cols), bits = entry.names[0]["codes"], entry.shape, spec_grid(entry.specs[0]).bits
        stored, join = checkpoint.tensors[name], partial(_only, bits=bits, cols=cols)
        shape = rows, bitpack.words(cols, bits)
        tensors[name] = StoredTensor(stored.file, shape, stored.dtype, (name,), join, stored.nbytes)
    return replace(checkpoint, tensors=tensors) if tensors != checkpoint.tensors else checkpoint


def padded_linears(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> list[str]:
    """The compressed linears whose codes lie padded in the file."""
    found = []
    for linear, entry in entries.items():
        if len(entry.specs) != 1 or entry.specs[0]["part"] != Affine.kind or "codes" not in entry.names[0]:
            continue
        stored, bits, cols = checkpoint.tensors[entry.names[0]["codes"]], spec_grid(entry.specs[0]).bits, entry.shape[1]
        dense, wide = bitpack.words(cols, bits), padded_words(cols, bits)
        if not stored.pieces and dense != wide and stored.shape == (entry.shape[0], wide):
            found.append(linear)
    return found


def _only(pieces: Sequence[Tensor], bits: int, cols: int) -> Tensor:
    (packed,) = pieces
    return unpadded(packed, bits, cols)
