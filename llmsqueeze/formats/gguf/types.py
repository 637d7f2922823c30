"""llama.cpp's types of one scale a block of 32 weights, and what of ours they hold exactly.

    weight = scale * level      scale: half precision; level: a signed integer of 4, 5 or 8 bits

    Q4_0   18 bytes: scale, 16 bytes of levels + 8, elements j and j + 16 in the low and high half of byte j
    Q5_0   22 bytes: scale, 32 bits with the fifth bit of each level + 16, 16 bytes of the other four
    Q8_0   34 bytes: scale, 32 signed bytes

Source: the decoders of the package `gguf` (gguf/quants.py), by which the tests check every byte. Levels of ours on a
symmetric grid are such levels; half-integer ones are odd multiples of half the scale, and those with a zero are
differences of codes and zeros. A group of ours may span several blocks, which then repeat its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmsqueeze.parts import Affine, Part, bitpack

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A type. bits: of a level; nbytes: of a block; file_type: llama.cpp's number of a file that is mostly of it."""

    name: str
    bits: int
    nbytes: int
    file_type: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / BLOCK


Q4_0, Q5_0, Q8_0 = BlockType("Q4_0", 4, 18, 2), BlockType("Q5_0", 5, 22, 8), BlockType("Q8_0", 8, 34, 7)
TYPES = (Q4_0, Q5_0, Q8_0)


@dataclass(frozen=True)
class Levels:
    """A weight as signed levels, int16 [rows, cols], and a half-precision scale for every block, [rows, blocks]."""

    levels: Tensor
    scale: Tensor

    @property
    def type(self) -> BlockType | None:
        """The smallest type that holds the levels."""
        low, high = int(self.levels.min()), int(self.levels.max())
        return next((one for one in TYPES if -(1 << (one.bits - 1)) <= low and high < 1 << (one.bits - 1)), None)

    def dense(self) -> Tensor:
        """float32 [rows, cols], as llama.cpp decodes it."""
        return self.levels.float() * self.scale.float().repeat_interleave(BLOCK, dim=1)


def levels_of(weight_parts: Sequence[Part], shape: tuple[int, int]) -> Levels | None:
    """The sum of a weight's parts as levels; None if these types do not hold it exactly.

    Parts on grids that share no row are held, in groups of whole blocks, if their scales are half-precision numbers.
    """
    rows, cols = shape
    if cols % BLOCK or not all(isinstance(part, Affine) for part in weight_parts):
        return None
    levels, scale = torch.zeros(shape, dtype=torch.int16), torch.zeros(rows, cols // BLOCK, dtype=torch.float16)
    for part in weight_parts:
        assert isinstance(part, Affine), "all of them are"
        if part.grid.width(cols) % BLOCK:
            return None
        chosen = slice(None) if part.rows is None else bitpack.unpack(part.rows[None], 1, rows)[0].bool()
        own, per_group = _signed(part)
        per_block = part.grid.expand(per_group, cols)[:, ::BLOCK]
        exact = per_block.half()
        if not torch.equal(exact.float(), per_block):
            return None
        levels[chosen], scale[chosen] = own, exact
    held = Levels(levels, scale)
    return held if held.type is not None else None


def _signed(part: Affine) -> tuple[Tensor, Tensor]:
    """int16 [n, cols] and float32 [n, groups], whose products are the weights of the part's rows."""
    codes, scale, cols = part.symbols().to(torch.int16), part.scale.float(), part.shape[1]
    if part.zero is not None:
        zero = bitpack.unpack(part.zero, part.grid.bits, len(codes)).T.to(torch.int16)
        return codes - part.grid.expand(zero, cols), scale
    if part.grid.half:
        return 2 * codes - part.grid.max_code, scale / 2
    return codes - int(part.grid.fixed_zero), scale


def encode(held: Levels, kind: BlockType) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]: the blocks of the weight, one after the other."""
    rows, cols = held.levels.shape
    levels = held.levels.reshape(rows, cols // BLOCK, BLOCK).numpy()
    scale = held.scale.numpy()[..., None].view(np.uint8)
    data: NDArray[np.uint8]
    if kind is Q8_0:
        data = levels.astype(np.int8).view(np.uint8)
    else:
        codes = (levels + (1 << (kind.bits - 1))).astype(np.uint8)
        first, second = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        data = ((first & 15) | ((second & 15) << 4)).astype(np.uint8)
        if kind is Q5_0:
            data = np.concatenate([np.packbits(codes >> 4, axis=-1, bitorder="little"), data], axis=-1)
    return np.concatenate([scale, data], axis=-1).reshape(rows, -1)
