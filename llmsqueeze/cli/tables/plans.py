"""The table at the end of `plan`."""

from __future__ import annotations

import math
import shlex
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmsqueeze.cli.console import console
from llmsqueeze.cli.tables.runs import about_beside, format_and_why, predicted_increase, predicted_interval
from llmsqueeze.cli.tables.times import print_times
from llmsqueeze.cli.whole import Whole
from llmsqueeze.publish.numbers import RANKINGS, by_score, code_widths, fixed, perplexity, ranges, size


def print_plan(plan: dict[str, Any]) -> None:
    """The summary of `plan`: kinds of linear, the blocks on each width, bytes, predicted loss."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("linear", "bits of which blocks"):
        table.add_column(head)
    for head in ("bits/weight", "bytes", "loss"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in plan["rows"]:
        table.add_row(*plan_cells(row))
    out, rows = console(), plan["rows"]
    out.print(table)
    widths = f", for {code_widths(plan['bits'])}" if any(row["rows"] for row in rows) else ""
    out.print(
        f"{fixed(plan['bits_per_weight'], 3)} bits per weight, all data counted{widths}; "
        f"all weights {size(plan['nbytes'])} ({plan['nbytes']} bytes), were {size(plan['nbytes_original'])}"
    )
    for label, text in about_beside(plan):
        out.print(f"{label}: {text}")
    for key, unit in (("dual", "% of their rows dual-binary"), ("rank", "ranks on average")):
        if any(row[key] for row in rows):
            factor = 100 if key == "dual" else 1
            values = [f"{row['pattern'].split('.')[-1]} {row[key] * factor:.2g}" for row in rows]
            out.print(f"{unit}: {', '.join(values)}")
    for ranking, scores in plan["block_scores"].items():
        out.print(f"blocks by {RANKINGS[ranking].name}, the most important first: {by_score(ranking, scores)}")
    if plan["predicted_loss_increase"] is not None:
        out.print(f"predicted: {predicted_increase(plan['predicted_loss_increase'])} ({predicted_perplexity(plan)})")
        out.print(f"predicted: {predicted_interval(plan['predicted_loss_interval'])}")
    out.print(f"format: {format_and_why(plan)}")
    if plan["predicted_seconds"] is not None:
        memory = f"{plan['predicted_peak_memory_mb']:.0f} MB"
        among = f" by {plan['processes']} processes" if plan["processes"] > 1 else ""
        disk = f"disk {size(plan['predicted_disk_bytes'])}"
        out.print(
            f"predicted for quantize --plan{among}: {plan['predicted_seconds']:.0f} s, peak memory {memory}, {disk}"
        )
    if plan["time"] is not None:
        print_times("time of this plan", plan["time"])
        print_times("predicted time", plan["predicted_time"])
    next_command = shlex.join(
        ["llmsqueeze", "quantize", plan["given"], *plan["options"], "--plan", f"{plan['out']}/plan.yaml"]
    )
    out.print(f"written to {plan['out']}; next: {next_command}", soft_wrap=True)


def plan_cells(row: dict[str, Any]) -> list[str | Whole]:
    """The cells of a kind of linear: the blocks on each width, the share of its rows, and of its outliers."""
    outliers = f" + {100 * row['outliers']:.2g} % outliers" if row["outliers"] else ""
    loss = row["predicted_loss_increase"]
    return [
        Whole(f"{row['pattern']} x{row['count']}"),
        Whole(widths(row) + outliers),
        fixed(row["bits_per_weight"], 3),
        size(row["nbytes"]),
        "" if loss is None else f"{loss:.2e}",
    ]


def widths(row: dict[str, Any]) -> str:
    """'4 bits: 0-7', and on the next line '2 bits: 8-29'; '2+4 bits (rows: 75% on 2, 25% on 4)', or 'coded'."""
    if not row["rows"]:
        return "coded"
    places = sorted(row["blocks"].items(), key=lambda place: place[1])
    one = "+".join(row["rows"]) if len(places) < 2 else ""
    text = f"{one} bits" if one else "\n".join(f"{bits} bits: {ranges(blocks)}" for bits, blocks in places)
    if not any("+" in bits for bits in (one, *row["blocks"])):
        return text
    shares = ", ".join(f"{share:.0%} on {bits}" for bits, share in row["rows"].items())
    return f"{text} (rows: {shares})"


def predicted_perplexity(plan: dict[str, Any]) -> str:
    """The perplexity on the calibration text, before and after."""
    losses = (plan["loss"], plan["loss"] + plan["predicted_loss_increase"])
    before, after = (perplexity(math.exp(min(loss, 700.0))) for loss in losses)
    return f"on the calibration text {before} -> {after}"
