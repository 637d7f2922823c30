#!/bin/bash
# transformers do not open embeddings that compressed-tensors has compressed.
#
# Versions: compressed-tensors 0.20.0, transformers 5.23.0, torch 2.13.0, on a CPU.
#
# Expected: a scheme whose target is Embedding is one that compressed-tensors accepts, and its model computes with it. So
# the folder that it saves opens in transformers, as one with Linear does.
#
# Seen: the compressor packs the embeddings (weight_packed, weight_scale, weight_shape) and writes the folder. When it is
# opened, AttributeError: 'Embedding' object has no attribute 'weight'. It is transformers' own drawing of missing
# weights, which knows embeddings by their class. The head does not matter: tied or apart, it ends the same.
#
# How: a Llama of one block, 8 bits, a scale for every row, of its linears and of its embeddings, saved and opened again.
#
# Output seen:
#   Linear, head apart: opens
#   Linear, head tied: opens
#   Embedding, head apart: AttributeError: 'Embedding' object has no attribute 'weight'
#   Embedding, head tied: AttributeError: 'Embedding' object has no attribute 'weight'
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 numpy==2.4.6 compressed-tensors==0.20.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)


def opened(target, tied):
    """What becomes of a model whose modules of one class are compressed."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=[target], weights=weights)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 127
    folder = f"{target}-{tied}"
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "opens"


seen = {(target, tied): opened(target, tied) for target in ("Linear", "Embedding") for tied in (False, True)}
for (target, tied), what in seen.items():
    print(f"{target}, head {'tied' if tied else 'apart'}: {what}")
wrong = "AttributeError: 'Embedding' object has no attribute 'weight'"
expected = {one: "opens" if one[0] == "Linear" else wrong for one in seen}
print("as described" if seen == expected else "not as described")
raise SystemExit(seen != expected)
PYTHON
