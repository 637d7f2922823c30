"""The time and memory that a plan will take: its first blocks are really compressed, in a process of its own.

The trial does what `quantize --plan` does, by the same functions and from the start of Python to the verification, but
with the first blocks only. The stopwatch of stages is read before and after every block. The second block is the first
to see inputs from behind compressed weights, so those that follow are forecast from it (forecast.py). Not in the
forecast: distillation, and the last coded weight, which is coded several times until it fits. Memory is that of
`quantize --plan`: it does not grow from block to block.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import llmsqueeze
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.forecast.needs import Tried, added, between, forecast, seconds, shared, with_opening, work_of
from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.compress.pipeline import write_rest, write_weights
from llmsqueeze.compress.reuse import given_plan, open_plan
from llmsqueeze.compress.weights.ends import outside_shards
from llmsqueeze.errors import SqueezeError
from llmsqueeze.formats.folder import Output
from llmsqueeze.formats.verify import verify
from llmsqueeze.memory import keep_within_block, peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import Stopwatch, Times, of_process, running, timed

BLOCKS = 2
PACKAGE = Path(llmsqueeze.__file__).resolve().parents[1]
# the folder that this package is in comes before others; the working folder, which may be a model's, is none of them
TRIAL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from llmsqueeze.compress.forecast.trial import main
print(json.dumps(main(json.loads(sys.argv[2]))))
"""


def run_trial(job: Job, plan: Path, progress: Progress, processes: int = 1) -> dict[str, Any]:
    """`time` by stage, `seconds` and `peak_memory_mb` that `quantize --plan` will need, and each of so many processes
    that share it; empty, with a note, if the trial fails."""
    task = json.dumps({"source": asdict(job.source), "plan": str(plan), "device": str(job.device)})
    progress.stage("trial", 1)
    prediction: dict[str, Any] = {}
    with progress.beside("no prediction of time and memory: the trial failed"), timed("trial"):
        done = subprocess.run([sys.executable, "-P", "-c", TRIAL, str(PACKAGE), task], capture_output=True, text=True)
        if done.returncode:
            raise SqueezeError(next(reversed(done.stderr.strip().splitlines()), f"code {done.returncode}"))
        prediction = json.loads(done.stdout.strip().splitlines()[-1])
    progress.advance()
    if not prediction:
        return {}
    times = shared(prediction["time"], processes)
    return prediction | {"time": times, "seconds": seconds(times)}


class Laps(Progress):
    """Reads the stopwatch when the blocks of a stage begin, and when each is done."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.readings: dict[str, list[Times]] = {}

    def stage(self, name: str, total: int) -> None:
        self.name = name
        self.readings[name] = [self.stopwatch.times()]

    def advance(self) -> None:
        self.readings[self.name].append(self.stopwatch.times())

    def of(self, name: str) -> list[Times]:
        """The time of each block in this stage."""
        return [between(*pair) for pair in itertools.pairwise(self.readings.get(name, []))]


def main(task: dict[str, Any]) -> dict[str, Any]:
    """The trial itself."""
    stopwatch = of_process()
    with running(stopwatch):
        keep_within_block()
        file = open_plan(Path(task["plan"]))
        job = open_job(Source(**task["source"]), file.recipe, Progress(), device=torch.device(task["device"]))
        decision, laps = given_plan(job, file), Laps(stopwatch)
        with tempfile.TemporaryDirectory(dir=Path(task["plan"]).parent) as folder:
            compress_first(job, decision, Path(folder) / "trial", laps)
        whole = stopwatch.times()
    blocks = [added(pair) for pair in zip(laps.of("compress"), laps.of("verify"), strict=False)] or laps.of("compress")
    tried = Tried(between(added(blocks), whole), blocks)
    times = with_opening(forecast(tried, work_of(job.skeleton, decision.plan)), decision.plan.portable)
    return {
        "time": times,
        "seconds": seconds(times),
        "peak_memory_mb": peak_memory_mb(),
        "peak_device_memory_mb": peak_device_memory_mb(str(job.device)),
    }


def compress_first(job: Job, decision: Decision, out: Path, progress: Progress) -> None:
    """Compresses the first blocks and all that lies outside the blocks into a folder, and verifies it."""
    count = min(BLOCKS, len(job.skeleton.blocks))
    output = Output(out, len(outside_shards(job.skeleton)) + count)
    output.partial.mkdir()
    decision, by_weight, witness = write_weights(job, decision, output, True, progress, count)
    assert witness is not None
    blocks = {name for names in job.skeleton.linears[count:] for name in names}
    written = {name: weight for name, weight in decision.plan.weights.items() if name not in blocks}
    write_rest(output, job, replace(decision, plan=decision.plan.only(written)), by_weight)
    verify(output, witness.computed, job.device, job.source.trust_remote_code, progress, complete=False)
