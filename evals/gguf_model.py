"""A small Llama as a GGUF file in float16, with a tokenizer of single bytes: for evals/fuzz.py."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode


def write(folder: Path, file: Path) -> Path:
    """Writes the model of a folder as llama.cpp names its tensors; returns the file."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), "llama")
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    }
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, "ab", *(f"<{i}>" for i in range(len(letters) + 1, config["vocab_size"]))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        dtype = np.float16 if tensor.ndim == 2 else np.float32
        other = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{other}.weight", tensor.float().numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
