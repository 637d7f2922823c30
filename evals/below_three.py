"""Two to three bits: RTN, GPTQ, dual binarization and the budget, each before and after distillation, at equal bytes.

    python evals/below_three.py MODEL CALIBRATION EVAL_TEXT [--sizes 2.25 2.5 3.25] [--steps 100] [--out FILE.json]

Every row is a real `quantize`, a real `distill` where it says so (same steps, same text, the teacher's answers shared)
and a real `eval`. Group sizes are chosen so that all rows of a size take about the same bits per weight.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from methods import add_arguments, recipe_of

from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.text.source import evaluation_text

DISTILLED: dict[str, dict[str, Any]] = {
    "kd": {},
    "dad": {"loss": "dad"},
    "kd with codes": {"train": "scales,norms,lowrank,codes"},
    "blockwise": {"blockwise": True},
    "blockwise with codes": {"blockwise": True, "train": "scales,norms,lowrank,codes"},
}


def rows(bits: float) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Name -> what `quantize` is told, and how the result is distilled, for a size in bits per weight."""
    width = int(bits)
    group = {0.25: 64, 0.5: 32}[bits - width]
    plain = {"bits": width, "group_size": group}
    # two scales a group: 2 + 32 / group bits
    dual = {"method": "dbllm", "group_size": {2.25: 128, 2.5: 64, 3.25: 26}[bits]}
    return {
        f"rtn {width} bit g{group}": ({"method": "rtn", **plain}, ["kd"]),
        f"gptq {width} bit g{group}": ({"method": "gptq", "inputs": "original", **plain}, ["kd"]),
        f"descent {width} bit g{group}": ({"method": "descent", **plain}, ["kd"]),
        "dual binary as published": ({**dual, "quantizer": "rtn"}, ["kd", "dad"]),
        "dual binary": (dual, ["kd", "dad", "kd with codes", "blockwise", "blockwise with codes"]),
        "auto": ({"method": "budget", "bits": bits}, ["kd", "dad", "kd with codes"]),
        "auto, dual allowed": ({"method": "budget", "bits": bits, "dual": True}, []),
        "auto, ranks bought": ({"method": "budget", "bits": bits, "lorc_rank": "auto"}, []),
        "auto, rank 1": ({"method": "budget", "bits": bits, "lorc_rank": 1}, ["kd"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2.25, 2.5, 3.25])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="regular expression that the names of rows must match")
    args = parser.parse_args()
    hush()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.sizes:
            for name, (settings, distillations) in rows(bits).items():
                wanted = [kind for kind in distillations if re.search(args.only, f"{name} + {kind}")]
                if not wanted and not re.search(args.only, name):
                    continue
                folder = Path(scratch) / "student"
                summary = compress(args, settings, folder)
                results.append(report(args, bits, name, folder, summary))
                for kind in wanted:
                    out = Path(scratch) / "distilled"
                    taught = teach(args, folder, out, Path(scratch) / "teacher", DISTILLED[kind])
                    results.append(report(args, bits, f"{name} + {kind}", out, summary, taught))
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1) + "\n")


def compress(args: argparse.Namespace, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return quantize(args.model, recipe_of(settings, args), folder, overwrite=True).as_dict()


def teach(args: argparse.Namespace, folder: Path, out: Path, cache: Path, settings: dict[str, Any]) -> dict[str, Any]:
    text = {"calibration": args.calibration, "samples": 400, "seq_len": args.window}
    steps = args.steps if not settings.get("blockwise") else 200
    given = make_distillation({"steps": steps, "batch_size": 4, "lr": 5e-3, **text, **settings})
    return distill(str(folder), args.model, given, out, teacher_cache=cache, overwrite=True)


def report(
    args: argparse.Namespace,
    bits: float,
    name: str,
    folder: Path,
    summary: dict[str, Any],
    taught: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One row: what `eval` says of the folder."""
    text = evaluation_text(args.text, args.model)
    scores = evaluate(str(folder), baseline=args.model, text=text, limit=args.limit, window=args.window).as_dict()
    row = {
        "model": Path(args.model).name,
        "size": bits,
        "name": name,
        "bits_per_weight": summary["bits_per_weight"],
        "seconds": summary["seconds"] + (taught["seconds"] if taught else 0.0),
        "held_back": [taught["kl_before"], taught["kl_after"]] if taught else None,
        **{key: scores[key] for key in ("perplexity", "nll_difference", "nll_difference_stderr", "kl_mean", "kl_p99")},
    }
    print(
        f"{bits:4} {name:44} {row['bits_per_weight']:6.3f} bpw  nll +{row['nll_difference']:.4f} "
        f"± {row['nll_difference_stderr']:.4f}  KL {row['kl_mean']:.4f}  {row['seconds']:.0f} s",
        flush=True,
    )
    return row


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
