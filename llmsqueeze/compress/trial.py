"""The time and memory that a plan will take: its first blocks are really compressed, in a process of its own.

Blocks have one shape as a rule. So the time is that before the blocks, that of the first, and for each other block that
of the second, which is the first to see inputs from behind compressed weights. Memory is that of `quantize --plan`: it
does not grow from block to block.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.compress.reuse import given_plan, open_plan
from llmsqueeze.compress.weights.blocks import Run, compress_blocks, needed_streams
from llmsqueeze.compress.weights.ends import outside_shard, outside_shards
from llmsqueeze.formats.folder import Output
from llmsqueeze.memory import keep_within_block, peak_device_memory_mb, peak_memory_mb
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress


def run_trial(job: Job, plan: Path, progress: Progress) -> dict[str, Any]:
    """`seconds` and `peak_memory_mb` that `quantize --plan` will need; empty, with a note, if the trial fails."""
    source = [job.source.model, job.source.revision, job.source.trust_remote_code]
    task = json.dumps({"source": source, "plan": str(plan), "device": str(job.device)})
    progress.stage("trial", 1)
    done = subprocess.run([sys.executable, "-m", "llmsqueeze.compress.trial", task], capture_output=True, text=True)
    progress.advance()
    if done.returncode:
        errors = done.stderr.strip().splitlines()
        reason = errors[-1] if errors else done.returncode
        progress.note(f"no prediction of time and memory: the trial failed ({reason})")
        return {}
    prediction: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return prediction


class Clock(Progress):
    """Notes when the blocks began and when each was done."""

    def stage(self, name: str, total: int) -> None:
        self.times = [time.monotonic()]

    def advance(self) -> None:
        self.times.append(time.monotonic())


def main(task: dict[str, Any]) -> dict[str, float]:
    """The trial itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - a run's clock begins after that too

    start = time.monotonic()
    keep_within_block()
    file = open_plan(Path(task["plan"]))
    job = open_job(Source(*task["source"]), file.recipe, Progress(), device=torch.device(task["device"]))
    decision = given_plan(job, file)
    with tempfile.TemporaryDirectory(dir=Path(task["plan"]).parent) as folder, Spill(parent=Path(folder)) as spill:
        output = Output(Path(folder) / "trial", 2)
        output.partial.mkdir()
        walk = job.walk(spill)
        inputs = walk.embed() if file.recipe.needs_text else None
        for names in outside_shards(job.skeleton):
            output.write_shard(outside_shard(job.skeleton, names, {}))
        clock, streams = Clock(), needed_streams(walk, inputs, file.recipe)
        compress_blocks(Run.of(walk, decision, file.recipe, clock), streams, output, count=2)
    last = clock.times[-1] - clock.times[-2]
    return {
        "seconds": round(clock.times[-1] - start + last * (len(job.skeleton.blocks) - len(clock.times) + 1), 3),
        "peak_memory_mb": peak_memory_mb(),
        "peak_device_memory_mb": peak_device_memory_mb(str(job.device)),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))  # noqa: T201 - the parent reads it
