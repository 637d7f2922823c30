"""What torch's two threads cost on idle cores and beside other work, under settings of the OpenMP runtime.

    python evals/waiting.py [--seconds 1] [--repeats 5] [--realtime] [--out evals/results/speed-waiting.json]

Each measurement is a process of its own: a product [512, 576] x [576, 1536], and ten times a small product and an
elementwise one, again and again. Loads: none; two processes that only count; two that multiply with two threads of
torch each, which spin. Settings take turns. --realtime puts the runs without load before all other processes of the
machine (`chrt`, which needs the right to): other work then takes no part, as on idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import speed_table

MIXTURE = """
import json, resource, sys, time, torch
def product(*shape):
    a, b = torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])
    out = a @ b
    return lambda: torch.mm(a, b, out=out)
big, small, a = product(512, 576, 1536), product(128, 192, 192), torch.randn(512, 576)
out = a.clone()
def mixture():
    big()
    for _ in range(10):
        small()
        torch.mul(a, 2.0, out=out)
mixture()
before, start, times = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[1]):
    mixture()
    times += 1
wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"wall_ms": 1e3 * wall / times, "processor_ms": 1e3 * processor / times}))
"""
COUNT = "while True: pass"
LOADS = {"no load": None, "two that count": [COUNT], "two of torch": [MIXTURE, "1e9"]}
TWO = {"OMP_NUM_THREADS": "2"}
SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": TWO,
    "two, GOMP_SPINCOUNT=10000": TWO | {"GOMP_SPINCOUNT": "10000"},
    "two, GOMP_SPINCOUNT=1000 (ours)": TWO | {"GOMP_SPINCOUNT": "1000"},
    "two, GOMP_SPINCOUNT=100": TWO | {"GOMP_SPINCOUNT": "100"},
    "two, OMP_WAIT_POLICY=passive": TWO | {"OMP_WAIT_POLICY": "passive"},
    "two, OMP_DYNAMIC=true": TWO | {"OMP_DYNAMIC": "true"},
    "two, KMP_BLOCKTIME=0": TWO | {"KMP_BLOCKTIME": "0"},
    "two, MKL_DYNAMIC=false": TWO | {"MKL_DYNAMIC": "false"},
}


def measure(setting: dict[str, str], seconds: float, before: list[str]) -> dict[str, float]:
    command = [*before, sys.executable, "-c", MIXTURE, str(seconds)]
    done = subprocess.run(command, env=given() | setting, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer | {"load_average": os.getloadavg()[0]}


def given() -> dict[str, str]:
    """Our variables, without what the settings are about."""
    names = {name for setting in SETTINGS.values() for name in setting}
    return {name: value for name, value in os.environ.items() if name not in names}


def under(load: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings beside this load, in turns; their medians."""
    busy = LOADS[load]
    others = [subprocess.Popen([sys.executable, "-c", *busy], env=given() | TWO) for _ in range(2)] if busy else []
    before = ["chrt", "--rr", "10"] if args.realtime and not busy else []
    try:
        runs = [{n: measure(s, args.seconds, before) for n, s in SETTINGS.items()} for _ in range(args.repeats)]
    finally:
        for other in others:
            other.kill()
            other.wait()
    return [
        {
            "setting": name,
            "load": load,
            "realtime": bool(before),
            **{kind: round(median(run[name][kind] for run in runs), 2) for kind in runs[0][name]},
        }
        for name in SETTINGS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("evals/results/speed-waiting.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        rows += under(load, args)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(speed_table.waits(rows)))


if __name__ == "__main__":
    main()
