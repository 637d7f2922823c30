"""Time and peak memory of opening a coded folder, against opening the dense model, all in one run.

    python evals/opening.py [--layers 8] [--hidden 2048 --ffn 8192 --vocab 32000] [--bits 2.5] [--out FILE.json]

A random Llama-shaped model in bfloat16, whose linears are rounded to steps of a size that gives about so many bits and
written as coded parts; nothing is calibrated, for neither bytes nor speed depend on which integers there are. Every
opening is a process of its own: its peak resident memory, and what it held before and in the end. Resident memory
counts the pages of a file that is mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import make_model, python

from llmsqueeze.formats import native
from llmsqueeze.formats.folder import output_folder
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import Coded

OPEN = """
import json, sys, time, torch
import llmsqueeze, llmsqueeze.hf
def now(what):  # not getrusage, whose peak a process has from the one that started it
    return int(open("/proc/self/status").read().split(what)[1].split()[0]) * 1024 / 1e6
torch.set_num_threads(int(sys.argv[3]))
before, start = now("VmRSS:"), time.perf_counter()
model = llmsqueeze.load(sys.argv[1], dtype=torch.bfloat16, keep_codes=sys.argv[2] == "integers")
seconds = time.perf_counter() - start
tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
print(json.dumps({"before_mb": before, "model_mb": sum(tensors.values()) / 1e6, "end_mb": now("VmRSS:"),
                  "peak_mb": now("VmHWM:"), "seconds": seconds}))
"""


def write_coded(source: Path, out: Path, bits: float) -> int:
    """The model in `source` with coded linears; how many weights these have."""
    checkpoint, entries, numel = open_checkpoint(source), {}, 0
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    with output_folder(out, len(files), 0) as output:
        for file in files:
            shard = {}
            for name in (name for name, stored in checkpoint.tensors.items() if stored.file == file):
                weight, linear = checkpoint.read(name), name.removesuffix(".weight")
                if not linear.endswith("_proj"):
                    shard[name] = weight
                    continue
                rows, cols = weight.shape
                exponent = round(16 * (float(weight.float().std().log2()) + 2.05 - bits))
                values = (weight.float() * 2.0 ** (-exponent / 16)).round()
                base, none = torch.full((rows,), exponent), torch.zeros(cols, dtype=torch.int64)
                part = Coded.from_integers(values, base, none, weight.dtype)
                shard |= native.stored_tensors(linear, [part])
                entries[linear] = {"shape": [rows, cols], "parts": [part.spec()]}
                numel += weight.numel()
            output.write_shard(shard)
        output.copy_rest(source)
        quantization = {"quant_method": native.METHOD, "format_version": native.FORMAT_VERSIONS[-1], "weights": entries}
        output.write_json("config.json", checkpoint.config | {"quantization_config": quantization})
        output.finish()
    return numel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the models are made, by default a temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense = make_model(Path(folder), args.layers, args.hidden, args.ffn, args.vocab)
        coded = Path(folder) / "coded"
        numel = write_coded(dense, coded, args.bits)
        for what, opened in (("dense", dense), ("coded", coded), ("integers", coded)):
            nbytes = sum(file.stat().st_size for file in opened.glob("*.safetensors"))
            row = json.loads(python(OPEN, str(opened), what, str(args.threads)))
            rows.append({"what": what, "coded_weights": numel, "file_mb": nbytes / 1e6, **row})
            print(" ".join(f"{key} {value:.0f}" if key != "what" else value for key, value in rows[-1].items()))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
