"""Tiny random mixtures of experts: one per way in which files and modules hold the experts' matrices."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.demo import MODEL_DIR

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases
    "llama4_text": SMALL  # transposed, all experts in one product
    | {"num_local_experts": 4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "attention_chunk_size": 16},
    "jetmoe": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "intermediate_size": 32},
    "dbrx": {  # [experts * rows, cols], the last one transposed
        "vocab_size": 512,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
}
IDS = torch.arange(3, 35)[None]


def make(name: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """A random model of a type, in float32, written with the tokenizer of the demo."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**MIXTURES[name] | changes)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / file, folder / file)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result
