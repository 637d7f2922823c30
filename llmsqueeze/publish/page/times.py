"""The time of a run by stage, as rows of a table; terminal and report show the same."""

from __future__ import annotations

from typing import Any, NamedTuple

from llmsqueeze.progress.stopwatch import STAGES
from llmsqueeze.publish.folder import mapping
from llmsqueeze.publish.numbers import finite, fixed, percent

TOTAL = "all"


class TimeRow(NamedTuple):
    """A stage, what happens in it, its wall time and its processor time in seconds, its share of the wall time."""

    stage: str
    meaning: str
    seconds: str
    processor: str
    share: str


def time_rows(times: Any) -> list[TimeRow]:
    """The stages in the order of a run, and their sum; [] if nothing was measured."""
    measured = {stage: mapping(mapping(times).get(stage)) for stage in STAGES}
    wall, processor = (
        {stage: finite(one.get(kind)) or 0.0 for stage, one in measured.items()}
        for kind in ("seconds", "processor_seconds")
    )
    total = sum(wall.values())
    if not total > 0:
        return []
    rows = [(stage, meaning, wall[stage], processor[stage]) for stage, meaning in STAGES.items() if measured[stage]]
    rows.append((TOTAL, "", total, sum(processor.values())))
    return [TimeRow(name, words, fixed(a, 2), fixed(b, 2), percent(max(a, 0.0) / total)) for name, words, a, b in rows]
