"""The tables about a result: its scores, its comparison with other models, its contents, its check."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmsqueeze.cli.console import console
from llmsqueeze.cli.tables.runs import divergence
from llmsqueeze.cli.whole import Facts, Whole
from llmsqueeze.publish.numbers import code_widths, fixed, ranges, size
from llmsqueeze.publish.page.comparison import model_row, task_table
from llmsqueeze.publish.page.verdict import verdict
from llmsqueeze.publish.scores import reading, score_rows

PROGRAMS = {"native": "llmsqueeze.load", "transformers": "stock transformers", "vllm": "vLLM"}
SHOWN_ERRORS = 10
LONG_PATH = 24  # letters
ABOUT_FLIPS = "lost: from right to wrong; won: from wrong to right; p: of McNemar's exact test"


def print_evaluation(result: dict[str, Any]) -> None:
    """The scores before and after and their difference, or one column of scores without a baseline."""
    baseline = bool(result["baseline"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    rows = score_rows(result)
    for head in ("before", "after", "difference") if baseline else ("score",):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = (row.before, row.after, two_lines(row.difference, row.flips)) if baseline else (row.after,)
        table.add_row(Whole(row.name), *cells)
    out = console()
    if result["text"]:
        out.print(text_line(result))
    print_limit(result)
    out.print(table)
    if any(row.flips for row in rows):
        out.print(ABOUT_FLIPS)


def print_limit(result: dict[str, Any]) -> None:
    """That only a part of the data was measured, if so."""
    if result["limit"] is not None:
        part = f"{100 * result['limit']:g} %" if result["limit"] < 1 else f"at most {result['limit']}"
        console().print(f"limited: {part} of the windows of text and of the documents of each task")


def print_comparison(result: dict[str, Any]) -> None:
    """A line per model, smallest last; those on the frontier of bytes and loss have a star."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("model", min_width=13)
    for head in ("bytes", "bits/w", "perplexity", "loss +", "KL", "KL 99 %", "changed"):
        table.add_column(head, justify="right", no_wrap=True)
    models = [model | {"model": short_name(model["model"])} for model in result["models"]]
    for model in sorted(models, key=lambda one: -one["nbytes"]):
        table.add_row(*comparison_cells(model), style="bold" if model["on_frontier"] else None)
    out = console()
    if result["text"]:
        out.print(text_line(result))
    print_limit(result)
    out.print(table)
    if result["text"]:
        out.print("* no other model here is both smaller and better. loss: nats per token above the original's,")
        out.print("  ± one standard error of the paired difference. changed: share of the top-1 tokens")
    for sentence in verdict(models):
        out.print(Whole(sentence))
    if tasks := task_table(models):
        out.print(tasks_table(tasks))
        out.print(ABOUT_FLIPS)
    for reason in result["left_out"]:
        out.print(f"left out: {reason}", soft_wrap=True, markup=False)
    if result["kept_in"]:
        out.print(f"written for card and report to {', '.join(result['kept_in'])}", soft_wrap=True)


def text_line(result: dict[str, Any]) -> str:
    """The text and the dtype of the computation; `result`: that of `eval` or `compare`."""
    scores = result["models"][0] if "models" in result else result
    return (
        f"text: {result['text']}, {result['tokens']} tokens predicted in windows of {result['window']}"
        f"{reading(result)}, in {scores['computed_in']}"
    )


def comparison_cells(model: dict[str, Any]) -> list[str | Whole]:
    """The cells of a model in the table of the comparison; errors stand below their numbers."""
    row = model_row(0, model)
    texts = row["texts"]
    return [
        "*" if row["on_frontier"] else "",
        Whole(row["name"]),
        size(row["nbytes"]),
        fixed(row["bits_per_weight"], 2),
        *(texts[key].replace(" ±", "\n±") for key in ("perplexity", "loss", "kl_mean", "kl_p99", "top1_changed")),
    ]


def tasks_table(tasks: dict[str, Any]) -> Table:
    """For each metric of each task a line per model: score, paired difference from the original's, changed answers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("", "model"):
        table.add_column(head)
    for head in ("score", "paired difference"):
        table.add_column(head, justify="right", no_wrap=True)
    for at, (task, metric) in enumerate(tasks["heads"]):
        for name, place, cells in tasks["rows"]:
            cell = cells[at]
            head = f"{task} {metric}" if place == 1 else ""
            table.add_row(Whole(head), Whole(name), cell["text"], two_lines(cell["difference"], cell["flips"]))
    return table


def two_lines(first: str, second: str) -> str:
    """Two texts below each other, if there is a second."""
    return f"{first}\n{second}" if second else first


def short_name(model: str) -> str:
    """The last two parts of a long path: '…/runs/demo-3bit'."""
    name = model.rstrip("/")
    return "/".join(["…", *name.split("/")[-2:]]) if len(name) > LONG_PATH and name.count("/") > 1 else name


def print_contents(contents: dict[str, Any]) -> None:
    """The output of `show`: one line for linears whose names differ only by a number."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("linear", "blocks", "parts"):
        table.add_column(head)
    for head in ("", "bits/weight", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in contents["rows"]:
        bits = fixed(row["bits_per_weight"], 3)
        names = [Whole(text) for text in (row["pattern"], ranges(row["blocks"]), row["parts"])]
        table.add_row(*names, f"x{row['count']}", bits, size(row["nbytes"]))
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
    table = Facts()
    errors = result["errors"]
    for target, reason in result["verdicts"].items() if result["sound"] else ():
        verdict = f"does not open it: {reason}" if reason else "should open it (not tried)"
        table.add(PROGRAMS[target], verdict)
    if result["unknown"]:
        table.add("because", result["unknown"])
    for error in errors[:SHOWN_ERRORS]:
        table.add("error", error)
    if len(errors) > SHOWN_ERRORS:
        table.add("", f"and {len(errors) - SHOWN_ERRORS} more (--json lists all)")
    for note in result["notes"]:
        table.add("note", note)
    out = console()
    out.print(Whole(f"{result['folder']}: format {result['format']}, {result['state']}"))
    out.print(table)
