"""A LoRA adapter as PEFT stores it: LoRC's factors beside a base that others open.

    adapter_model.safetensors:  base_model.model.<linear>.lora_A.weight [rank, cols], .lora_B.weight [rows, rank]
    adapter_config.json:        r = lora_alpha, so that the base's weight grows by exactly B A

All linears have one rank: the smallest that servers accept and that no linear's factors exceed, filled with zeros. vLLM
accepts 8, 16, 32, 64, 128 and more, and reads no rank per linear. A linear without factors is no target. Memory: the
factors in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.parts import LowRank

FORMAT = "peft"
RANKS = (8, 16, 32, 64, 128)
BASE, ADAPTER = "base", "adapter"  # the folders in the export


def adapter_rank(ranks: Mapping[str, int]) -> int:
    """The adapter's rank. ranks: linear -> rank of its factors. Raises UnsupportedError for one that servers refuse."""
    linear = max(ranks, key=lambda name: ranks[name])
    if ranks[linear] > RANKS[-1]:
        raise UnsupportedError(
            f"the factors of {linear} have rank {ranks[linear]}; servers accept adapters of rank "
            f"{', '.join(map(str, RANKS))}"
        )
    return next(rank for rank in RANKS if rank >= ranks[linear])


def adapter_tensors(linear: str, factors: LowRank, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear's two tensors, [rank, cols] and [rows, rank]."""
    left, right = balanced(*factors.factors())
    spare = rank - left.shape[1]
    prefix = f"base_model.model.{linear}"
    return {
        f"{prefix}.lora_A.weight": torch.nn.functional.pad(right, (0, 0, 0, spare)).to(dtype).contiguous(),
        f"{prefix}.lora_B.weight": torch.nn.functional.pad(left, (0, spare)).to(dtype).contiguous(),
    }


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [rows, rank] and [rank, cols] with the same product and with components of similar size.

    Powers of two move the size from one factor to the other without loss. Without this, float16, to which a server may
    convert them, would round small components to zero.
    """
    tiny = torch.finfo(torch.float32).tiny
    max_left, max_right = left.abs().amax(dim=0).clamp(min=tiny), right.abs().amax(dim=1).clamp(min=tiny)
    power = torch.exp2(((max_right / max_left).log2() / 2).round())
    return left * power, right / power[:, None]


def how_to_load(base: str, adapter: str) -> str:
    """The lines of Python that open both, without llmsqueeze."""
    return f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
base(input_ids=base.dummy_inputs["input_ids"])  # unpacks the weights, at which PEFT looks first
model = PeftModel.from_pretrained(base, {adapter!r})"""


def adapter_config(base: str, linears: list[str], rank: int) -> dict[str, Any]:
    """`adapter_config.json`; `base` is the name of the base model."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": linears,
    }
