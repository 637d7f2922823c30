#!/bin/bash
# Two threads of torch cost many times the processor time of one if they share their cores with other work.
#
# Versions: torch 2.13.0 (its wheel for Linux on x86-64, CPU), which brings GNU's OpenMP runtime, libgomp.
#
# Expected: a thread that waits for another one leaves its core to it. Small operations on two threads cost about the
# processor time that they cost on one.
#
# Seen: with the default settings a waiting thread spins 300000 rounds (GOMP_SPINCOUNT), several milliseconds, before
# it sleeps. As long as it has the core, the thread that it waits for, or another process, has not. On idle cores that
# costs nothing. Beside other work an operation of microseconds takes all these milliseconds. libgomp spins 1000 rounds
# by itself if it has more threads than cores when it starts, but it does not see other processes.
# GOMP_SPINCOUNT=1000 (or OMP_WAIT_POLICY=passive), set before torch is imported, cures it. KMP_BLOCKTIME, which is
# often named, is read by another runtime and changes nothing.
#
# How: the process is put on one core after torch has started, so that its two threads share it as they would if other
# work had the second core. The figures are processor time of an elementwise product of [512, 576], not wall time, as
# that does not depend on what else runs. libgomp shows its own settings (OMP_DISPLAY_ENV).
#
# Output seen:
#   one thread                    spins 300000,   0.034 ms of processor time
#   two threads                   spins 300000,   7.889 ms of processor time
#   two, GOMP_SPINCOUNT=1000      spins 1000,   0.098 ms of processor time
#   two, OMP_WAIT_POLICY=passive  spins 0,   0.046 ms of processor time
#   two, KMP_BLOCKTIME=0          spins 300000,   7.990 ms of processor time
#   OpenMP runtimes: libgomp.so.1
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs Linux, bash, python3 with venv, pip, two cores.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$work"
unset OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_DYNAMIC KMP_BLOCKTIME OMP_PROC_BIND GOMP_CPU_AFFINITY
"$work/venv/bin/python" - <<'PYTHON'
import json
import os
import re
import subprocess
import sys

PRODUCT = """
import json, os, resource, torch
a = torch.ones(512, 576)
b = a * 2.0
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
def processor():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
start = processor()
for _ in range(200):
    torch.mul(a, 2.0, out=b)
print(json.dumps({"ms": (processor() - start) / 200 * 1e3, "libraries": [
    line.split("/")[-1].strip() for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]]}))
"""
SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "two, GOMP_SPINCOUNT=1000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "two, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "two, KMP_BLOCKTIME=0": {"OMP_NUM_THREADS": "2", "KMP_BLOCKTIME": "0"},
}
cost, spins, libraries = {}, {}, set()
for name, setting in SETTINGS.items():
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        env=os.environ | {"OMP_DISPLAY_ENV": "verbose"} | setting,
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    shown = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    cost[name], spins[name] = answer["ms"], int(shown[1]) if shown else None
    libraries |= set(answer["libraries"])
    print(f"{name:29} spins {spins[name]}, {cost[name]:7.3f} ms of processor time", flush=True)
print("OpenMP runtimes:", ", ".join(sorted(libraries)))
slow = ("two threads", "two, KMP_BLOCKTIME=0")
right = libraries == {"libgomp.so.1"} and all(spins[name] == 300000 for name in slow)
right = right and all(cost[name] > 10 * cost["two, GOMP_SPINCOUNT=1000"] for name in slow)
right = right and cost["two, OMP_WAIT_POLICY=passive"] < cost["two threads"] / 10
print("as described" if right else "no longer as described")
sys.exit(not right)
PYTHON
