"""Processes of `quantize`, killed at random moments, and the same command again until it is done.

    python evals/survival.py MODEL CALIBRATION [--rows NAME ...] [--kills 5] [--samples 16] [--window 128] [--seed 0]
        [--out FILE.json]
    python evals/survival.py --show FILE.json ...

A moment is drawn evenly from the time that an uninterrupted run takes. The process gets signal 9. What is compared:
every file of the folder with that of the uninterrupted run, byte for byte; and the time of all runs together, the
starts of Python among them, with that of the uninterrupted one. steps: how many the journal held at each kill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmsqueeze.formats.folder import partial_of
from llmsqueeze.journal import FOLDER, LINES

Row = dict[str, Any]
ROWS: dict[str, list[str]] = {
    "descent": ["--bits", "3"],
    "coded": ["--method", "coded", "--bits", "3"],
    "budget": ["--method", "budget", "--bits", "3"],
    "gwq with factors": ["--method", "gwq", "--bits", "3", "--lorc-rank", "2"],
    "layerwise by LIM": ["--method", "layerwise", "--bits", "3", "--importance", "lim"],
    "coded under a bound": ["--method", "coded", "--max-kl", "0.05"],
}


def main() -> None:
    if "--show" in sys.argv:
        print("\n".join(table([row for file in sys.argv[2:] for row in json.loads(Path(file).read_text())])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[Row] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for name in args.rows:
        results.append({"model": Path(args.model).name, "row": name, **survived(args, ROWS[name])})
        print(table(results[-1:])[-1], flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def survived(args: argparse.Namespace, options: list[str]) -> Row:
    """One command, uninterrupted and killed."""
    text = ["--calibration", args.calibration, "--samples", str(args.samples), "--seq-len", str(args.window)]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        command = [sys.executable, "-m", "llmsqueeze.cli", "quantize", args.model, *options, *text, "--quiet", "--out"]
        start = time.monotonic()
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        seconds = time.monotonic() - start
        draw, steps, start = random.Random(args.seed), list[int](), time.monotonic()
        while not killed.exists():
            process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                _, errors = process.communicate(timeout=draw.uniform(0, seconds) if len(steps) < args.kills else None)
                if process.returncode:
                    raise SystemExit(errors.decode())
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                steps.append(noted(killed))
        together = time.monotonic() - start
        left = sorted(path.name for path in Path(folder).iterdir() if path not in (whole, killed))
        return {
            "steps": steps,
            "identical": contents(whole) == contents(killed),
            "left": left,
            "seconds": round(seconds, 1),
            "seconds_killed": round(together, 1),
        }


def noted(out: Path) -> int:
    """Steps in the journal of a run that was killed."""
    lines = partial_of(out) / FOLDER / LINES
    return lines.read_text().count("\n") if lines.exists() else 0


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file of a folder; then the folder is removed."""
    files = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    shutil.rmtree(folder)
    return files


def table(results: list[Row]) -> list[str]:
    lines = ["| model | run | steps noted at the kills | the same bytes | time |", "|---|---|---|---|---:|"]
    for row in results:
        steps, same = ", ".join(map(str, row["steps"])), "yes" if row["identical"] else "**no**"
        cells = [row["model"], row["row"], steps, same, f"{row['seconds_killed'] / row['seconds']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
