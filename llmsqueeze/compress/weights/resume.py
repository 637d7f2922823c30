"""The block loop in the journal: what a run notes behind every block, and how the same command goes on from there.

A step is `start`, when all that lies outside the blocks is written, or `block-<i>`. It has the digests of its shards,
the plan and the numbers of its linears, the state of the pace and of the witness, and the residual streams behind it,
in files that are removed when the next block is noted. The streams are the only large thing in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.compress.weights.group import Compressed, final_plan
from llmsqueeze.compress.weights.pace import Pace
from llmsqueeze.formats import native
from llmsqueeze.formats.folder import Output
from llmsqueeze.formats.verify import Witness
from llmsqueeze.journal import Journal, restoring
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.tensors import shard

START, BLOCK = "start", "block-"
STREAMS = ("original", "compressed")
NUMBERS = ("error", "sensitivity", "chance", "tokens")  # of a compressed linear, for the record


def step_of(index: int) -> str:
    """The step of a block."""
    return f"{BLOCK}{index}"


@dataclass
class Tally:
    """The linears that were compressed so far: their plans after that, and their numbers by kind."""

    plans: dict[str, WeightPlan] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=lambda: {kind: {} for kind in NUMBERS})

    def add(self, planned: WeightPlan, final: WeightPlan, numbers: Mapping[str, float | None]) -> None:
        self.plans[planned.name] = final
        for kind, number in numbers.items():
            if number is not None:
                self.numbers[kind][planned.name] = number


def numbers_of(one: Compressed) -> dict[str, float | None]:
    return {kind: getattr(one, kind) for kind in NUMBERS}


def note(
    output: Output,
    walk: Walk,
    step: str,
    before: str | None,
    shards: Sequence[str],
    plan: Plan,
    compressed: Mapping[str, Compressed],
    pace: Pace | None,
    witness: Witness | None,
    streams: ResidualStreams,
) -> None:
    """Notes a step behind the step `before`. The streams move to files of the journal."""
    journal = output.journal
    if not journal.active:
        return
    files = []
    for kind, stream in zip(STREAMS, (streams.original, streams.compressed), strict=True):
        if stream is not None and not (kind == STREAMS[1] and stream is streams.original):
            files.append(f"{step}.{kind}")
            stream.move_to(journal.file(files[-1]))
    if witness is not None and witness.hidden is not None:
        files.append(f"{step}.witness")
        shard.write(journal.file(files[-1]), {"hidden": witness.hidden})
    finals = {name: final_plan(plan.weights[name], one.parts) for name, one in compressed.items()}
    value = {
        "linears": {
            name: {"final": final.final, "rank": final.rank, **numbers_of(compressed[name])}
            for name, final in finals.items()
        },
        "pace": None if pace is None else pace.state(),
        "witness": None if witness is None else witness.state([*compressed, *(plan.beside if step == START else ())]),
        "layouts": walk.layouts(0 if before is None else int(step.removeprefix(BLOCK)) + 1),
        "streams": [
            None if stream is None else f"{step}.{STREAMS[0] if stream is streams.original else kind}"
            for kind, stream in zip(STREAMS, (streams.original, streams.compressed), strict=True)
        ],
    }
    without = [f"{before}.{kind}" for kind in STREAMS if before is not None]
    tensors = {shard: output.names_in(shard) for shard in shards}

    def when_written() -> dict[str, Any]:
        return value | {"shards": {shard: output.hex_digests(names) for shard, names in tensors.items()}}

    journal.note(step, when_written, files, without)


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: behind so many blocks, with these streams, the plans of what lies outside the blocks, and a
    tally of all linears but embeddings and head."""

    blocks: int
    streams: ResidualStreams
    ends: dict[str, WeightPlan]
    tally: Tally


def resumed(
    output: Output,
    plan: Plan,
    blocks: Sequence[Sequence[str]],
    pace: Pace | None,
    witness: Witness | None,
    walk: Walk,
) -> Resumed | None:
    """What the journal has of the block loop; output, pace and witness become what they were. None if it has nothing,
    or if a shard is not what was written: then all blocks are compressed again.

    blocks: the linears of each block.
    """
    journal, steps = output.journal, [START]
    if journal.value(START) is None:
        return None
    with restoring(journal.folder):
        steps += [step for step in map(step_of, range(len(blocks))) if journal.value(step) is not None]
        values = {step: journal.value(step) or {} for step in steps}
        if not all(output.take_over(*shard) for value in values.values() for shard in value["shards"].items()):
            output.start_over()
            journal.keep(step for step in journal.steps if step not in values)
            return None
        ends, tally = Tally(), Tally()
        for step, value in values.items():
            for name, noted in value["linears"].items():
                planned = plan.weights[name]
                if noted["final"]:
                    native.check_entry(name, {"shape": list(planned.shape), "parts": noted["final"]})
                final = replace(planned, final=tuple(noted["final"]), rank=noted["rank"])
                for one in [ends] * (step == START) + [tally] * (not planned.end):
                    one.add(planned, final, {kind: noted[kind] for kind in NUMBERS})
            if witness is not None:
                _show(journal, step, value, witness)
        last = values[steps[-1]]
        if pace is not None:
            pace.restore(last["pace"])
        walk.restore_layouts(len(steps) - 1, last["layouts"])
        return Resumed(len(steps) - 1, streams_of(journal, last["streams"], walk), ends.plans, tally)


def streams_of(journal: Journal, names: Sequence[str | None], walk: Walk) -> ResidualStreams:
    """The streams in files of the journal, by name; the same name is the same stream."""
    files = {name: journal.file(name) for name in names if name is not None}
    stored = {name: Activations.stored(walk.spill, file, len(walk.samples)) for name, file in files.items()}
    original, compressed = (None if name is None else stored[name] for name in names)
    return ResidualStreams(original, compressed)


def _show(journal: Journal, step: str, value: Mapping[str, Any], witness: Witness) -> None:
    """Lets the witness know what it had seen at a step."""
    file = f"{step}.witness"
    hidden = shard.read(journal.file(file))["hidden"] if journal.holds(file) else None
    witness.restore(value["witness"], hidden, step != START)
