#!/bin/bash
# transformers open a checkpoint of a quantization method that they do not have: with random weights, at code 0.
#
# Versions: torch 2.13.0, transformers 5.23.0, on a CPU.
#
# Expected: from_pretrained refuses a folder whose quantization_config names a method that it does not have, such as
# exl3: it says which methods there are, and no model comes back.
#
# Seen: a warning that ends in "we will skip the quantization", and the model opens as a dense one. The weights that
# the file holds in the method's own tensors are drawn at random, others at every opening, so that two openings of one
# folder give different logits. A table on stderr calls them MISSING. There is no error, also with a strict
# ignore_mismatched_sizes=False and with use_safetensors=True, and a benchmark that hides warnings measures noise.
#
# How: a random one-block Llama; one linear is stored under the tensor names of exl3 instead of "weight".
#
# Output seen:
#   exl3: opened without an error, up_proj is a Linear with a dense weight
#   the same folder opened twice: its logits differ
#   said: Unknown quantization type, got exl3
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 numpy==2.4.6 safetensors==0.8.0
export HF_HUB_OFFLINE=1
cd "$work"
status=0
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || status=$?
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder, linear = Path("folder"), "model.layers.0.mlp.up_proj"
torch.manual_seed(0)
small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=4, intermediate_size=128)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
del tensors[f"{linear}.weight"]
tensors[f"{linear}.trellis"] = torch.zeros(4, 8, 64, dtype=torch.int16)
tensors[f"{linear}.suh"] = torch.ones(64, dtype=torch.float16)
tensors[f"{linear}.svh"] = torch.ones(128, dtype=torch.float16)
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "exl3", "bits": 4.0, "head_bits": 16}
(folder / "config.json").write_text(json.dumps(config))

given = {"dtype": torch.float32, "ignore_mismatched_sizes": False, "use_safetensors": True}
models = [AutoModelForCausalLM.from_pretrained(folder, **given).eval() for _ in range(2)]
module = models[0].get_submodule(linear)
print(f"exl3: opened without an error, up_proj is a {type(module).__name__} with a dense weight")
with torch.no_grad():
    first, second = (model(torch.arange(16)[None]).logits for model in models)
differ = not torch.allclose(first, second, atol=1e-4)
print(f"the same folder opened twice: its logits {'differ' if differ else 'agree'}")
raise SystemExit(not (differ and type(module) is torch.nn.Linear))
PYTHON
said=$(grep -o "Unknown quantization type, got exl3" "$work/log" | head -n 1 || true)
echo "said: ${said:-nothing}"
if [ "$status" -eq 0 ] && [ -n "$said" ]; then
    echo "as described"
else
    echo "otherwise than described"
    tail -n 20 "$work/log" >&2
    exit 1
fi
