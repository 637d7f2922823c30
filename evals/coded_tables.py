"""Turns the JSON of `coded.py`, and what other files of results hold of the same model, into Markdown and a plot.

    python evals/coded_tables.py evals/results/coded-*.json [--plot evals/results/coded.svg]

Coded losses between measured sizes are interpolated: the logarithm of the loss, over bits per weight.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from coded import SIZES

Row = dict[str, Any]
VARIANTS = ("equal rates", "no column steps", "no contexts", "no correction", "sequential, no correction")
# file of results -> the rows that are shown of it
ELSEWHERE = {
    "methods": r"rtn g64|gwq best, descent g128|gwq paper, descent g128",
    "allocation": r".* lim|.*, portable|[\d.]+ portable|mixllm 6/4/3, salience",
    "below-three": r"dual binary \+ (kd|dad)|auto \+ kd|descent 2 bit g64 \+ kd",
    "peers": r"(?!the original).*",
}
HEAD = "| asked for | bits per weight | loss | spread | KL | perplexity | promised |"
OTHER_HEAD = "| other | bits per weight | its loss | coded at these bytes | coded / it |"
STYLES = {
    "coded": "C0o-",
    "budget": "C1s-",
    "gptq": "C2^-",
    "gwq": "C3v",
    "mixllm": "C4*",
    "autoround": "C5D",
    "hqq": "C6x",
    "llamacpp": "C7+",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    for file in args.files:
        print("\n".join(section(file)), end="\n\n")
    if args.plot:
        plot(args.files, args.plot)


def section(file: Path) -> list[str]:
    """Everything about one model."""
    rows = json.loads(file.read_text())
    lines = [f"## {rows[0]['model']}", "", HEAD, "|---:|---:|---:|---|---:|---:|---:|"]
    lines += [asked(drawn[0]["bits"], drawn) for drawn in sizes_of(rows)]
    sizes = sorted({row["bits"] for name in VARIANTS for row in of(rows, name)})
    lines += ["", "Without one of its ideas, at the same bytes: loss, and how many times that of coded.", ""]
    lines += ["| | " + " | ".join(f"{bits:g}" for bits in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for name in VARIANTS:
        by_bits = {row["bits"]: row for row in of(rows, name)}
        if by_bits:
            lines.append(f"| {name} | " + " | ".join(against(rows, by_bits.get(bits)) for bits in sizes) + " |")
    lines += ["", OTHER_HEAD, "|---|---:|---:|---:|---:|"]
    for row in sorted(others(file, rows), key=lambda row: float(row["bits_per_weight"])):
        ours = coded_at(rows, row["bits_per_weight"])
        if ours is not None:
            lines.append(
                f"| {row['shown']} | {row['bits_per_weight']:.3f} | {row['nll_difference']:.4f} | {ours:.4f} | "
                f"{ours / row['nll_difference']:.2f} |"
            )
    return lines


def of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["row"] == name]


def sizes_of(rows: list[Row]) -> list[list[Row]]:
    """The coded rows, draws of the text together, by the size that was asked for."""
    sizes = sorted({row["bits"] for row in of(rows, "coded")})
    return [[row for row in of(rows, "coded") if row["bits"] == bits] for bits in sizes]


def mean(rows: list[Row], key: str) -> float:
    return float(sum(row[key] for row in rows) / len(rows))


def asked(bits: float, rows: list[Row]) -> str:
    """A size, the draws of the text together."""
    losses = [row["nll_difference"] for row in rows]
    spread = f"{min(losses):.4f} to {max(losses):.4f} ({len(rows)} draws)" if len(rows) > 1 else "one draw"
    return (
        f"| {bits:g} | {mean(rows, 'bits_per_weight'):.3f} | {mean(rows, 'nll_difference'):.4f} ± "
        f"{mean(rows, 'nll_difference_stderr'):.4f} | {spread} | {mean(rows, 'kl_mean'):.4f} | "
        f"{mean(rows, 'perplexity'):.3f} | {mean(rows, 'predicted_loss_increase'):.4f} |"
    )


def against(rows: list[Row], row: Row | None) -> str:
    ours = None if row is None else coded_at(rows, row["bits_per_weight"])
    if row is None or ours is None:
        return ""
    return f"{row['nll_difference']:.4f} ({row['nll_difference'] / ours:.2f})"


def coded_at(rows: list[Row], bits: float) -> float | None:
    """The loss of coded weights at so many bits; None outside what was measured."""
    points = sorted((mean(drawn, "bits_per_weight"), mean(drawn, "nll_difference")) for drawn in sizes_of(rows))
    at, losses = zip(*points, strict=True)
    if not at[0] - 0.02 <= bits <= at[-1] + 0.02:
        return None
    return math.exp(float(np.interp(bits, at, np.log(losses))))


def others(file: Path, rows: list[Row]) -> Iterator[Row]:
    """What else was measured of the model: in the same harness (bold), and in files beside this one."""
    model = rows[0]["model"]
    for row in rows:
        if row["row"] not in ("coded", *VARIANTS):
            width = f"{row['bits']} bit " if row["row"] in SIZES and row["row"] != "mixllm rows" else ""
            yield row | {"shown": f"**{width}{row['row']}**"}
    for kind, pattern in ELSEWHERE.items():
        beside = file.with_name(f"{kind}-{model}.json")
        for row in json.loads(beside.read_text()) if beside.exists() else []:
            name = str(row.get("row") or row["name"])
            if row.get("bits_per_weight") and re.fullmatch(pattern, name):
                width = f"{row['bits']} bit " if kind == "methods" else ""
                tool = f"{row['tool']} " if "tool" in row else ""
                yield row | {"shown": tool + width + name.replace("auto", "budget")}


def points_of(name: str, file: Path, rows: list[Row]) -> list[tuple[float, float]]:
    """Bits per weight and loss of everything whose name has this in it, distilled and portable ones left out."""
    if name == "coded":
        losses = {mean(of_size, "bits_per_weight"): mean(of_size, "nll_difference") for of_size in sizes_of(rows)}
    else:
        mine = [
            row for row in others(file, rows) if name in row["shown"] and not re.search(r"\+|portable", row["shown"])
        ]
        losses = {row["bits_per_weight"]: row["nll_difference"] for row in mine}
    return sorted((bits, loss) for bits, loss in losses.items() if bits < 5 and loss > 0)


def plot(files: list[Path], path: Path) -> None:
    """Loss over bits per weight, a panel per model; the loss logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "llmsqueeze", "font.size": 9}):
        size = (4.2 * len(files), 4.4)
        figure, panels = pyplot.subplots(1, len(files), figsize=size, squeeze=False, layout="constrained")
        for file, axes in zip(files, panels[0], strict=True):
            rows = json.loads(file.read_text())
            for name, style in STYLES.items():
                if points := points_of(name, file, rows):
                    axes.semilogy(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
            axes.set(title=rows[0]["model"], xlabel="bits per weight, everything counted")
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("loss increase, nats per token")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES))
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
