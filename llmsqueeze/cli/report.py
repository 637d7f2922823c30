"""What a person at the terminal sees: progress on stderr, tables on stdout, 100 columns at most, colour on a terminal.

When stderr is no terminal, progress is a plain line per compressed weight and per stage.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from llmsqueeze.progress import Progress

WIDTH = 100
STAGES = {
    "forward": "forward, block by block",
    "loss": "loss gradient, by sample",
    "weights": "weights, block by block",
    "trial": "trial of one block",
    "gradients": "weight gradients, block by block",
    "compress": "compress, block by block",
    "teacher": "teacher, block by block",
    "answers": "teacher's answers, by sample",
    "distill": "distillation, by step",
    "blockwise": "distillation, block by block",
    "sample": "sampling text, by batch",
    "rewrite": "writing, by file",
    "verify": "verification, block by block",
    "text": "perplexity, by batch",
    "tasks": "tasks, by lm-eval",
}


def console(stderr: bool = False) -> Console:
    """A console at most 100 columns wide; plain when it is not a terminal."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    made.width = min(made.width, WIDTH) if made.is_terminal else WIDTH
    return made


class TerminalProgress(Progress):
    """Bars with the time left on a terminal, lines elsewhere; weights with a large error are marked."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = console(stderr=True)
        self._quiet = quiet
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._stage, self._total, self._done, self._began = "", 0, 0, time.monotonic()
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description:32}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = RichProgress(*columns, console=self._console)

    def __enter__(self) -> TerminalProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    @contextmanager
    def foreign(self, name: str) -> Iterator[None]:
        if not self._bars:
            with super().foreign(name):
                yield
            return
        self._bars.stop()
        self._console.print(STAGES.get(name, name))
        with redirect_stdout(sys.stderr):  # stdout is for results
            yield
        self._bars.start()

    def stage(self, name: str, total: int) -> None:
        self._stage, self._total, self._done, self._began = STAGES.get(name, name), total, 0, time.monotonic()
        if self._bars:
            self._task = self._bars.add_task(self._stage, total=total)

    def advance(self) -> None:
        self._done += 1
        if self._bars and self._task is not None:
            self._bars.advance(self._task)
        elif not self._quiet and self._done in (1, self._total) and self._total:
            spent = time.monotonic() - self._began
            left = spent / self._done * (self._total - self._done)
            self._say(f"{self._stage}: {self._done}/{self._total}, {spent:.0f} s, about {left:.0f} s left")

    def weight(self, name: str, bits_per_weight: float, error: float) -> None:
        alarm = "  <-- large" if error > 0.5 else ""
        self._say(f"  {name:<58} {bits_per_weight:5.2f} bit   error {error:9.2e}{alarm}", "red" if alarm else None)

    def note(self, text: str) -> None:
        self._say(f"note: {text}", "yellow")

    def _say(self, text: str, style: str | None = None) -> None:
        if not self._quiet:
            self._console.print(text, style=style, markup=False)


def size(nbytes: float) -> str:
    """Bytes for people: 1.23 GB, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a `quantize` run."""
    calibration = summary["calibration"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("written to", summary["out"])
    outliers = f", {summary['outliers']} outliers kept as they were" if summary["outliers"] else ""
    table.add_row("method", f"{summary['method']}, codes of {width(summary['bits'])} bits{outliers}")
    table.add_row("bits per weight", f"{summary['bits_per_weight']:.3f} (everything stored for the quantized linears)")
    ratio = summary["nbytes_original"] / summary["nbytes"]
    table.add_row("size", f"{size(summary['nbytes'])}, was {size(summary['nbytes_original'])} ({ratio:.2f}x smaller)")
    if summary["predicted_loss_increase"] is not None:
        table.add_row("predicted", promise(summary["predicted_loss_increase"]))
    if "kl_before" in summary:
        table.add_row("distilled", divergence(summary))
    elif summary["method"] == "dbllm":
        command = shlex.join(["llmsqueeze", "distill", summary["out"]])
        table.add_row("next", f"{command} trains the scales, as the paper does")
    if "rounds" in summary:
        found = f"perplexity {100 * summary['perplexity_increase']:+.2f} %, KL {summary['kl_mean']:.4f}"
        table.add_row("on held-back text", f"{found} (measured, {len(summary['rounds'])} sizes tried)")
    if calibration is None:
        table.add_row("calibration", "none needed")
    else:
        rows = f"{calibration['samples']} x {calibration['seq_len']} tokens"
        table.add_row("calibration", f"{calibration['source']}, {rows}")
    table.add_row("format", format_and_why(summary))
    table.add_row("verified", verification(summary["verified"]))
    table.add_row("opens in", opening(summary["opens"]))
    table.add_row("time, memory", f"{summary['seconds']:.1f} s, peak {summary['peak_memory_mb']:.0f} MB")
    if summary["peak_device_memory_mb"]:
        table.add_row("", f"peak {summary['peak_device_memory_mb']:.0f} MB on the device")
    console().print(table)


def print_distillation(summary: dict[str, Any]) -> None:
    """The end of a `distill` run."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("written to", summary["out"])
    table.add_row("made of", f"{summary['model']}, taught by {summary['teacher']}")
    table.add_row("loss", f"{summary['loss']}, best of {summary['steps']} steps: {summary['best_step']}")
    table.add_row("held-back text", divergence(summary))
    if summary["codes_moved"]:
        table.add_row("codes", f"moved {summary['codes_moved']} times by one level")
    if summary["guarded"]:
        table.add_row("alphas", f"held in order {summary['guarded']} times, where they would have crossed")
    if summary["stopped"]:
        table.add_row("stopped", summary["stopped"])
    calibration = summary["calibration"]
    rows = f"{calibration['samples']} x {calibration['seq_len']} tokens"
    table.add_row("text", f"{calibration['source']}, {rows}")
    same = summary["nbytes"] == summary["nbytes_before"]
    before = "as before" if same else f"was {size(summary['nbytes_before'])}: the streams are made anew"
    table.add_row("size", f"{size(summary['nbytes'])}, {before}")
    table.add_row("time, memory", f"{summary['seconds']:.1f} s, peak {summary['peak_memory_mb']:.0f} MB")
    console().print(table)


def print_export(summary: dict[str, Any]) -> None:
    """The end of an `export`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("written to", summary["out"])
    table.add_row("format", f"{summary['target']}, {summary['linears']} compressed linears of {summary['model']}")
    if summary["target"] == "gguf-map":
        types = ", ".join(f"{count} x {kind}" for kind, count in summary["types"].items())
        table.add_row("types", types)
        bits = f"{summary['bits_per_weight']:.3f} bits per weight in llama.cpp's types"
        table.add_row("size", f"{bits}, {summary['bits_per_weight_before']:.3f} here")
    else:
        table.add_row("size", f"{size(summary['nbytes'])}, was {size(summary['nbytes_before'])}")
        table.add_row("verified", "all read back from disk, equal bit by bit")
    if "rerounded" in summary:
        table.add_row("rounded again", f"coded weights to {summary['rerounded']}; {reround_cost(summary)}")
    if summary["opens"]:
        table.add_row("opens in" if summary["target"] != "peft" else "base opens in", opening(summary["opens"]))
    out = console()
    out.print(table)
    if summary["target"] == "peft":
        rank = f"rank {summary['rank']}, for {summary['adapted']} linears, {size(summary['adapter_nbytes'])}"
        out.print(f"adapter: {rank}; to serve both:\n{summary['command']}", soft_wrap=True)
        out.print(f"in Python:\n{summary['code']}", soft_wrap=True, markup=False)
    if summary["target"] == "gguf-map":
        out.print("llama.cpp rounds the original anew by this map; its programs, in the folder as quantize.sh:")
        out.print("\n".join(summary["commands"]), soft_wrap=True)


def reround_cost(summary: dict[str, Any]) -> str:
    """What rounding coded weights again is predicted to cost, if that is known."""
    cost = summary["predicted_loss_increase"]
    return "the folder does not say what that costs" if cost is None else f"predicted {promise(cost)} more"


def format_and_why(summary: dict[str, Any]) -> str:
    """The format, what keeps the result from being portable, and what that would cost."""
    if summary["why_native"] is None:
        return f"{summary['format']}, which others open"
    if summary["why_native"] == "--native":
        return f"{summary['format']}, as asked for"
    text = f"{summary['format']}, not portable ({summary['why_native']})"
    if summary["predicted_portable"] is not None:
        return f"{text}\n--portable at this size: predicted loss +{summary['predicted_portable']:.4f}"
    return f"{text}\nwhat --portable costs was not measured; `llmsqueeze plan --portable` does"


def verification(verified: dict[str, float] | None) -> str:
    """How much of a result was read back and compared."""
    if verified is None:
        return "no (--no-verify); only checked for its form"
    blocks = f", and the outputs of {verified['blocks']} blocks" if verified["blocks"] else ""
    return f"{verified['weights']} weights read back from disk, equal bit by bit{blocks}"


def opening(verdicts: dict[str, str]) -> str:
    """Which targets open a folder, and why the others do not."""
    names = {"native": "llmsqueeze", "transformers": "transformers", "vllm": "vLLM"}
    good = ", ".join(names[one] for one, why in verdicts.items() if not why)
    bad = "".join(f"\nnot in {names[one]}: {why}" for one, why in verdicts.items() if why)
    return good + bad


def divergence(summary: dict[str, Any]) -> str:
    """What a distillation did to the divergence from the teacher."""
    before, after = summary["kl_before"], summary["kl_after"]
    return f"KL from the teacher {before:.4f} -> {after:.4f} nats per token ({100 * (after / before - 1):+.1f} %)"


def width(bits: float) -> str:
    """Mean width of codes: '3', '2.21'."""
    return f"{bits:.3g}" if bits == int(bits) else f"{bits:.2f} (mean)"


def promise(loss: float) -> str:
    """A predicted loss increase, for people."""
    return f"loss +{loss:.4f} nats per token, perplexity {100 * math.expm1(loss):+.2f} %"


def print_plan(plan: dict[str, Any]) -> None:
    """What `plan` decided: kinds of linear, widths as shares of their rows, bytes, predicted loss."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("linear", overflow="fold")
    table.add_column("% of rows on 1 2 ... 8 bits", no_wrap=True)
    for head in ("bits/weight", "bytes", "loss"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in plan["rows"]:
        shares = (
            "coded"
            if not row["rows"]
            else " ".join(
                f"{100 * row['rows'][str(bits)]:3.0f}" if str(bits) in row["rows"] else "  ." for bits in range(1, 9)
            )
        )
        kept = f" +{100 * row['outliers']:.2g} %" if row["outliers"] else ""
        loss = row["predicted_loss_increase"]
        table.add_row(
            f"{row['pattern']} x{row['count']}",
            shares + kept,
            f"{row['bits_per_weight']:.3f}",
            size(row["nbytes"]),
            "" if loss is None else f"{loss:.2e}",
        )
    out, rows = console(), plan["rows"]
    out.print(table)
    out.print(
        f"{plan['bits_per_weight']:.3f} bits per weight, everything counted, for codes of {width(plan['bits'])} bits; "
        f"all weights {size(plan['nbytes'])} ({plan['nbytes']} bytes), were {size(plan['nbytes_original'])}"
    )
    for what, unit in (("dual", "% of their rows dual-binary"), ("rank", "ranks on average")):
        found = [f"{row['pattern'].split('.')[-1]} {row[what] * (100 if what == 'dual' else 1):.2g}" for row in rows]
        if any(row[what] for row in rows):
            out.print(f"{unit}: {', '.join(found)}")
    if plan["predicted_loss_increase"] is not None:
        before = math.exp(min(plan["loss"], 700.0))
        after = math.exp(min(plan["loss"] + plan["predicted_loss_increase"], 700.0))
        said = f"on the calibration text {before:.3f} -> {after:.3f}"
        out.print(f"predicted: {promise(plan['predicted_loss_increase'])} ({said})")
    out.print(f"format: {format_and_why(plan)}")
    if plan["predicted_seconds"] is not None:
        memory = f"{plan['predicted_peak_memory_mb']:.0f} MB"
        out.print(f"predicted for quantize --plan: {plan['predicted_seconds']:.0f} s, peak memory {memory}")
    next_command = shlex.join(["llmsqueeze", "quantize", plan["given"], "--plan", f"{plan['out']}/plan.yaml"])
    out.print(f"written to {plan['out']}; next: {next_command}", soft_wrap=True)


def print_recipes(found: dict[str, Any]) -> None:
    """The recipes that come along, a line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for recipe in found["recipes"]:
        table.add_row(recipe["name"], recipe["purpose"])
    console().print(table)


def print_error(message: str) -> None:
    console(stderr=True).print(f"error: {message}", style="red", markup=False, soft_wrap=not sys.stderr.isatty())
