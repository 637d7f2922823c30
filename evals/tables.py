"""Turns the JSON of `methods.py` into the Markdown tables of `results/methods.md`.

    python evals/tables.py evals/results/methods-*.json

Each row: bits per weight with everything counted, perplexity, and the loss it costs (increase of the mean nll over the
original, in nats per token, with the standard error of the paired difference), per width of the codes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    for file in sys.argv[1:]:
        print(table(json.loads(Path(file).read_text())))


def table(results: list[dict[str, Any]]) -> str:
    widths = sorted({row["bits"] for row in results})
    names = list(dict.fromkeys(row["row"] for row in results))
    cells = {(row["row"], row["bits"]): row for row in results}
    first = results[0]
    lines = [
        f"### {first['model']} (original perplexity {first['perplexity_original']:.4f})",
        "",
        "| method | " + " | ".join(f"{b}-bit codes: bpw | perplexity | loss" for b in widths) + " |",
        "|---|" + "---:|---:|---:|" * len(widths),
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(cells.get((name, bits))) for bits in widths) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return " | | "
    loss = f"{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}"
    return f"{row['bits_per_weight']:.3f} | {row['perplexity']:.3f} | {loss}"


if __name__ == "__main__":
    main()
