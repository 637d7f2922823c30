#!/bin/bash
# A model that was opened with a key_mapping is saved under the names of the file it came from, not under its own; the
# saved folder then opens with new random weights.
#
# Versions: torch 2.13.0, transformers 5.23.0, on a CPU.
#
# Expected: from_pretrained(..., key_mapping=...) puts the tensors of a file with other names where they belong.
# save_pretrained then writes the names of the model, as it does for every other model, and from_pretrained opens the
# result without a mapping.
#
# Seen: save_pretrained turns the mapping around. The new file has the old names, or the pattern itself: of a pattern
# that ends in `$`, names that end in `$`. from_pretrained without the mapping finds the weights missing, draws new ones
# and raises nothing.
#
# How: a random Llama of one block whose output projection is called `out` in the file.
#
# Output seen:
#   pattern self_attn\.out\.weight$: opened right; saved as model.layers.0.self_attn.out.weight$; opened again: missing
#   pattern self_attn\.out\.weight: opened right; saved as model.layers.0.self_attn.out.weight; opened again: missing
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
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -n 20 "$work/log" >&2; exit "$status"; }
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

OWN, OTHER = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.out.weight"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
config = LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
with tempfile.TemporaryDirectory() as folder:
    source, saved = Path(folder, "source"), Path(folder, "saved")
    LlamaForCausalLM(config).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    weight = tensors.pop(OWN)
    save_file(tensors | {OTHER: weight}, source / "model.safetensors", {"format": "pt"})
    as_described = []
    for pattern in (r"self_attn\.out\.weight$", r"self_attn\.out\.weight"):
        model = AutoModelForCausalLM.from_pretrained(source, key_mapping={pattern: "self_attn.o_proj.weight"})
        right = torch.equal(model.get_parameter(OWN), weight)
        model.save_pretrained(saved)
        (name,) = (name for name in load_file(saved / "model.safetensors") if "self_attn.o" in name)
        again, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
        missing = OWN in info["missing_keys"] and not torch.equal(again.get_parameter(OWN), weight)
        print(
            f"pattern {pattern}: {'opened right' if right else 'opened wrong'}; saved as {name}; "
            f"opened again: {'missing' if missing else 'there'}",
            flush=True,
        )
        as_described.append(right and missing and name == OTHER + ("$" if pattern.endswith("$") else ""))
print("as described" if all(as_described) else "otherwise than described")
raise SystemExit(not all(as_described))
PYTHON
