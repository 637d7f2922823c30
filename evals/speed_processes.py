"""Processes that `speed.py` measures: their environment, their cores, what they take, and what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
}
UNSET = ("PYTHONPATH", "PYTHONHOME", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_DYNAMIC", *AVX2)
DESCRIBE = """
import json, torch
from importlib.metadata import version, PackageNotFoundError
def of(name):
    try: return version(name)
    except PackageNotFoundError: return None
names = ("torch", "numba", "transformers", "compressed-tensors", "llmcompressor")
print(json.dumps({"instructions": torch.backends.cpu.get_cpu_capability(), **{n: of(n) for n in names if of(n)}}))
"""


@dataclass(frozen=True)
class Run:
    """A process to measure: its command, the folder it writes or reads, clone and threads."""

    command: list[str]
    clone: Path | None
    threads: int
    out: Path | None = None


def measured(command: list[str], environment: dict[str, str], folder: Path, cores: list[int]) -> dict[str, Any]:
    """Seconds and peak memory (MB, 10**6 bytes) of a process on these cores, and of its answer what the tables need."""
    log = folder / f"log-{cores[0]}"
    load, start = os.getloadavg()[0], time.monotonic()
    with log.open("w") as stderr, (log.with_suffix(".out")).open("w") as stdout:
        pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
        process = subprocess.Popen(pinned, env=environment, cwd=folder, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed: " + " ".join(log.read_text().split()[-60:]))
    answer = answered(log.with_suffix(".out").read_text())
    wanted = ("seconds", "perplexity", "nll_difference", "nll_difference_stderr", "bits_per_weight")
    return {
        "wall": round(time.monotonic() - start, 2),
        "user": round(usage.ru_utime, 2),
        "kernel": round(usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "cores": len(cores),
        "load_before": round(load, 2),
        **{name: answer[name] for name in wanted if answer.get(name) is not None},
    }


def environment(isa: str | None, clone: Path | None, threads: int) -> dict[str, str]:
    """The variables of a process: its clone's code, its threads, its instructions, and no network or GPU."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    given = {name: value for name, value in os.environ.items() if name not in UNSET}
    path = {"PYTHONPATH": str(clone.resolve())} if clone else {}
    return given | fixed | dict.fromkeys(names, str(threads)) | (AVX2 if isa else {}) | path


def ask(command: list[str], environment: dict[str, str], folder: Path) -> Any:
    """The JSON that a command prints last."""
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: " + " ".join(done.stderr.split()[-60:]))
    return answered(done.stdout)


def answered(output: str) -> Any:
    return json.loads(output.strip().splitlines()[-1]) if output.strip() else {}


def machine(isa: str | None, tree: Path, peer_python: str | None, folder: Path) -> dict[str, Any]:
    """The processor in words, and the versions of every contender, asked for in `folder`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in facts.get("flags", "").split()]
    described: dict[str, Any] = {"processor": facts.get("model name"), "units": units, "cores": os.cpu_count()}
    described["priority"] = "real-time" if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR) else "normal"
    described["tree"] = ask([sys.executable, "-c", DESCRIBE], environment(isa, tree, 1), folder)
    if peer_python:
        described["peer"] = ask([peer_python, "-c", DESCRIBE], environment(isa, None, 1), folder)
    return described


def commit(clone: Path) -> str:
    """'64df46e', with a plus sign if files differ from it."""
    git = ["git", "-C", str(clone)]
    name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain", "llmsqueeze"], capture_output=True, text=True, check=True)
    return name.strip() + ("+" if changed.stdout.strip() else "")
