#!/bin/bash
# A pack-quantized checkpoint with two widths opens wrongly with CompressedTensorsConfig(dequantize=True).
#
# Versions: torch 2.13.0, transformers 5.23.0, compressed-tensors 0.20.0, on a CPU.
#
# Expected: a checkpoint may have several config groups, each with a width of its own (say attention at 4 bits and
# the MLP at 8). from_pretrained reads each linear by the group that names it, on both of its paths: the default one
# (weights stay packed until the first forward pass) and dequantize=True (weights are unpacked while loading).
#
# Seen: the default path is exact. dequantize=True reads every linear of this dense model by the FIRST group of the
# config, whichever group names it.
#   - First group narrower than the second: from_pretrained succeeds, but the linears of the second group hold wrong
#     weights, and the logits are wrong. No warning about it: the only one is the general one that the caller's
#     config only sets options of loading, which one width gets too.
#   - First group wider than the second: from_pretrained raises RuntimeError with a report of shapes that do not fit,
#     which does not tell that the width is the cause.
#   - One width for all: both paths are exact.
#
# How: a one-block Llama with random codes and scales; compressed-tensors itself writes the checkpoint. The reference
# is code * scale, computed here. "error" is the largest absolute difference.
#
# Output seen:
#   attention 4 bit, MLP 4 bit
#     default:    error attention 0.000, MLP 0.000, logits 0.000
#     dequantize: error attention 0.000, MLP 0.000, logits 0.000; prints the same as with one width
#   attention 4 bit, MLP 8 bit
#     default:    error attention 0.000, MLP 0.000, logits 0.000
#     dequantize: error attention 0.000, MLP 0.206, logits 0.590; prints the same as with one width
#   attention 3 bit, MLP 4 bit
#     default:    error attention 0.000, MLP 0.000, logits 0.000
#     dequantize: error attention 0.000, MLP 0.274, logits 0.539; prints the same as with one width
#   attention 8 bit, MLP 4 bit
#     default:    error attention 0.000, MLP 0.000, logits 0.000
#     dequantize: RuntimeError; prints more
#   attention 4 bit, MLP 3 bit
#     default:    error attention 0.000, MLP 0.000, logits 0.000
#     dequantize: RuntimeError; prints more
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
import os
import sys
import tempfile
import warnings

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
IDS = torch.arange(16)[None]
GROUP = 32
SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def write(folder, widths):
    """A checkpoint whose attention has the first width and whose MLP has the second; its dense weights and logits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    bits = {name: widths[0] if "self_attn" in name else widths[1] for name in linears}
    dense, scales = {}, {}
    for name, linear in linears.items():
        rows, columns = linear.weight.shape
        half = 2 ** (bits[name] - 1)
        codes = torch.randint(-half, half, (rows, columns // GROUP, GROUP)).float()
        scales[name] = (0.1 + 0.1 * torch.rand(rows, columns // GROUP)) / half
        dense[name] = (codes * scales[name][..., None]).reshape(rows, columns)
        linear.weight.data = dense[name].clone()
    with torch.no_grad():
        logits = model(IDS).logits

    groups = {}
    for number, width in enumerate(dict.fromkeys(widths)):
        weights = {"num_bits": width, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        groups[f"group_{number}"] = {"targets": [n for n in linears if bits[n] == width], "weights": weights}
    config = {"format": "pack-quantized", "ignore": ["lm_head"], "config_groups": groups}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name, linear in linears.items():
        linear.weight_scale.data = scales[name].clone()
        linear.weight_zero_point.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return dense, logits


def load(folder, **options):
    """The model, or the error that refuses it; and what went to standard error meanwhile, less progress bars."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        except RuntimeError as error:
            model = error
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        printed.seek(0)
        lines = printed.read().decode().splitlines()
    return model, [line for line in lines if line.strip() and "%|" not in line]


def look(folder, dense, logits, **options):
    """Errors of attention, MLP and logits, or None if refused; and what was printed."""
    model, printed = load(folder, **options)
    if isinstance(model, RuntimeError):
        return None, printed
    with torch.no_grad():
        off = (model(IDS).logits - logits).abs().max().item()
    errors = {n: (model.get_submodule(n).weight - w).abs().max().item() for n, w in dense.items()}
    parts = [max(e for n, e in errors.items() if part in n) for part in ("self_attn", "mlp")]
    return (*parts, off), printed


def text(errors):
    return "RuntimeError" if errors is None else "error attention {:.3f}, MLP {:.3f}, logits {:.3f}".format(*errors)


warnings.simplefilter("always")
wrong, usual = [], None
for widths in ((4, 4), (4, 8), (3, 4), (8, 4), (4, 3)):
    with tempfile.TemporaryDirectory() as folder:
        dense, logits = write(folder, widths)
        default, _ = look(folder, dense, logits)
        seen, printed = look(folder, dense, logits, quantization_config=CompressedTensorsConfig(dequantize=True))
    usual = printed if usual is None else usual
    said = "prints the same as with one width" if printed == usual else "prints more"
    print(f"attention {widths[0]} bit, MLP {widths[1]} bit")
    print(f"  default:    {text(default)}")
    print(f"  dequantize: {text(seen)}; {said}", flush=True)
    right = default is not None and max(default) < 1e-5
    if widths[0] == widths[1]:
        right = right and seen is not None and max(seen) < 1e-5
    elif widths[0] < widths[1]:
        right = right and seen is not None and seen[0] < 1e-5 and min(seen[1:]) > 0.05 and printed == usual
    else:
        right = right and seen is None
    if not right:
        wrong.append(widths)
print("as described" if not wrong else f"no longer as described: {wrong}")
sys.exit(bool(wrong))
PYTHON
