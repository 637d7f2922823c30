"""Peak memory of `distill`, as a whole and block by block, against holding both models, all measured in one run.

    python evals/distill_memory.py [--layers 8 16] [--hidden 1024 --ffn 4096 --vocab 32000] [--out FILE.json]

Random Llama-shaped models in bfloat16, 2-bit codes by round to nearest (the memory does not depend on how they were
found); two steps on 8 samples of 256 tokens, for every block where blockwise. Every measurement is a process of its
own. The ordinary way is both models opened in bfloat16, the original's answers in memory, and one backward pass
through a dense student over one sample.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import make_model, python, run

ORDINARY = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from llmsqueeze.memory import peak_memory_mb
teacher, student = (AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16) for _ in range(2))
tokens = torch.randint(0, 200, (1, 256))
with torch.no_grad():
    wanted = teacher(input_ids=tokens).logits.float().softmax(-1)
log_probs = student(input_ids=tokens).logits.float().log_softmax(-1)
(-(wanted * log_probs).sum(-1).mean()).backward()
print(json.dumps({"peak_memory_mb": peak_memory_mb()}))
"""

TEXT = "--calibration demo --samples 8 --held-back 2 --seq-len 256 --steps 2 --batch-size 2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in args.layers:
            rows.append(measure(args, Path(folder), layers))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(args: argparse.Namespace, folder: Path, layers: int) -> dict[str, Any]:
    model, student = make_model(folder, layers, args.hidden, args.ffn, args.vocab), folder / f"student-{layers}"
    command = [sys.executable, "-m", "llmsqueeze.cli"]
    run([*command, "quantize", str(model), "--method", "rtn", "--bits", "2", "--out", str(student), "--json", "-q"])
    peaks = {"ordinary": json.loads(python(ORDINARY, str(model)))["peak_memory_mb"]}
    for name, options in {"whole": [], "blockwise": ["--blockwise"]}.items():
        text = TEXT.split()
        out = ["--out", str(folder / "out"), "--overwrite", "--json", "-q"]
        done = run([*command, "distill", str(student), "--teacher", str(model), *text, *options, *out])
        peaks[name] = json.loads(done)["peak_memory_mb"]
    sizes = [sum(file.stat().st_size for file in one.glob("*.safetensors")) / 1e6 for one in (model, student)]
    shutil.rmtree(model)
    return {
        "layers": layers,
        "model_mb": round(sizes[0], 1),
        "student_mb": round(sizes[1], 1),
        **{f"{name}_mb": peak for name, peak in peaks.items()},
        "ratio_whole": round(peaks["whole"] / peaks["ordinary"], 3),
        "ratio_blockwise": round(peaks["blockwise"] / peaks["ordinary"], 3),
    }


if __name__ == "__main__":
    main()
