"""Dense packing of small integer codes into 32-bit words.

Element i of a row starts at bit `i * bits` of the row, least significant bit first, and can cross from one word to the
next. 32 codes take exactly `bits` words. compressed-tensors has this layout from version 0.18 on, so a portable export
renames tensors and does not pack them again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """The number of 32-bit words for `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def _cycle(bits: int) -> tuple[int, int]:
    """The least number of codes that fills whole words, and the number of these words."""
    codes = 32 // math.gcd(bits, 32)
    return codes, words(codes, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, cols] in 0 .. 2**bits - 1 (any integer dtype, bits 1 to 8) -> int32 [rows, words(cols, bits)]."""
    (rows, cols), (cycle, per) = codes.shape, _cycle(bits)
    padded = torch.nn.functional.pad(codes, (0, -cols % cycle)).reshape(rows, -1, cycle)
    packed = torch.zeros(rows, padded.shape[1], per, dtype=torch.int64, device=codes.device)
    for i in range(cycle):
        word, offset = divmod(i * bits, 32)
        value = padded[..., i].to(torch.int64)
        packed[..., word] |= value << offset & 0xFFFFFFFF
        if offset + bits > 32:
            packed[..., word + 1] |= value >> (32 - offset)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)  # the same 32 bits, as a signed word
    return packed.reshape(rows, -1)[:, : words(cols, bits)].to(torch.int32).contiguous()


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of `pack`: int32 [rows, words(cols, bits)] -> uint8 [rows, cols]."""
    rows, (cycle, per) = packed.shape[0], _cycle(bits)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % per)).reshape(rows, -1, per)
    codes = torch.empty(rows, packed.shape[1], cycle, dtype=torch.uint8, device=packed.device)
    for i in range(cycle):
        word, offset = divmod(i * bits, 32)
        value = packed[..., word] >> offset
        if offset + bits > 32:
            # the shift above repeats the sign bit: keep only the bits of this code
            value = (value & ((1 << (32 - offset)) - 1)) | (packed[..., word + 1] << (32 - offset))
        codes[..., i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :cols]
