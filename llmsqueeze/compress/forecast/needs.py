"""The forecast of a run's time, from the stages of a trial that compressed its first blocks.

    stage of the run = stage outside the blocks + stage of the tried blocks
                     + for each other block: stage of the last tried block that has work in it * its work / that work

`work` is what a stage's time grows with from block to block, in a unit of its own. So blocks may differ: in shapes, in
what is skipped, in their number of linears. Start-up, embeddings and head come once.

The first blocks alone are no model that could be opened. So `with_opening` takes what the parts of an opening are like:
`load` reads and decodes the folder as the verification does, and stock transformers start as this process did, while
those two run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.progress.stopwatch import Times

Shapes = Sequence[tuple[int, int]]  # [rows, cols] of linears
KINDS = ("seconds", "processor_seconds")
SHARED = ("forward", "backward", "moments", "round", "compensate")  # stages whose samples or rows processes share


@dataclass(frozen=True)
class Tried:
    """The times of a trial. outside: all but the blocks; blocks: of each that was tried, the first one first."""

    outside: Times
    blocks: Sequence[Times]


def forecast(tried: Tried, work: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """stage -> `seconds` and `processor_seconds` of the whole run. `work`: of every block, stage -> its work."""
    total = added([tried.outside, *tried.blocks])
    for block in work[len(tried.blocks) :]:
        for stage in total:
            like = max((i for i in range(len(tried.blocks)) if work[i].get(stage, 1.0)), default=None)
            if like is not None:
                factor = block.get(stage, 1.0) / work[like].get(stage, 1.0)
                for kind, seconds in tried.blocks[like].get(stage, {}).items():
                    total[stage][kind] += factor * seconds
    return {stage: {kind: round(one[kind], 4) for kind in KINDS} for stage, one in total.items()}


def with_opening(times: Times, stock: bool) -> dict[str, dict[str, float]]:
    """The times of a run with the opening of its result in its `verify`. stock: by stock transformers too."""
    nothing = dict.fromkeys(KINDS, 0.0)
    start, verify = times.get("start", nothing), times.get("verify", nothing)
    opened = {kind: (2 + stock) * verify[kind] + stock * start[kind] for kind in KINDS}
    opened["seconds"] -= stock * min(start["seconds"], 2 * verify["seconds"])
    return added([times]) | {"verify": {kind: round(spent, 4) for kind, spent in opened.items()}}


def shared(times: Times, processes: int) -> dict[str, dict[str, float]]:
    """The times of each of several processes: what they share takes its part, the rest is done by all or by the
    first."""
    return {
        stage: {kind: round(spent / (processes if stage in SHARED else 1), 4) for kind, spent in one.items()}
        for stage, one in times.items()
    }


def added(times: Sequence[Times]) -> dict[str, dict[str, float]]:
    """The sum of several times."""
    stages = dict.fromkeys(stage for one in times for stage in one)
    return {s: {kind: sum(one[s][kind] for one in times if s in one) for kind in KINDS} for s in stages}


def between(before: Times, after: Times) -> dict[str, dict[str, float]]:
    """What was spent from one reading of a stopwatch to a later one."""
    none = dict.fromkeys(KINDS, 0.0)
    return {s: {kind: one[kind] - before.get(s, none)[kind] for kind in KINDS} for s, one in after.items()}


def seconds(times: Times, kind: str = "seconds") -> float:
    """The sum over all stages."""
    return round(sum(one[kind] for one in times.values()), 3)


def work_of(skeleton: Skeleton, plan: Plan) -> list[dict[str, float]]:
    """The work of every block: stage -> its work. A stage that is not named takes equally long in all blocks."""
    return [
        block_work(
            [skeleton.shape(name) for name in names],
            [skeleton.shape(name) for name in names if name in plan.weights],
        )
        for names in skeleton.linears
    ]


def block_work(linears: Shapes, planned: Shapes) -> dict[str, float]:
    """stage -> work of a block with these linears, of which the `planned` ones are compressed."""
    return {stage: sum(grows(rows, cols) for rows, cols in linears) for stage, grows in OF_ALL.items()} | {
        stage: sum(grows(rows, cols) for rows, cols in planned) for stage, grows in OF_PLANNED.items()
    }


Growth = Callable[[int, int], float]
OF_ALL: dict[str, Growth] = dict.fromkeys(("read", "forward", "write", "verify"), lambda rows, cols: rows * cols)
OF_PLANNED: dict[str, Growth] = {
    "moments": lambda _rows, cols: cols**2,
    "factorise": lambda _rows, cols: cols**3,
    "round": lambda rows, cols: rows * cols,
    "compensate": lambda rows, cols: rows * cols**2,
    "pack": lambda rows, cols: rows * cols,
}
