"""Turns the JSON of `methods.py`, `allocation.py` and `below_three.py` into the Markdown tables of `results/`.

    python evals/tables.py evals/results/methods-*.json

Each row: bits per weight with everything counted, perplexity, and the loss it costs (increase of the mean nll over the
original, in nats per token, with the standard error of the paired difference).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HEADS = {
    "bars": "The size of plain GPTQ (group 64, original inputs)",
    "equal": "Equal bytes",
    "mixes": "MixLLM as in its paper",
}


def main() -> None:
    for file in sys.argv[1:]:
        results = json.loads(Path(file).read_text())
        kind = allocations if "table" in results[0] else sizes if "size" in results[0] else methods
        print(kind(results))


def methods(results: list[dict[str, Any]]) -> str:
    """Rows by method, a column per width of the codes."""
    widths = sorted({row["bits"] for row in results})
    names = list(dict.fromkeys(row["row"] for row in results))
    cells = {(row["row"], row["bits"]): row for row in results}
    lines = [
        heading(results),
        "",
        "| method | " + " | ".join(f"{b}-bit codes: bpw | perplexity | loss" for b in widths) + " |",
        "|---|" + "---:|---:|---:|" * len(widths),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(cells.get((name, bits))) for bits in widths) + " |")
    return "\n".join(lines) + "\n"


def sizes(results: list[dict[str, Any]]) -> str:
    """Rows of `below_three.py` by name, a column per size."""
    wanted = sorted({row["size"] for row in results})

    # the width and the group size that a name carries differ from size to size
    def plain(row: dict[str, Any]) -> str:
        return re.sub(r" \d bit g\d+", "", row["name"])

    names = list(dict.fromkeys(plain(row) for row in results))
    cells = {(plain(row), row["size"]): row for row in results}
    lines = [
        f"### {results[0]['model']}",
        "",
        "| | " + " | ".join(f"{size} bits: bpw | loss | KL" for size in wanted) + " |",
        "|---|" + "---:|---:|---:|" * len(wanted),
    ]
    for name in names:
        rows = [cells.get((name, size)) for size in wanted]
        shown = [
            "| | "
            if row is None
            else f"{row['bits_per_weight']:.2f} | {row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f} | "
            f"{row['kl_mean']:.4f}"
            for row in rows
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def allocations(results: list[dict[str, Any]]) -> str:
    """A table per kind of comparison; orders that differ by their seed are one row."""
    lines = [heading(results)]
    for table in dict.fromkeys(row["table"] for row in results):
        lines += ["", f"**{HEADS[table]}**", "", "| | bpw | perplexity | loss | KL | predicted loss |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        folded: dict[str, list[dict[str, Any]]] = {}
        for row in results:
            if row["table"] == table:
                folded.setdefault(re.sub(r", order \d+", "", row["row"]), []).append(row)
        lines += [folded_row(name, rows) for name, rows in folded.items()]
    return "\n".join(lines) + "\n"


def folded_row(name: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    if len(rows) == 1:
        promised = first["predicted_loss_increase"]
        cells = [cell(first), f"{first['kl_mean']:.4f}", "" if promised is None else f"{promised:.4f}"]
        return f"| {name} | " + " | ".join(cells) + " |"
    losses, kls = [[row[key] for row in rows] for key in ("nll_difference", "kl_mean")]
    loss, kl = (f"{sum(v) / len(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in (losses, kls))
    perplexity = sum(row["perplexity"] for row in rows) / len(rows)
    label = f"{name}, mean of {len(rows)} orders"
    return f"| {label} | {first['bits_per_weight']:.3f} | {perplexity:.3f} | {loss} | {kl} | |"


def heading(results: list[dict[str, Any]]) -> str:
    return f"### {results[0]['model']} (original perplexity {results[0]['perplexity_original']:.4f})"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return " | | "
    loss = f"{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}"
    return f"{row['bits_per_weight']:.3f} | {row['perplexity']:.3f} | {loss}"


if __name__ == "__main__":
    main()
