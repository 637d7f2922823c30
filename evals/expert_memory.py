"""Peak memory of `quantize` on one block of a large mixture of experts, against what the block takes in float32.

    python evals/expert_memory.py [--shapes qwen3-30b-a3b deepseek-v3] [--experts N] [--methods rtn gptq descent]
        [--bits 4] [--samples 2] [--seq-len 128] [--folder DIR] [--out FILE.json]

A random model of one block in bfloat16, with the widths of the published one and the demo's vocabulary, is written
tensor by tensor, under the names of the Hub's files. Every `quantize` is a process of its own, which tells its peak
resident memory; that of `quantize demo` is what Python, torch and transformers take by themselves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.files import read_json

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
        },
    ),
    "deepseek-v3": ("deepseek_v3", {"first_k_dense_replace": 0}),  # transformers' own default is that shape
}
EXPERTS = {"qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


def build(shape: str, experts: int | None, folder: Path) -> dict[str, int]:
    """Writes the model, tensor by tensor; how many experts it has, and the bytes of its block in float32."""
    kind, sizes = SHAPES[shape]
    vocabulary = read_json(MODEL_DIR / "config.json")["vocab_size"]
    changes = {"vocab_size": vocabulary, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    changes |= {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
    if experts is not None:
        changes[EXPERTS[kind]] = experts
    config = CONFIG_MAPPING[kind](**sizes | changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= stored_shapes(name, tuple(tensor.shape))
    folder.mkdir(parents=True)
    write(folder / "model.safetensors", shapes)
    config.save_pretrained(folder)
    for file in MODEL_DIR.glob("tokenizer*"):
        shutil.copy(file, folder)
    block = sum(torch.Size(size).numel() for name, size in shapes.items() if ".layers.0." in name)
    return {"experts": getattr(config, EXPERTS[kind]), "block_float32_mb": round(block * 4 / 1e6)}


def stored_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of a parameter in the Hub's files, which hold experts one by one, gate and up apart."""
    if ".experts." not in name:
        return {name: shape}
    base, _, leaf = name.rpartition(".")
    names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    size = (shape[1] // len(names), shape[2])
    return {f"{base}.{index}.{one}.weight": size for index in range(shape[0]) for one in names}


def write(file: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file of random bfloat16 tensors, of which one is in memory at a time."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    about = json.dumps(header).encode()
    about += b" " * (-len(about) % 8)
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as stream:
        stream.write(len(about).to_bytes(8, "little") + about)
        for name, shape in shapes.items():
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
            if len(shape) == 1 and "bias" in name:
                tensor.zero_()
            tensor = (tensor * shape[-1] ** -0.5 if len(shape) > 1 else tensor).bfloat16()
            stream.write(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)))


def quantize(model: str | Path, out: Path, args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The summary of `quantize`, run in a process of its own."""
    options = f"--method {method} --bits {args.bits} --native --quiet --json"
    if method != "rtn":  # which needs no text
        options += f" --calibration demo --samples {args.samples} --seq-len {args.seq_len}"
    command = [sys.executable, "-m", "llmsqueeze.cli", "quantize", str(model), *options.split()]
    command += ["--out", str(out), "--overwrite"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(out)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--experts", type=int, help="so many instead of all: the same shapes, a smaller block")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "descent"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where the models are made, by default a temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        for shape in args.shapes:
            about = build(shape, args.experts, folder / shape)
            for method in args.methods:
                alone = quantize("demo", folder / "out", args, method)["peak_memory_mb"]
                summary = quantize(folder / shape, folder / "out", args, method)
                peak = summary["peak_memory_mb"]
                row = {"shape": shape, **about, "method": method, "bits": args.bits, "seconds": summary["seconds"]}
                row |= {"peak_mb": peak, "alone_mb": alone}
                row["share"] = round(peak / about["block_float32_mb"], 3)
                row["share_above_alone"] = round((peak - alone) / about["block_float32_mb"], 3)
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
            shutil.rmtree(folder / shape)


if __name__ == "__main__":
    main()
