#!/bin/bash
# A model in fine-grained fp8 that is opened with dequantize=True is saved in fp8 again.
#
# Versions: transformers 5.23.0, torch 2.13.0, on a CPU.
#
# Expected: FineGrainedFP8Config(dequantize=True) gives a model with ordinary weights. save_pretrained writes what the
# model has, as it does for every other model with ordinary weights, so that programs without fp8 can open the folder.
#
# Seen: every weight in memory is bfloat16. But save_pretrained rounds all matrices to float8_e4m3fn again, embeddings and
# head too, which were not fp8 before, and writes a weight_scale_inv beside each: the model keeps the conversions by which
# it was read (_weight_conversions), and they are reversed. config.json says nothing of fp8, so transformers open the
# folder as an ordinary model and take the numbers of float8 without their scales for the weights. The scales are listed
# as unexpected tensors; there is no error.
#
# How: a Llama of one block, its linears stored by hand as fp8 in blocks of 32 x 32, is opened with dequantize=True, saved,
# and opened again.
#
# Output seen:
#   in memory: bfloat16, relative distance to the original 0.03
#   saved: float8_e4m3fn, 9 tensors weight_scale_inv
#   opened again without a word of fp8: relative distance to the original 6.19e+03
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 numpy==2.4.6 accelerate==1.14.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

BLOCK = 32
NAME = "model.layers.0.mlp.up_proj.weight"
torch.manual_seed(0)
sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained("in")
tensors = load_file("in/model.safetensors")
original = tensors[NAME].float()
for name in [name for name in tensors if "proj" in name]:
    rows, cols = tensors[name].shape
    tiles = tensors[name].float().reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    tensors[name], tensors[f"{name}_scale_inv"] = codes.reshape(rows, cols), scale
save_file(tensors, "in/model.safetensors", {"format": "pt"})
about = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
config = json.loads(Path("in/config.json").read_text())
Path("in/config.json").write_text(json.dumps(config | {"quantization_config": about}))


def distance(weight):
    return float((weight.float() - original).norm() / original.norm())


how = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
model = AutoModelForCausalLM.from_pretrained("in", quantization_config=how, dtype=torch.bfloat16)
weight = model.get_parameter(NAME)
memory = distance(weight)
print(f"in memory: {str(weight.dtype)[6:]}, relative distance to the original {memory:.2f}")
model.save_pretrained("out")
saved = load_file("out/model.safetensors")
scales = sum(name.endswith("_scale_inv") for name in saved)
print(f"saved: {str(saved[NAME].dtype)[6:]}, {scales} tensors weight_scale_inv")
told = "quantization_config" in json.loads(Path("out/config.json").read_text())
again = distance(AutoModelForCausalLM.from_pretrained("out", dtype=torch.bfloat16).get_parameter(NAME))
print(f"opened again {'as fp8' if told else 'without a word of fp8'}: relative distance to the original {again:.3g}")
good = weight.dtype == torch.bfloat16 and memory < 0.05
good = good and saved[NAME].dtype == torch.float8_e4m3fn and scales == 9 and not told and again > 1000
print("as described" if good else "not as described")
raise SystemExit(not good)
PYTHON
