"""Speed and memory of the verbs, side by side with an earlier commit and with llm-compressor's GPTQ.

    python evals/speed.py MODEL CALIBRATION EVAL_TEXT [--before CLONE] [--peer-python PEER_ENV/bin/python]
        [--rows gptq descent coded plan eval threads quality] [--samples 32] [--seq-len 512] [--repeats 3] [--threads 1]
        [--isa avx2] [--side-by-side] [--work runs/speed] [--out evals/results/speed.json] [--fresh]

A row is one command. Its contenders take turns, and another one begins in each repeat; with --side-by-side they run at
the same time, each on cores of its own, and swap them in the next repeat. Every run is a process of its own, pinned to
as many cores as it has threads. Measured of the whole process, imports and the written folder included: wall time,
processor time (the user's and the kernel's) and peak resident memory. The table has the medians.

Contenders: `tree`, this clone; `before`, a clone of an earlier commit in the same environment (`git clone . CLONE`,
and in it `git checkout 64df46e`); `peer`, llm-compressor in an environment of its own (`pip install torch==2.13.0`,
then `llmcompressor==0.14.0`). Tree and before first run once on the demo, uncounted, so that numba's cache is filled.
The peer gets the very token rows that `quantize` draws, in float32, in which the walk computes on a CPU; it leaves
head and embeddings alone; all else are its defaults (damping 0.01, static activation order, its sequential pipeline).

Rows: gptq, descent, coded and plan compress MODEL; eval measures the folder that `before` wrote in row descent;
threads is row descent with one and two threads; quality compares the folders of all, by `eval` of this clone.

Every run is written at once, and a call goes on where the last one stopped, row by row and repeat by repeat. --out
belongs to one set of settings; --fresh begins anew. --isa avx2 keeps every contender to the instructions of an AVX2
machine. Beside other work call it by `chrt --rr 5 python evals/speed.py ...`: the contenders inherit the priority.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from speed_processes import Run, ask, commit, environment, machine, measured
from speed_table import markdown

ROOT = Path(__file__).resolve().parents[1]
GRID = ("--bits", "3", "--group-size", "64")
CODED = ("--method", "coded", "--bits", "3.25")
TOKENS = """
import json, sys
from llmsqueeze.text.rows import Draw, mixed_rows
from llmsqueeze.text.source import calibration_texts
from llmsqueeze.text.tokens import load_tokenizer
model, source, samples, length = *sys.argv[1:3], *map(int, sys.argv[3:])
rows = mixed_rows(calibration_texts(source, model), load_tokenizer(model), Draw(samples, length, seed=0)).rows
print(json.dumps([row[0].tolist() for row in rows]))
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--before", type=Path, help="a clone of an earlier commit")
    parser.add_argument("--peer-python", help="python of an environment that has llm-compressor")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "quality"], default=[*ROWS, "quality"])
    parser.add_argument(
        "--left-out", nargs=2, action="append", metavar=("ROW", "WHY"), default=[], help="for the table"
    )
    parser.add_argument("--contenders", nargs="+", default=["tree", "before", "peer", "two threads"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40, help="windows of text in `eval`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=["avx2"])
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "speed", help="keeps the folders of the contenders"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "evals" / "results" / "speed.json")
    parser.add_argument("--fresh", action="store_true", help="forget what --out has")
    args = parser.parse_args(arguments)
    args.calibration, args.text = (
        str(Path(p).resolve()) if Path(p).exists() else p for p in (args.calibration, args.text)
    )
    args.model = args.model.resolve() if args.model.exists() else args.model
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    results = opened(args)
    for row in args.rows:
        if row == "quality":
            compare_quality(args, results)
        else:
            measure_row(args, results, row)


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """What --out has of earlier calls, or a new beginning. SystemExit if it is about other settings."""
    names = ("samples", "seq_len", "windows", "threads", "isa")
    settings = {"model": args.model.name, **{name: getattr(args, name) for name in names}}
    settings |= {name: Path(getattr(args, name)).name for name in ("calibration", "text")}
    results: dict[str, Any] = {"settings": settings, "machine": {}, "rows": {}, "quality": {}}
    if args.out.exists() and not args.fresh:
        results = json.loads(args.out.read_text())
        if results["settings"] != settings:
            sys.exit(f"{args.out} is about {results['settings']}, not {settings}: choose another --out, or --fresh")
    results["machine"] |= machine(args.isa, ROOT, args.peer_python, args.work)
    results["left_out"] = results.get("left_out", {}) | dict(args.left_out)
    return results


def keep(args: argparse.Namespace, results: dict[str, Any]) -> None:
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    waiting = args.out.with_name("speed-waiting.json")
    text = markdown(results, json.loads(waiting.read_text()) if waiting.exists() else [])
    args.out.with_suffix(".md").write_text(text)


# rows: the processes of each contender


def ours(args: argparse.Namespace, verb: str, name: str, *options: str) -> dict[str, Run]:
    """A verb that compresses MODEL, in this clone and in the earlier one."""
    text = ("--calibration", args.calibration, "--samples", str(args.samples), "--seq-len", str(args.seq_len))
    clones = {"tree": ROOT, "before": args.before}
    runs = {}
    for contender, clone in clones.items():
        out = args.work / f"{name}-{contender}"
        command = cli(verb, str(args.model), *options, *text, "--out", str(out))
        runs[contender] = Run(command, clone, args.threads, out)
    return {contender: run for contender, run in runs.items() if run.clone}


def cli(verb: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "llmsqueeze.cli", verb, *options, "--device", "cpu", "--quiet", "--json"]


def gptq(args: argparse.Namespace) -> dict[str, Run]:
    runs = ours(args, "quantize", "gptq", "--method", "gptq", *GRID)
    if not args.peer_python:
        return runs
    job, out = args.work / "peer.json", args.work / "gptq-peer"
    if "peer" in args.contenders:
        rows = [str(args.model), args.calibration, str(args.samples), str(args.seq_len)]
        tokens = ask([sys.executable, "-c", TOKENS, *rows], environment(args.isa, ROOT, 1), args.work)
        job.write_text(json.dumps({"model": str(args.model), "tokens": tokens, "out": str(out)}))
    command = [args.peer_python, str(ROOT / "evals" / "speed_peer.py"), str(job)]
    return {**runs, "peer": Run(command, None, args.threads, out)}


def descent(args: argparse.Namespace) -> dict[str, Run]:
    return ours(args, "quantize", "descent", *GRID)


def coded(args: argparse.Namespace) -> dict[str, Run]:
    return ours(args, "quantize", "coded", *CODED)


def plan(args: argparse.Namespace) -> dict[str, Run]:
    return ours(args, "plan", "plan", *CODED)


def evaluation(args: argparse.Namespace) -> dict[str, Run]:
    folder = next((f for f in (args.work / f"descent-{c}" for c in ("before", "tree")) if f.exists()), None)
    if folder is None:
        sys.exit("row eval measures a folder of row descent, which is not in --work")
    clones = {"tree": ROOT, "before": args.before}
    return {name: Run(scores(args, folder, args.model), clone, args.threads) for name, clone in clones.items() if clone}


def scores(args: argparse.Namespace, folder: Path, baseline: Path) -> list[str]:
    text = ("--text", args.text, "--limit", str(args.windows), "--seq-len", str(args.seq_len))
    return cli("eval", str(folder), "--baseline", str(baseline), *text)


def threads(args: argparse.Namespace) -> dict[str, Run]:
    one = ours(args, "quantize", "threads", *GRID)["tree"]
    return {"tree": Run(one.command, ROOT, 1, one.out), "two threads": Run(one.command, ROOT, 2, one.out)}


ROWS = {"gptq": gptq, "descent": descent, "coded": coded, "plan": plan, "eval": evaluation, "threads": threads}


# measuring


def measure_row(args: argparse.Namespace, results: dict[str, Any], row: str) -> None:
    """Runs what the row lacks of its repeats, one contender after the other or as many at once as there are cores."""
    runs = {name: run for name, run in ROWS[row](args).items() if name in args.contenders}
    kept = results["rows"].setdefault(row, {})
    for repeat in range(args.repeats):
        left = [name for name in runs if len(kept.get(name, [])) <= repeat]
        turn = repeat % max(1, len(left))
        left = left[turn:] + left[:turn]
        if repeat == 0:
            warm_up(args, row, [runs[name] for name in left])
        while left:
            together = fitting(args, [runs[name].threads for name in left])
            batch, left = left[:together], left[together:]
            for name, run in zip(batch, at_once(args, [runs[name] for name in batch]), strict=True):
                run |= {"side_by_side": len(batch) > 1}
                run |= {"commit": commit(clone)} if (clone := runs[name].clone) else {}
                kept.setdefault(name, []).append(run)
                print(f"{row} {name}: {json.dumps(run)}", flush=True)
            keep(args, results)


def fitting(args: argparse.Namespace, wanted: list[int]) -> int:
    """How many of these contenders run at the same time."""
    if not args.side_by_side:
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, sum(sum(wanted[: i + 1]) <= cores for i in range(len(wanted))))


def at_once(args: argparse.Namespace, runs: list[Run]) -> list[dict[str, Any]]:
    """The runs at the same time, each on its own cores, given out in this order."""
    cores, first, jobs = sorted(os.sched_getaffinity(0)), 0, []
    for run in runs:
        if run.out:
            shutil.rmtree(run.out, ignore_errors=True)
        jobs.append(
            (run.command, environment(args.isa, run.clone, run.threads), args.work, cores[first : first + run.threads])
        )
        first += run.threads
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: measured(*job), jobs))


def warm_up(args: argparse.Namespace, row: str, runs: list[Run]) -> None:
    """The same command on the demo, uncounted: numba compiles its loops and keeps them."""
    for clone in {run.clone for run in runs if run.clone}:
        for run in [run for run in runs if run.clone == clone][:1]:
            text = ["--calibration", "demo", "--samples", "2", "--seq-len", "64"]
            if row == "eval":
                text, start = (
                    ["--text", "demo", "--limit", "2", "--seq-len", "64"],
                    cli("eval", "demo", "--baseline", "demo"),
                )
            else:
                start = [*run.command[:4], "demo", *run.command[5 : run.command.index("--calibration")]]
                text += ["--out", str(args.work / "warm-up"), "--device", "cpu", "--quiet", "--json"]
            shutil.rmtree(args.work / "warm-up", ignore_errors=True)
            ask([*start, *text], environment(args.isa, clone, run.threads), args.work)


def compare_quality(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Loss of each folder above the original's, and of this clone's above the others', in paired windows."""

    def loss(folder: str, baseline: Path, name: str) -> None:
        found = ask(scores(args, args.work / folder, baseline), environment(args.isa, ROOT, args.threads), args.work)
        kept = ("perplexity", "nll_difference", "nll_difference_stderr")
        results["quality"][name] = {score: found[score] for score in kept}
        keep(args, results)

    for row in ("gptq", "descent", "coded"):
        contenders = [c for c in ("tree", "before", "peer") if (args.work / f"{row}-{c}").exists()]
        for contender in contenders:
            loss(f"{row}-{contender}", args.model, f"{row}, {contender}")
        for other in contenders[1:] if contenders[:1] == ["tree"] else []:
            loss(f"{row}-tree", args.work / f"{row}-{other}", f"{row}, tree above {other}")


if __name__ == "__main__":
    main()
