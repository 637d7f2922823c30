"""The table of `--profile-time`: the time of a run by stage."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmsqueeze.cli.console import console
from llmsqueeze.publish.page.times import TOTAL, time_rows


def print_times(title: str, times: Any) -> None:
    """Wall and processor time of each stage; nothing if they were not measured."""
    rows = time_rows(times)
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    for head in ("seconds", "processor", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        cells = row.stage, row.seconds, row.processor, row.share, row.meaning
        table.add_row(*cells, style="bold" if row.stage == TOTAL else None)
    console().print(table)
