"""What a plan promises against what then happens: bytes, peak memory, time, loss; and plans from fewer samples.

    python evals/prediction.py MODEL CALIBRATION EVAL_TEXT [--sizes 2.5 3.5] [--out FILE.json]

For every size `llmsqueeze plan` and then `llmsqueeze quantize --plan`, each a process of its own, as a user runs them.
Then the same budget planned from 16 and from 128 samples: the share of rows that get the same width, and what the plan
from 16 costs by the measurements of 128.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from methods import add_arguments

from llmsqueeze.allocation.prediction import predicted
from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.forecast.needs import KINDS, seconds
from llmsqueeze.compress.job import open_job
from llmsqueeze.compress.reuse import given_plan, open_plan
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.measure.profile import Profile, load
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.text.source import evaluation_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--sizes", nargs="+", type=float, default=[2.5, 3.5])
    args = parser.parse_args()
    hush()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for bits in args.sizes:
            results.append(promised(args, folder, bits))
            print(json.dumps(results[-1]), flush=True)
        for bits in args.sizes:
            results.append(overlap(args, folder, bits))
            print(json.dumps(results[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def promised(args: argparse.Namespace, folder: Path, bits: float) -> dict[str, Any]:
    """One plan followed, in its figures."""
    foretold = planned(args, folder / f"plan-{bits}", bits, args.samples)
    out = folder / f"out-{bits}"
    plan = ["--plan", str(folder / f"plan-{bits}"), "--profile-time"]
    done = command("quantize", args.model, *plan, "--out", str(out))
    text = evaluation_text(args.text, args.model)
    evaluation = evaluate(str(out), baseline=args.model, text=text, limit=args.limit, window=args.window)
    return {
        "model": Path(args.model).name,
        "bits": bits,
        "nbytes": [foretold["nbytes"], done["nbytes"]],
        "peak_memory_mb": [foretold["predicted_peak_memory_mb"], done["peak_memory_mb"]],
        **{kind: [seconds(one, kind) for one in (foretold["predicted_time"], done["time"])] for kind in KINDS},
        "loss_increase": [foretold["predicted_loss_increase"], evaluation.nll_difference],
    }


def overlap(args: argparse.Namespace, folder: Path, bits: float) -> dict[str, Any]:
    """How near plans from 16 and from 128 samples are."""
    few, many = folder / "few", folder / "many"
    for out, samples in ((few, 16), (many, 128)):
        planned(args, out, bits, samples, "--no-trial")
    first, second = decided(args, few), decided(args, many)
    profile = load(many / "profile.safetensors")
    widths = [row_widths(decision) for decision in (first, second)]
    return {
        "model": Path(args.model).name,
        "bits": bits,
        "same_width": share(widths[0] == widths[1]),
        "within_one_bit": share((widths[0] - widths[1]).abs() <= 1),
        "loss_by_128": [loss(profile, first), loss(profile, second)],
    }


def loss(profile: Profile, decision: Decision) -> float | None:
    return predicted(profile, decision.plan, decision.chosen)


def share(same: torch.Tensor) -> float:
    return round(float(same.float().mean()), 4)


def decided(args: argparse.Namespace, folder: Path) -> Decision:
    file = open_plan(folder)
    return given_plan(open_job(Source(args.model), file.recipe, Progress(), text=False), file)


def row_widths(decision: Decision) -> torch.Tensor:
    """The width of every row of the model."""
    widths = []
    for name, weight in decision.plan.weights.items():
        bits = torch.tensor([rows.grid.bits for rows in weight.grids])
        widths.append(bits[decision.chosen[name]] if weight.mixed else bits.repeat(weight.shape[0]))
    return torch.cat(widths)


def planned(args: argparse.Namespace, folder: Path, bits: float, samples: int, *more: str) -> dict[str, Any]:
    options = ["--bits", str(bits), "--method", "auto", "--calibration", args.calibration, "--samples", str(samples)]
    return command("plan", args.model, *options, "--seq-len", str(args.window), "--out", str(folder), *more)


def command(*arguments: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "llmsqueeze.cli", *arguments, "--json", "--quiet"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
