"""The table of a run that is not done."""

from __future__ import annotations

from typing import Any

from llmsqueeze.cli.console import STAGES, console, duration
from llmsqueeze.cli.whole import Facts


def print_unfinished(run: dict[str, Any]) -> None:
    """How far the run is, how long it took, what is left."""
    table = Facts()
    state = "runs" if run["runs"] else "has ended; the same command as before goes on from here"
    table.add("unfinished", run["path"])
    table.add("process", f"{run['process']} {state}")
    if run["stage"] is not None:
        table.add("stage", f"{STAGES.get(run['stage'], run['stage'])}: {run['done']} of {run['total']} done")
    if run["sample"] is not None:
        table.add("sample", f"{run['sample']} of {run['samples']}")
    if run["weight"] is not None:
        table.add("last weight", run["weight"])
    left = "" if run["left_seconds"] is None else f", about {duration(run['left_seconds'])} left"
    table.add("this stage", f"{duration(run['seconds'])} so far{left}")
    if run["runs"]:
        table.add("last sign", f"{duration(run['quiet_seconds'])} ago")
    table.add("memory", f"{run['memory_mb']:.0f} MB")
    if run["note"] is not None:
        table.add("last note", run["note"])
    console().print(table)
