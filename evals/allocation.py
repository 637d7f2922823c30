"""Allocators at equal bytes: uniform, random blocks, LIM, ZD, MixLLM rows, the budget; and the bars of the budget.

    python evals/allocation.py MODEL CALIBRATION EVAL_TEXT [--rows ...] [--limit N] [--out FILE.json]

Every row is a real `quantize` and a real `eval` of the folder written, as in methods.py. All use descent.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from methods import add_arguments, measure

from llmsqueeze.cli.terminal import hush

PLAIN = {"symmetric": False, "group_size": 64}


def equal_bytes(sizes: list[float]) -> dict[str, dict[str, Any]]:
    """Name -> settings of the rows at equal bytes; two widths for whole blocks, 4 and 2 bits (8 and 4 above 4.3).

    A model of few blocks can have but a few sizes that way: name those.
    """
    rows: dict[str, dict[str, Any]] = {}
    for bits in sizes:
        auto = {"method": "budget", "bits": bits}
        rows[f"{bits} uniform"] = {**auto, "importance": "uniform"}
        rows[f"{bits} uniform, integer levels"] = {**auto, "importance": "uniform", "levels": "integer"}
        for seed in range(5):
            rows[f"{bits} random blocks, order {seed}"] = layerwise(bits, "random") | {"seed": seed}
        for importance in ("lim", "zd", "reverse", "first"):
            rows[f"{bits} {importance}"] = layerwise(bits, importance)
        # a low width that leaves room for some rows of 8 bits
        rows[f"{bits} mixllm rows"] = {"method": "mixllm", "bits": bits, "low_bits": int(bits - 0.2)}
        rows[f"{bits} budget, per row"] = auto
        rows[f"{bits} budget, per linear"] = {**auto, "granularity": "linear"}
        rows[f"{bits} budget, per group"] = {**auto, "granularity": "group"}
        rows[f"{bits} budget, portable"] = {**auto, "portable": True}
    return rows


def layerwise(bits: float, importance: str) -> dict[str, Any]:
    return {"method": "layerwise", "bits": bits, "importance": importance}


def bars(_sizes: list[float]) -> dict[str, dict[str, Any]]:
    """The budget at the size of plain GPTQ, and what it may be given."""
    rows: dict[str, dict[str, Any]] = {}
    for bits in (2, 3, 4):
        size = round(bits + 18 / 64 + 0.02 * (bits - 2), 2)  # what GPTQ at group 64 takes
        rows[f"gptq {bits} g64, original inputs"] = {"method": "gptq", "bits": bits, "inputs": "original", **PLAIN}
        auto = {"method": "budget", "bits": size}
        rows[f"{size} per row"] = auto
        rows[f"{size} per linear"] = {**auto, "granularity": "linear"}
        rows[f"{size} portable"] = {**auto, "portable": True}
        rows[f"{size} per row, integer levels"] = {**auto, "levels": "integer"}
        rows[f"{size} per row, half-integer levels"] = {**auto, "levels": "half"}
        rows[f"{size} per row, widths from 2"] = {**auto, "widths": [2, 3, 4, 5, 6, 8]}
        rows[f"{size} per row, groups 64, 128, row"] = {**auto, "group_sizes": [64, 128, -1]}
        rows[f"{size} per row, outliers 1, 3 %"] = {**auto, "row_outliers": [0.01, 0.03]}
        rows[f"{size} per row, labels from the text"] = {**auto, "labels": "text"}
    return rows


def mixes(_sizes: list[float]) -> dict[str, dict[str, Any]]:
    """MixLLM as in its paper, by GPTQ with searched scales, against GPTQ at 4 and RTN at 5 bits, group 128."""
    paper = {"quantizer": "gptq", "search": True}
    rows: dict[str, dict[str, Any]] = {
        "rtn 4": {"method": "rtn", "bits": 4, "symmetric": False},
        "rtn 5": {"method": "rtn", "bits": 5, "symmetric": False},
        "gptq 4": {"method": "gptq", "bits": 4, "symmetric": False, "search": True},
    }
    for share in (0.1, 0.2):
        for importance in ("salience", "cost", "random", "reverse"):
            given = {"method": "mixllm", "high_fraction": share, "importance": importance, **paper}
            rows[f"mixllm {share:.0%}, {importance}"] = given
    rows["mixllm 6/4/3, salience"] = {"method": "mixllm", "mix": {6: 0.1, 4: 0.6}, "low_bits": 3, **paper}
    return rows


TABLES = {"equal": equal_bytes, "bars": bars, "mixes": mixes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--sizes", nargs="+", type=float, default=[2.5, 3.0, 3.5, 4.5])
    parser.add_argument("--only", help="regular expression that the rows' names must contain")
    args = parser.parse_args()
    hush()
    results = []
    for table in args.tables:
        for name, settings in TABLES[table](args.sizes).items():
            if args.only and not re.search(args.only, name):
                continue
            row = {"table": table, **measure(args, name, settings)}
            results.append(row)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
            promised = row["predicted_loss_increase"]
            print(
                f"{table} {name:38} {row['bits_per_weight']:6.3f} bpw  ppl {row['perplexity']:8.4f}  "
                f"nll +{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}  KL {row['kl_mean']:.4f}"
                + (f"  predicted {promised:.4f}" if promised is not None else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
