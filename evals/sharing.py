"""Runs of `quantize` shared among processes, and forecasts of `plan`, against what is measured.

    python evals/sharing.py MODEL CALIBRATION [--rows NAME ...] [--counts 1 2] [--samples 32] [--window 512]
        [--out FILE.json]
    python evals/sharing.py --show FILE.json ...

For every row and count: `torchrun --nproc-per-node COUNT -m llmsqueeze quantize`, one thread for each process, one run
after the other on a machine that does nothing else. seconds: of the run as the summary has it, and of the whole launch;
peak_mb: of the first process. same: whether the folder is that of one process, byte for byte, if that ran before. The
rows `plan` are `plan` and then `quantize --plan`, by one process: the predicted time and peak memory, and the measured
ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from survival import contents

from llmsqueeze.files import SIDECAR

Row = dict[str, Any]
ROWS: dict[str, list[str]] = {
    "gptq": ["--method", "gptq", "--bits", "3"],
    "descent": ["--bits", "3"],
    "coded": ["--method", "coded", "--bits", "3"],
    "budget": ["--method", "budget", "--bits", "3"],
    "plan": ["--method", "budget", "--bits", "3"],
    "plan, gptq": ["--method", "gptq", "--bits", "3"],
    "plan, rtn": ["--method", "rtn", "--bits", "3"],
}


def main() -> None:
    if "--show" in sys.argv:
        print("\n".join(page([row for file in sys.argv[2:] for row in json.loads(Path(file).read_text())])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[Row] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for name in args.rows:
        measure = forecast if name.startswith("plan") else shared
        for row in measure(args, ROWS[name]):
            results.append({"model": Path(args.model).name, "row": name, **row})
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(page(results)), flush=True)


def shared(args: argparse.Namespace, options: list[str]) -> list[Row]:
    """One row, by every count of processes."""
    rows, alone = [], None
    with tempfile.TemporaryDirectory() as folder:
        for count in args.counts:
            out = Path(folder) / f"by-{count}"
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "llmsqueeze"]
            start = time.monotonic()
            asked = [args.model, *options, *text(args, options), "--out", str(out), "--profile-time"]
            summary = run([*launch, "quantize", *asked])
            seconds = time.monotonic() - start
            record = json.loads((out / SIDECAR).read_text())
            (out / SIDECAR).write_text(json.dumps({name: value for name, value in record.items() if name != "time"}))
            files = contents(out)
            alone = files if count == 1 else alone
            rows.append(
                {
                    "processes": count,
                    "seconds": summary["seconds"],
                    "whole_seconds": round(seconds, 1),
                    "peak_mb": summary["peak_memory_mb"],
                    "same": None if alone is None else files == alone,
                    "processor_seconds": {stage: one["processor_seconds"] for stage, one in summary["time"].items()},
                }
            )
    return rows


def forecast(args: argparse.Namespace, options: list[str]) -> list[Row]:
    """What `plan` predicts for `quantize --plan`, and what that takes."""
    with tempfile.TemporaryDirectory() as folder:
        command, out = [sys.executable, "-m", "llmsqueeze"], Path(folder) / "out"
        plan = run([*command, "plan", args.model, *options, *text(args, options), "--out", f"{folder}/plan"])
        start = time.monotonic()
        summary = run([*command, "quantize", args.model, "--plan", f"{folder}/plan/plan.yaml", "--out", str(out)])
        return [
            {
                "predicted_seconds": plan["predicted_seconds"],
                "whole_seconds": round(time.monotonic() - start, 1),
                "predicted_mb": plan["predicted_peak_memory_mb"],
                "peak_mb": summary["peak_memory_mb"],
            }
        ]


def text(args: argparse.Namespace, options: list[str]) -> list[str]:
    if "rtn" in options:
        return []
    return ["--calibration", args.calibration, "--samples", str(args.samples), "--seq-len", str(args.window)]


def run(command: list[str]) -> dict[str, Any]:
    """The JSON that a command prints, with one thread."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", "--quiet", "--device", "cpu"], capture_output=True, text=True, env=alone)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def page(results: list[Row]) -> list[str]:
    lines: list[str] = []
    if runs := [row for row in results if "processes" in row]:
        lines += ["| model | run | processes | s | of one | the same bytes | peak MB of the first |"]
        lines += ["|---|---|---:|---:|---:|---|---:|"]
        one = {(row["model"], row["row"]): row["seconds"] for row in runs if row["processes"] == 1}
        for row in runs:
            alone = one.get((row["model"], row["row"]))
            ratio = f"{row['seconds'] / alone:.2f}" if alone else ""
            same = {True: "yes", False: "**no**", None: "not compared"}[row["same"]]
            cells = [row["model"], row["row"], row["processes"], f"{row['seconds']:.0f}", ratio, same]
            lines.append(f"| {' | '.join(map(str, cells))} | {row['peak_mb']:.0f} |")
    for row in runs:
        if row["processes"] > 1 and "processor_seconds" in row:
            lines += stages(row, next(r for r in runs if r["processes"] == 1 and r["row"] == row["row"]))
    if plans := [row for row in results if "predicted_seconds" in row]:
        lines += ["", "| model | run | s predicted | measured | ratio | MB predicted | measured | ratio |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for row in plans:
            pairs = [(row["predicted_seconds"], row["whole_seconds"]), (row["predicted_mb"], row["peak_mb"])]
            cells = [f"{before:.0f} | {after:.0f} | {after / before:.2f}" for before, after in pairs]
            lines.append(f"| {row['model']} | {row['row']} | {' | '.join(cells)} |")
    return lines


def stages(row: Row, alone: Row) -> list[str]:
    """Where the processor time of the first process goes, against one process."""
    lines = ["", f"| {row['model']}, {row['row']} | s of one | of the first of {row['processes']} | ratio |"]
    lines.append("|---|---:|---:|---:|")
    for stage, spent in alone["processor_seconds"].items():
        if spent >= 1:
            own = row["processor_seconds"].get(stage, 0.0)
            lines.append(f"| {stage} | {spent:.1f} | {own:.1f} | {own / spent:.2f} |")
    return lines


if __name__ == "__main__":
    main()
