#!/bin/bash
# Sound compressed-tensors checkpoints of some architectures do not open in transformers: their _init_weights reads a
# weight that is packed.
#
# Versions: torch 2.13.0, transformers 5.23.0, compressed-tensors 0.20.0, on a CPU.
#
# Expected: from_pretrained opens a pack-quantized checkpoint that compressed-tensors wrote, whatever the architecture:
# all linears are ordinary nn.Linear or subclasses of it, and every tensor is in the file.
#
# Seen: while it opens, transformers calls the model's _init_weights on modules that are loaded already. Those of
# Falcon, GPT-BigCode and NanoChat go on to a linear's .weight, which compressed-tensors has replaced by
# weight_packed, and from_pretrained ends with AttributeError. Llama and GPT-NeoX, written in the same way, open.
#
# How: random one-block models, 4 bits, groups of 32; compressed-tensors itself writes the checkpoints.
#
# Output seen:
#   llama, 7 linears: opens
#   gpt_neox, 4 linears: opens
#   falcon, 4 linears: AttributeError: 'FalconLinear' object has no attribute 'weight'
#   gpt_bigcode, 4 linears: AttributeError: 'Linear' object has no attribute 'weight'
#   nanochat, 6 linears: AttributeError: 'Linear' object has no attribute 'weight'
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0 \
    numpy==2.4.6 safetensors==0.8.0
export HF_HUB_OFFLINE=1
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -n 20 "$work/log" >&2; exit "$status"; }
import tempfile

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS = {
    "llama": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 4},
    "gpt_neox": {**SMALL, "intermediate_size": 128},
    "falcon": SMALL,
    "gpt_bigcode": {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_inner": 128, "n_positions": 64},
    "nanochat": {**SMALL, "intermediate_size": 128, "num_key_value_heads": 4},
}
OPENS = ("llama", "gpt_neox")


def write(kind, folder):
    """A 4-bit checkpoint that compressed-tensors itself writes, of a random model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).eval()
    heads = ["lm_head", "embed_out"]
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in heads]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": linears, "weights": weights}}
    config = {"format": "pack-quantized", "ignore": heads, "config_groups": groups}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name in linears:
        linear = model.get_submodule(name)
        largest = linear.weight.data.unflatten(1, (-1, 32)).abs().amax(dim=-1)
        linear.weight_scale.data = largest / 7.5
        linear.weight_zero_point.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return len(linears)


wrong = []
for kind in CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
        count = write(kind, folder)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                model(torch.arange(16)[None])
            seen = "opens"
        except AttributeError as error:
            seen = f"AttributeError: {error}"
    print(f"{kind}, {count} linears: {seen}", flush=True)
    expected = seen == "opens" if kind in OPENS else seen.endswith("object has no attribute 'weight'")
    wrong += [] if expected else [kind]
print("as described" if not wrong else f"otherwise than described: {wrong}")
raise SystemExit(bool(wrong))
PYTHON
