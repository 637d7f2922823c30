"""A product of two thin factors: low-rank compensation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmsqueeze.parts.grid import Layout, Spec, dtype_name


@dataclass(frozen=True)
class LowRank:
    """A product of two 8-bit factors: left int8 [rows, rank], right int8 [rank, cols]; scale [rank] of both."""

    kind: ClassVar[str] = "lowrank"
    left: Tensor
    right: Tensor
    scale: Tensor

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, dtype: torch.dtype) -> LowRank:
        """Rounds float factors [rows, rank] and [rank, cols]; `dtype`: of the scale in the file."""
        tiny = torch.finfo(torch.float32).tiny
        max_left, max_right = left.abs().amax(dim=0).clamp(min=tiny), right.abs().amax(dim=1).clamp(min=tiny)
        # the scale of codes up to 1: the scale of codes up to 127 would be too small for float16
        scale = (max_left * max_right).clamp(max=torch.finfo(dtype).max).to(dtype)
        codes = left / max_left * 127, right / max_right[:, None] * 127
        return cls(codes[0].round().to(torch.int8), codes[1].round().to(torch.int8), scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """float32 [rows, rank] and [rank, cols]; the second includes the scale."""
        return self.left.float(), self.right.float() * (self.scale.float() / 127**2)[:, None]

    def dense(self) -> Tensor:
        left, right = self.factors()
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "scale": self.scale}

    def spec(self) -> Spec:
        return lowrank_spec(len(self.scale), self.scale.dtype)

    @staticmethod
    def layout(shape: tuple[int, int], spec: Spec) -> Layout:
        (rows, cols), rank = shape, spec["rank"]
        dtype = getattr(torch, spec["dtype"])
        return {
            "left": ((rows, rank), torch.int8),
            "right": ((rank, cols), torch.int8),
            "scale": ((rank,), dtype),
        }

    @classmethod
    def restore(cls, _shape: tuple[int, int], _spec: Spec, tensors: Mapping[str, Tensor]) -> LowRank:
        return cls(tensors["left"], tensors["right"], tensors["scale"])


def lowrank_spec(rank: int, dtype: torch.dtype) -> Spec:
    """The spec of a `LowRank` part; `dtype`: of its scale."""
    return {"part": LowRank.kind, "rank": rank, "dtype": dtype_name(dtype)}
