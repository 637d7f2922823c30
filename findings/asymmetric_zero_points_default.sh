#!/bin/bash
# An asymmetric pack-quantized checkpoint does not open by from_pretrained's default path.
#
# Versions: torch 2.13.0, transformers 5.23.0, compressed-tensors 0.20.0, on a CPU.
#
# Expected: a checkpoint that compressed-tensors writes ("symmetric": false, with zero points) opens with
# AutoModelForCausalLM.from_pretrained(folder), like a symmetric one, and gives the logits of its dense weights.
#
# Seen: with one scale a group or one a row, from_pretrained raises RuntimeError: its report lists every
# weight_zero_point as MISMATCH. The writer packs zero points along the rows into int32, [rows * bits / 32, groups];
# the empty model that default loading builds keeps them unpacked, [rows, groups]. ignore_mismatched_sizes=True, which
# the message names, opens the model, but its first forward pass raises ValueError. The same folder opens exactly with
# CompressedTensorsConfig(dequantize=True), so the file itself is sound. Symmetric checkpoints open both ways.
#
# How: a one-block Llama with random 4-bit codes, scales and zero points; compressed-tensors itself writes the
# checkpoint. The reference is (code - zero point) * scale, computed here. "error" is the logits' largest absolute
# difference.
#
# Output seen:
#   symmetric, one scale a group
#     default:    error 0.000
#     ignoring:   error 0.000
#     dequantize: error 0.000
#   asymmetric, one scale a group
#     zero points of up_proj (128 rows) on disk: torch.int32 [16, 2]
#     default:    from_pretrained raises RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an
#       error. For details look at the above report!
#     ignoring:   forward raises ValueError: Expected torch.int32 but got torch.int8, Aborting unpack.
#     dequantize: error 0.000
#   asymmetric, one scale a row
#     zero points of up_proj (128 rows) on disk: torch.int32 [16, 1]
#     default:    from_pretrained raises RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an
#       error. For details look at the above report!
#     ignoring:   forward raises ValueError: Expected torch.int32 but got torch.int8, Aborting unpack.
#     dequantize: error 0.000
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
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

IDS = torch.arange(16)[None]
BITS, HALF = 4, 8
SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def write(folder, symmetric, strategy):
    """A checkpoint of 4-bit codes, and the logits of the dense weights that they stand for."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    scales, zeros = {}, {}
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        groups = columns // 32 if strategy == "group" else 1
        codes = torch.randint(-HALF, HALF, (rows, groups, columns // groups))
        scales[name] = (0.1 + 0.1 * torch.rand(rows, groups)) / HALF
        zeros[name] = torch.randint(-HALF, HALF, (rows, groups)) * (not symmetric)
        weight = (codes - zeros[name][..., None]) * scales[name][..., None]
        linear.weight.data = weight.reshape(rows, columns)
    with torch.no_grad():
        logits = model(IDS).logits

    weights = {"num_bits": BITS, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = 32
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"format": "pack-quantized", "ignore": ["lm_head"], "config_groups": groups}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name, linear in linears.items():
        linear.weight_scale.data = scales[name].clone()
        linear.weight_zero_point.data = zeros[name].to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return logits


def error(folder, logits, **options):
    """The logits' largest difference, or what was raised, and where."""
    try:
        where = "from_pretrained"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        where = "forward"
        with torch.no_grad():
            return (model(IDS).logits - logits).abs().max().item()
    except (RuntimeError, ValueError) as raised:
        return f"{where} raises {type(raised).__name__}: {raised}"


def exact(found):
    return isinstance(found, float) and found < 1e-5


def text(found):
    return f"error {found:.3f}" if isinstance(found, float) else found


wrong = []
for symmetric, strategy in ((True, "group"), (False, "group"), (False, "channel")):
    with tempfile.TemporaryDirectory() as folder:
        logits = write(folder, symmetric, strategy)
        stored = load_file(Path(folder) / "model.safetensors").get("model.layers.0.mlp.up_proj.weight_zero_point")
        default = error(folder, logits)
        ignoring = error(folder, logits, ignore_mismatched_sizes=True)
        dequantized = error(folder, logits, quantization_config=CompressedTensorsConfig(dequantize=True))
    print(f"{'symmetric' if symmetric else 'asymmetric'}, one scale a {'group' if strategy == 'group' else 'row'}")
    if stored is not None:
        print(f"  zero points of up_proj (128 rows) on disk: {stored.dtype} {list(stored.shape)}")
    print(f"  default:    {text(default)}")
    print(f"  ignoring:   {text(ignoring)}")
    print(f"  dequantize: {text(dequantized)}")
    if symmetric:
        right = exact(default) and exact(ignoring)
    else:
        right = str(default).startswith("from_pretrained raises RuntimeError: You set `ignore_mismatched_sizes`")
        right = right and str(ignoring).startswith("forward raises ValueError")
    if not right or not exact(dequantized):
        wrong.append((symmetric, strategy))
print("as described" if not wrong else f"no longer as described: {wrong}")
sys.exit(bool(wrong))
PYTHON
