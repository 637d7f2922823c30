"""Peak memory of `quantize` against depth, and against an ordinary backward pass, all measured in one run.

    python evals/memory.py [--layers 8 16 24] [--hidden 2048 --ffn 8192 --vocab 32000] [--heads 32] [--kv-heads 32]
        [--method gwq] [--bits 3] [--samples 16] [--seq-len 512] [--device cpu] [--out FILE.json]

Random Llama-shaped models in bfloat16. Every measurement is a process of its own: its peak resident memory, and on a
CUDA device also the peak of what torch allocated there. The ordinary way is `from_pretrained` in bfloat16 and one
backward pass over one sample.

A whole run takes minutes per block on a few cores. `--stop-after N` interrupts `quantize` when N blocks are written and
reports the peak until then: the measuring sweeps are over by that time, and all blocks have the same shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmsqueeze.demo import MODEL_DIR

MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
folder, layers, hidden, ffn, vocab, heads, kv_heads = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocab,
                     num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048)
torch.set_default_dtype(torch.bfloat16)
AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="1GB")
"""

ORDINARY = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from llmsqueeze.memory import peak_device_memory_mb, peak_memory_mb
device = sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(device)
tokens = torch.randint(0, 200, (1, int(sys.argv[3])), device=device)
model(input_ids=tokens, labels=tokens).loss.backward()
print(json.dumps({"peak_memory_mb": peak_memory_mb(), "peak_device_memory_mb": peak_device_memory_mb()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--heads", type=int, help="by default one for 64 of the hidden size")
    parser.add_argument("--kv-heads", type=int, help="by default as many as heads")
    parser.add_argument("--method", default="gwq")
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the models are made, by default a temporary folder")
    parser.add_argument("--stop-after", type=int, metavar="N", help="interrupt quantize after N blocks")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for layers in args.layers:
            row = measure(args, Path(folder), layers)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(args: argparse.Namespace, folder: Path, layers: int) -> dict[str, object]:
    heads = (args.heads, args.kv_heads)
    model, out = make_model(folder, layers, args.hidden, args.ffn, args.vocab, *heads), folder / f"compressed-{layers}"
    ordinary = json.loads(python(ORDINARY, str(model), args.device, str(args.seq_len)))
    print(f"{layers} layers, ordinary: {ordinary}", file=sys.stderr, flush=True)
    nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    options = (
        f"--bits {args.bits} --method {args.method} --calibration demo --samples {args.samples} "
        f"--seq-len {args.seq_len} --device {args.device} --quiet --json"
    )
    command = [sys.executable, "-m", "llmsqueeze.cli", "quantize", str(model), *options.split(), "--out", str(out)]
    ours = json.loads(run(command)) if args.stop_after is None else run_until(command, out, args.stop_after)
    shutil.rmtree(model)
    shutil.rmtree(out, ignore_errors=True)
    return {
        "method": args.method,
        "layers": layers,
        "blocks_compressed": layers if args.stop_after is None else args.stop_after,
        "model_mb": round(nbytes / 1e6, 1),
        "quantize_mb": ours["peak_memory_mb"],
        "ordinary_backward_mb": ordinary["peak_memory_mb"],
        "ratio": round(ours["peak_memory_mb"] / ordinary["peak_memory_mb"], 3),
        "quantize_device_mb": ours["peak_device_memory_mb"],
        "ordinary_backward_device_mb": ordinary["peak_device_memory_mb"],
        "quantize_seconds": ours["seconds"],
    }


def make_model(
    folder: Path, layers: int, hidden: int, ffn: int, vocab: int, heads: int | None = None, kv_heads: int | None = None
) -> Path:
    """A random model of that shape, with the demo's tokenizer."""
    model, heads = folder / f"random-{layers}", heads or hidden // 64
    python(MAKE, str(model), *map(str, (layers, hidden, ffn, vocab, heads, kv_heads or heads)))
    for file in MODEL_DIR.glob("tokenizer*"):
        shutil.copy(file, model)
    return model


def run_until(command: list[str], out: Path, blocks: int) -> dict[str, float]:
    """Runs quantize until it has written `blocks` blocks, and reads the kernel's account of its peak (Linux)."""
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            written = [
                f for f in out.with_name(out.name + ".partial").glob("model-*") if not f.name.startswith("model-00001")
            ]
            if len(written) >= blocks:
                status = Path(f"/proc/{process.pid}/status").read_text()
                process.kill()  # SIGINT is ignored by what a shell started in the background
                peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
                seconds = round(time.monotonic() - start, 1)
                return {"peak_memory_mb": round(peak * 1024 / 1e6, 1), "peak_device_memory_mb": 0.0, "seconds": seconds}
            time.sleep(0.5)
    raise RuntimeError(f"quantize ended before {blocks} blocks were written")


def python(code: str, *arguments: str) -> str:
    return run([sys.executable, "-c", code, *arguments])


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "{}"


if __name__ == "__main__":
    main()
