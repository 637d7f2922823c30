"""Memory and disk that a run needs, from the model's shapes, against what is free: before any work is done.

    least memory = Python and its libraries
                 + the largest block's linears, as they were and as they become, float32, without experts
                 + three matrices [cols, cols] of the widest linear if the method needs moments (curvature.py)
                 or, if that is more, the head in float32 if the method needs gradients

It is less than what a run really takes, by a third or so: who has less than that cannot run it. The forecast of `plan`
is the peak that a trial really had.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llmsqueeze import memory
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.job import Job
from llmsqueeze.errors import OutputError
from llmsqueeze.formats.inspection.beside import files_beside

LIBRARIES = 300 << 20  # bytes
FLOAT32 = 4


def least_memory(job: Job) -> int:
    """Bytes of memory on the job's device without which the job cannot run."""
    skeleton, recipe = job.skeleton, job.recipe
    blocks, widest = [0], 0
    for index, names in enumerate(skeleton.linears):
        stacks = skeleton.stacks_in(index)
        planned = [n for n in names if n in job.plan.weights and n.rpartition(".")[0] not in stacks]
        blocks.append(2 * FLOAT32 * sum(job.plan.weights[name].numel for name in planned))
        widest = max([widest, *(job.plan.weights[name].shape[1] for name in names if name in job.plan.weights)])
    of_block = max(blocks) + (3 * FLOAT32 * widest**2 if recipe.needs_moments else 0)
    vocabulary, width = skeleton.embedding_shape
    of_head = FLOAT32 * vocabulary * width if recipe.needs_gradients else 0
    return (LIBRARIES if job.device.type == "cpu" else 0) + max(of_block, of_head)


def bytes_needed(job: Job, decision: Decision | None) -> int:
    """Disk space for the result and, at the worst, for all activations of the run."""
    plan, recipe, linears = job.plan, job.recipe, job.plan.nbytes
    outliers = round(recipe.outliers * plan.numel) * 8 + sum(4 * w.shape[0] for w in plan.weights.values())
    if decision is not None:
        linears, outliers = decision.plan.nbytes, 0
    elif recipe.size is not None:
        linears = recipe.size - job.kept_nbytes
    elif recipe.average_bits is not None:
        linears = int(plan.numel * recipe.average_bits / 8)
    elif recipe.bounded or recipe.mix:
        linears = plan.numel
    activations = 0
    if recipe.needs_text:
        _, width = job.skeleton.embedding_shape
        lists = 4 + (len(job.skeleton.blocks) if recipe.needs_gradients and decision is None else 0)
        tokens = recipe.samples * recipe.seq_len
        if job.calibration is not None:
            tokens = len(job.samples) * job.calibration.seq_len
        activations = tokens * width * FLOAT32 * lists
    beside = sum(files_beside(job.path).values())
    return job.kept_nbytes + max(0, linears) + outliers + activations + beside


def check_room(job: Job, decision: Decision | None, out: Path) -> None:
    """Raises OutputError if memory or disk cannot suffice."""
    least, free = least_memory(job), memory.free_on(job.device)
    if free is not None and least > free:
        raise OutputError(
            f"this run needs at least {least / 1e9:.1f} GB of memory on {job.device}, and {free / 1e9:.1f} GB are "
            "free; take a smaller model or a machine with more, or --force to try"
        )
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, on_disk = bytes_needed(job, decision) / 1e9, shutil.disk_usage(folder).free / 1e9
    if needed > on_disk:
        raise OutputError(
            f"{out} needs {needed:.2f} GB during the run (activations included; fewer or shorter samples need less), "
            f"and {on_disk:.2f} GB are free on that disk; --force to try"
        )
