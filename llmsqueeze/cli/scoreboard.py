"""The tables about a result: its scores alone and beside others, what its weights hold, whether it is sound."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmsqueeze.cli.report import console, divergence, size, width


def print_evaluation(result: dict[str, Any]) -> None:
    """Before, after, difference; or one column of scores where there is no baseline."""
    baseline = result["baseline"]
    out = console()
    if result["text"]:
        out.print(f"text: {result['text']}, {result['tokens']} tokens predicted in windows of {result['window']}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("before", "after", "difference") if baseline else ("score",):
        table.add_column(head, justify="right")
    if result["perplexity"] is not None:
        cells = [_with_error(result["perplexity"], result["perplexity_stderr"], 3)]
        if baseline:
            change = result["perplexity"] / baseline["perplexity"] - 1
            before = _with_error(baseline["perplexity"], baseline["perplexity_stderr"], 3)
            cells = [before, *cells, f"{100 * change:+.2f} % ± {100 * result['nll_difference_stderr']:.2f}"]
        table.add_row("perplexity", *cells)
    if result["kl_mean"] is not None:
        table.add_row("KL to before, mean (nats)", "0", f"{result['kl_mean']:.4f}", "")
        table.add_row("KL to before, 99th percentile", "0", f"{result['kl_p99']:.4f}", "")
        table.add_row("likeliest token changed", "0", f"{100 * result['top1_changed']:.2f} %", "")
    for task, metrics in result["tasks"].items():
        for metric in [name for name in metrics if not name.endswith("_stderr")]:
            _task_row(table, task, metric, metrics, baseline["tasks"].get(task, {}) if baseline else None)
    out.print(table)


def print_comparison(result: dict[str, Any]) -> None:
    """A line per model, smallest last; those on the frontier of bytes and loss are marked."""
    out, models = console(), result["models"]
    if result["text"]:
        out.print(f"text: {result['text']}, {result['tokens']} tokens predicted in windows of {result['window']}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("model", overflow="fold", min_width=13)
    for head in ("bytes", "bits/w", "perplexity", "loss +", "KL", "KL 99 %", "changed"):
        table.add_column(head, justify="right", no_wrap=True)
    for model in sorted(models, key=lambda one: -one["nbytes"]):
        name = str(model["model"]).rstrip("/").rpartition("/")[2] if len(model["model"]) > 20 else model["model"]
        cells = ["*" if model["on_frontier"] else "", name, size(model["nbytes"])]
        cells.append(f"{model['bits_per_weight']:.2f}")
        if model["perplexity"] is not None:
            loss = _with_error(model["nll_difference"], model["nll_difference_stderr"], 4)
            cells += [f"{model['perplexity']:.3f}", loss, f"{model['kl_mean']:.4f}", f"{model['kl_p99']:.3f}"]
            cells.append(f"{100 * model['top1_changed']:.2f} %")
        table.add_row(*cells, style="bold" if model["on_frontier"] else None)
    out.print(table)
    if result["text"]:
        out.print("* nothing here is both smaller and better; loss in nats per token above the original's,")
        out.print("  ± one standard error of the paired difference; changed: of the likeliest next tokens")
    for task in models[0]["tasks"]:
        out.print(_tasks_table(task, models))
    for why in result["left_out"]:
        out.print(f"left out: {why}", soft_wrap=True, markup=False)
    if result["kept_in"]:
        out.print(f"kept for card and report in {', '.join(result['kept_in'])}", soft_wrap=True)


def _tasks_table(task: str, models: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(task, overflow="fold")
    metrics = [name for name in models[0]["tasks"][task] if not name.endswith(("_stderr", "_difference"))]
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
        table.add_column("paired difference", justify="right", no_wrap=True)
    for model in models:
        scores, cells = model["tasks"][task], []
        for metric in metrics:
            error, spread = scores.get(f"{metric}_stderr"), scores.get(f"{metric}_difference_stderr")
            cells.append(_with_error(scores[metric], error, 4))
            difference = scores.get(f"{metric}_difference", 0.0)
            cells.append(
                "" if model["kind"] == "original" else f"{difference:+.4f}" + (f" ± {spread:.4f}" if spread else "")
            )
        table.add_row(str(model["model"]), *cells)
    return table


def _task_row(table: Table, task: str, metric: str, after: dict[str, float], before: dict[str, float] | None) -> None:
    error = after.get(f"{metric}_stderr")
    cells = [_with_error(after[metric], error, 4)]
    if before is not None:
        both = [before.get(f"{metric}_stderr"), error]
        spread = sum(e**2 for e in both if e is not None) ** 0.5
        cells = [
            _with_error(before[metric], both[0], 4),
            *cells,
            f"{after[metric] - before[metric]:+.4f} ± {spread:.4f}",
        ]
    table.add_row(f"{task} {metric}", *cells)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def print_contents(contents: dict[str, Any]) -> None:
    """What `show` prints: one line for linears that differ only by their number."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for head in ("linear", "holds"):
        table.add_column(head, overflow="fold")
    for head in ("", "bits/weight", "bytes"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in contents["rows"]:
        table.add_row(
            row["pattern"],
            row["holds"],
            f"x{row['count']}",
            f"{row['bits_per_weight']:.3f}",
            size(row["nbytes"]),
        )
    out = console()
    out.print(table)
    out.print(
        f"quantized linears: {contents['bits_per_weight']:.3f} bits per weight, everything stored for them counted; "
        f"codes of {width(contents['bits'])} bits"
    )
    if contents["plane_zeros"]:
        first, second = contents["plane_zeros"]
        out.print(f"zeros in the planes of dual-binary weights: {first:.1%} and {second:.1%}")
    before = f", was {size(contents['nbytes_original'])}" if contents["nbytes_original"] else ""
    out.print(f"kept as they were: {size(contents['kept_nbytes'])}; all weights: {size(contents['nbytes'])}{before}")
    if contents["model"]:
        out.print(f"made from {contents['model']} by method {contents['method']}")
    for taught in contents["distillation"]:
        loss = "block by block" if taught["settings"]["blockwise"] else f"loss {taught['settings']['loss']}"
        steps = f"{taught['settings']['steps']} steps"
        out.print(f"distilled from {taught['teacher']}, {loss}, {steps}: {divergence(taught)}")
    if contents["recipe"]:
        out.print("recipe.yaml that makes it again (llmsqueeze quantize MODEL --recipe recipe.yaml):")
        for key, value in contents["recipe"].items():
            out.print(f"    {key}: {json.dumps(value)}", soft_wrap=True, markup=False)


def print_check(result: dict[str, Any]) -> None:
    """What `check` found: a verdict per target, then what is wrong and what is good to know."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    names = {"native": "llmsqueeze.load", "transformers": "stock transformers", "vllm": "vLLM"}
    errors = result["errors"]
    for target, why in result["verdicts"].items() if not errors else ():
        table.add_row(names[target], f"does not open it: {why}" if why else "opens it, by all that is written here")
    for error in errors[:10]:
        table.add_row("error", error)
    if len(errors) > 10:
        table.add_row("", f"and {len(errors) - 10} more (--json has all)")
    for note in result["notes"]:
        table.add_row("note", note)
    out = console()
    out.print(f"{result['folder']}: format {result['format']}, {'sound' if result['sound'] else 'not sound'}")
    out.print(table)
