"""The tables about a result: its scores, its comparison with other models, its contents, its check."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmsqueeze.cli.console import console
from llmsqueeze.cli.tables.runs import divergence
from llmsqueeze.publish.numbers import code_widths, fixed, size
from llmsqueeze.publish.page.comparison import model_row, task_table
from llmsqueeze.publish.scores import score_rows

PROGRAMS = {"native": "llmsqueeze.load", "transformers": "stock transformers", "vllm": "vLLM"}
SHOWN_ERRORS = 10


def print_evaluation(result: dict[str, Any]) -> None:
    """The scores before and after and their difference, or one column of scores without a baseline."""
    baseline = bool(result["baseline"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("before", "after", "difference") if baseline else ("score",):
        table.add_column(head, justify="right")
    for row in score_rows(result):
        table.add_row(row.name, *((row.before, row.after, row.difference) if baseline else (row.after,)))
    out = console()
    if result["text"]:
        out.print(text_line(result))
    out.print(table)


def print_comparison(result: dict[str, Any]) -> None:
    """A line per model, smallest last; those on the frontier of bytes and loss have a star."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("model", overflow="fold", min_width=13)
    for head in ("bytes", "bits/w", "perplexity", "loss +", "KL", "KL 99 %", "changed"):
        table.add_column(head, justify="right", no_wrap=True)
    for model in sorted(result["models"], key=lambda one: -one["nbytes"]):
        table.add_row(*comparison_cells(model), style="bold" if model["on_frontier"] else None)
    out = console()
    if result["text"]:
        out.print(text_line(result))
    out.print(table)
    if result["text"]:
        out.print("* no other model here is both smaller and better. loss: nats per token above the original's,")
        out.print("  ± one standard error of the paired difference. changed: share of the top-1 tokens")
    if tasks := task_table(result["models"]):
        out.print(tasks_table(tasks))
    for reason in result["left_out"]:
        out.print(f"left out: {reason}", soft_wrap=True, markup=False)
    if result["kept_in"]:
        out.print(f"written for card and report to {', '.join(result['kept_in'])}", soft_wrap=True)


def text_line(result: dict[str, Any]) -> str:
    """The text and the dtype of the computation; `result`: that of `eval` or `compare`."""
    scores = result["models"][0] if "models" in result else result
    return (
        f"text: {result['text']}, {result['tokens']} tokens predicted in windows of {result['window']}, "
        f"in {scores['computed_in']}"
    )


def comparison_cells(model: dict[str, Any]) -> list[str]:
    """The cells of a model in the table of the comparison."""
    row = model_row(0, model)
    name, texts = row["name"].rstrip("/"), row["texts"]
    return [
        "*" if row["on_frontier"] else "",
        name.rpartition("/")[2] if len(name) > 20 else name,
        size(row["nbytes"]),
        fixed(row["bits_per_weight"], 2),
        *(texts[key] for key in ("perplexity", "loss", "kl_mean", "kl_p99", "top1_changed")),
    ]


def tasks_table(tasks: dict[str, Any]) -> Table:
    """A score and its paired difference from the original's, for each metric of each task."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for task, metric in tasks["heads"]:
        table.add_column(f"{task} {metric}", justify="right")
        table.add_column("paired difference", justify="right")
    for name, _, cells in tasks["rows"]:
        table.add_row(name, *(text for cell in cells for text in (cell["text"], cell["difference"])))
    return table


def print_contents(contents: dict[str, Any]) -> None:
    """The output of `show`: one line for linears whose names differ only by a number."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("linear", "parts"):
        table.add_column(head, overflow="fold")
    for head in ("", "bits/weight", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in contents["rows"]:
        bits = fixed(row["bits_per_weight"], 3)
        table.add_row(row["pattern"], row["parts"], f"x{row['count']}", bits, size(row["nbytes"]))
    out = console()
    out.print(table)
    out.print(
        f"quantized linears: {fixed(contents['bits_per_weight'], 3)} bits per weight, all data counted; "
        f"{code_widths(contents['bits'])}"
    )
    if contents["plane_zeros"]:
        first, second = contents["plane_zeros"]
        out.print(
            f"zeros in the planes of dual-binary weights: {fixed(100 * first, 1)} % and {fixed(100 * second, 1)} %"
        )
    before = f", was {size(contents['nbytes_original'])}" if contents["nbytes_original"] else ""
    out.print(f"unchanged tensors: {size(contents['kept_nbytes'])}; all weights: {size(contents['nbytes'])}{before}")
    if contents["model"]:
        out.print(f"made from {contents['model']} by method {contents['method']}")
    for distillation in contents["distillation"]:
        settings = distillation["settings"]
        loss = "block by block" if settings["blockwise"] else f"loss {settings['loss']}"
        effect = divergence(distillation)
        out.print(f"distilled from {distillation['teacher']}, {loss}, {settings['steps']} steps: {effect}")
    if contents["recipe"]:
        out.print("recipe.yaml that makes it again (llmsqueeze quantize MODEL --recipe recipe.yaml):")
        for key, value in contents["recipe"].items():
            out.print(f"    {key}: {json.dumps(value)}", soft_wrap=True, markup=False)


def print_check(result: dict[str, Any]) -> None:
    """The output of `check`: a verdict per program, then errors and notes."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    errors = result["errors"]
    for target, reason in result["verdicts"].items() if result["sound"] else ():
        verdict = f"does not open it: {reason}" if reason else "should open it (not tried)"
        table.add_row(PROGRAMS[target], verdict)
    if result["unknown"]:
        table.add_row("because", result["unknown"])
    for error in errors[:SHOWN_ERRORS]:
        table.add_row("error", error)
    if len(errors) > SHOWN_ERRORS:
        table.add_row("", f"and {len(errors) - SHOWN_ERRORS} more (--json lists all)")
    for note in result["notes"]:
        table.add_row("note", note)
    out = console()
    out.print(f"{result['folder']}: format {result['format']}, {result['state']}")
    out.print(table)
