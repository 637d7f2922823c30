"""Processes of `quantize`, killed at random moments, and the same command again until it is done.

    python evals/survival.py MODEL CALIBRATION [--rows NAME ...] [--kills 5] [--samples 16] [--window 128] [--seed 0]
        [--after 0] [--out FILE.json]
    python evals/survival.py --show FILE.json ...

A moment is drawn evenly from the time that an uninterrupted run takes, or from what is left of it `--after` a share.
The process gets signal 9, and is started again; a run that ends before its moment is compared, and the next one begins
anew, until there were so many kills. What is compared: every file of the folder with that of the uninterrupted run,
byte for byte. A kill loses the work since the last step that was noted, and a start of Python.
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

from llmsqueeze.journal.partial import partial_of
from llmsqueeze.progress.log import RUN_LOG

Row = dict[str, Any]
ROWS: dict[str, list[str]] = {
    "rtn": ["--method", "rtn", "--bits", "3"],
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
    parser.add_argument("--after", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[Row] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for name in args.rows:
        results.append({"model": Path(args.model).name, "row": name, **survived(args, ROWS[name])})
        print(table(results[-1:])[2], flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def survived(args: argparse.Namespace, options: list[str]) -> Row:
    """One command, uninterrupted, and killed so many times. A run that is done before its moment comes starts anew."""
    text = ["--calibration", args.calibration, "--samples", str(args.samples), "--seq-len", str(args.window)]
    text = [] if "rtn" in options else text
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        command = [sys.executable, "-m", "llmsqueeze.cli", "quantize", args.model, *options, *text, "--quiet", "--out"]
        start = time.monotonic()
        subprocess.run([*command, str(whole)], check=True, capture_output=True)
        seconds, expected = time.monotonic() - start, contents(whole)
        draw, kills, identical, lost = random.Random(args.seed), list[str](), True, 0.0
        while len(kills) < args.kills:
            start, before = time.monotonic(), len(kills)
            while not killed.exists():
                moment = draw.uniform(args.after * seconds, seconds) if len(kills) < args.kills else None
                process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                try:
                    _, errors = process.communicate(timeout=moment)
                    if process.returncode:
                        raise SystemExit(errors.decode())
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    kills.append(stage_of(killed))
            identical &= contents(killed) == expected
            lost += time.monotonic() - start - seconds if len(kills) > before else 0.0
        return {
            "kills": kills,
            "identical": identical,
            "left": sorted(path.name for path in Path(folder).iterdir()),
            "seconds": round(seconds, 1),
            "lost": round(lost / len(kills), 1),
        }


def stage_of(out: Path) -> str:
    """The stage that a run was in when it was killed, and how many of its steps were done, by its log."""
    log = partial_of(out) / RUN_LOG
    last = log.read_text().rpartition("\n")[0].rpartition("\n")[2] if log.exists() else ""
    if not last:
        return "start"
    state = json.loads(last)
    return f"{state['stage']} {state['done']}/{state['total']}" if "stage" in state else "start"


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
    lines = [
        "| model | run | killed in | the same bytes | s of a run | s lost by a kill |",
        "|---|---|---|---|---:|---:|",
    ]
    for row in results:
        same = "yes" if row["identical"] and not row["left"] else "**no**"
        cells = [row["model"], row["row"], ", ".join(row["kills"]), same, f"{row['seconds']:.0f}", f"{row['lost']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"{sum(len(row['kills']) for row in results)} kills."]


if __name__ == "__main__":
    main()
