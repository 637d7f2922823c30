"""Every method on a real LLM at equal bytes, and the field's tools beside them (`peers.py`).

    python evals/real.py MODEL CALIBRATION EVAL_TEXT [--bits 2 3 4] [--rows NAME ...] [--window 512] [--limit 40]
        [--samples 32] [--out FILE.json]
    python evals/real.py --show FILE.json ... [--plot FILE.svg]
    python evals/real.py --promises FILE.json ...

Codes of so many bits and a quarter of a bit for scales: symmetric grids with groups of 64 columns. A method with a
budget gets the same bytes. One with outliers, factors or mixed rows gets groups of 128 columns, and as much of its own
as fits. Every row is a `quantize` in a process of its own, whose processor time and peak memory are shown,
and a real `eval` of the folder, against the original on the same windows. Rows that are done stay in --out.

--show: a table for each width; the files of `peers.py` may be among the files. --promises: what was predicted beside
what was measured, and how much of it lies in the interval that `quantize` prints.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods import add_arguments

from llmsqueeze.allocation.prediction import LIKELY
from llmsqueeze.cli.terminal import hush
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.source import evaluation_text

Row = dict[str, Any]
CHILD = "import json, sys, llmsqueeze; print(json.dumps(llmsqueeze.quantize(**json.loads(sys.argv[1]))))"
GROUPS = {"group_size": 64}
QUARTER = 0.25  # of a bit, for scales
STEPS = 64  # of distillation, each on one further sample of the calibration text
SCORES = ("perplexity", "nll_difference", "nll_difference_stderr", "kl_mean", "top1_changed")


def rows(bits: int) -> dict[str, dict[str, Any]]:
    """Name -> settings at `bits` and a quarter."""
    size = bits + QUARTER
    codes = {"bits": bits, "group_size": 128}
    outliers = {"method": "gwq", **codes, "outliers": 0.003}
    found: dict[str, dict[str, Any]] = {
        "rtn": {"method": "rtn", "bits": bits, **GROUPS},
        "gptq": {"method": "gptq", "bits": bits, **GROUPS},
        "descent": {"method": "descent", "bits": bits, **GROUPS},
        "descent, distilled": {"method": "descent", "bits": bits, **GROUPS, "distill_steps": STEPS},
        "budget, portable": {"method": "budget", "bits": size, "portable": True},
        "budget": {"method": "budget", "bits": size},
        "budget, per linear": {"method": "budget", "bits": size, "granularity": "linear"},
        "budget, by the trace": {"method": "budget", "bits": size, "granularity": "linear", "importance": "trace"},
        "coded": {"method": "coded", "bits": size},
        "coded, distilled": {"method": "coded", "bits": size, "distill_steps": STEPS},
        "gwq, the paper's ranking": outliers,
        "gwq, gradient times weight": {**outliers, "outlier_ranking": "gradient-weight", "outlier_scope": "global"},
        "gwq, random outliers": {**outliers, "outlier_ranking": "random"},
        "mixllm": {"method": "mixllm", "bits": size, "low_bits": bits},
        "lorc": {"method": "descent", **codes, "lorc_rank": 3},
        "layerwise, uniform": {"method": "budget", "bits": size, "importance": "uniform", "levels": "integer"},
    }
    widths = {"high_bits": 8, "low_bits": 4} if size > 4 else {}
    for importance in ("lim", "zd", "random", "reverse"):
        found[f"layerwise, {importance}"] = {"method": "layerwise", "bits": size, "importance": importance, **widths}
    if bits == 2:
        found["dbllm"] = {"method": "dbllm"}
        found["dbllm, distilled"] = {"method": "dbllm", "distill_steps": 100}
    return found


def main() -> None:
    if not {"--show", "--promises"} & set(sys.argv):
        measure_all()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", type=Path, nargs="+", default=[])
    parser.add_argument("--promises", type=Path, nargs="+", default=[])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results = [row for file in (*args.show, *args.promises) for row in json.loads(file.read_text())]
    print("\n".join(promises(results) if args.promises else tables(results)))
    if args.plot:
        plot(results, args.plot)


def measure_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(window=512, limit=40, samples=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=list(rows(2)), choices=list(rows(2)))
    args = parser.parse_args()
    hush()
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for row in measured(args, {(row["bits"], row["row"]) for row in results}):
        results.append(row)
        print(line(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def measured(args: argparse.Namespace, done: set[tuple[int, str]]) -> Iterator[Row]:
    for bits in args.bits:
        for name, settings in rows(bits).items():
            if name in args.rows and (bits, name) not in done:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "out"
                    row = quantized(args, settings, out)
                    yield {"model": Path(args.model).name, "bits": bits, "row": name, **row, **scores(args, out)}


def quantized(args: argparse.Namespace, settings: dict[str, Any], out: Path) -> Row:
    """What `quantize` says, and what it took, in a process of its own."""
    text = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.window}
    job = {"model": args.model, "out": str(out), **settings, **(text if make_recipe(settings).needs_text else {})}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after, summary = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(done.stdout)
    return {
        "bits_per_weight": summary["bits_per_weight"],
        "predicted": summary.get("predicted_loss_increase"),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_mb": summary["peak_memory_mb"],
    }


def scores(args: argparse.Namespace, out: Path) -> Row:
    text = evaluation_text(args.text, args.model)
    result = evaluate(str(out), baseline=args.model, text=text, limit=args.limit, window=args.window)
    return {name: result.as_dict()[name] for name in SCORES} | {"tokens": result.scores.tokens}


def line(row: Row) -> str:
    return (
        f"{row['bits']} bit  {row['row']:28} {row['bits_per_weight']:.3f} bpw  loss {row['nll_difference']:.4f} ± "
        f"{row['nll_difference_stderr']:.4f}  {row['processor_seconds']:.0f} s"
    )


def tables(results: list[Row]) -> list[str]:
    """A table for each width, the least loss last."""
    lines: list[str] = []
    for bits in sorted({row["bits"] for row in results if row.get("bits")}):
        lines += [
            f"## {bits + QUARTER} bits per weight",
            "",
            "| | bits per weight | loss | KL | top-1 changed | perplexity | processor time | peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        own = [row for row in results if row.get("bits") == bits]
        for row in sorted(own, key=lambda row: row.get("nll_difference", float("inf")), reverse=True):
            lines.append("| " + " | ".join(cells(row)) + " |")
        lines.append("")
    return lines


def promises(results: list[Row]) -> list[str]:
    """What was promised and measured, and the share of it that lies in the interval of a promise."""
    lines = [
        "| model | | bits per weight | promised | measured | measured / promised |",
        "|---|---|---:|---:|---:|---:|",
    ]
    ratios = []
    for row in (row for row in results if row.get("predicted")):
        ratios.append(row["nll_difference"] / row["predicted"])
        measured = f"{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}"
        lines.append(
            f"| {row['model']} | {row['row']} | {row['bits_per_weight']:.3f} | {row['predicted']:.4f} | {measured} | "
            f"{ratios[-1]:.2f} |"
        )
    within = sum(LIKELY[0] <= ratio <= LIKELY[1] for ratio in ratios)
    return [*lines, "", f"{within} of {len(ratios)} lie between {LIKELY[0]:g} and {LIKELY[1]:g} times the promise."]


def cells(row: Row) -> list[str]:
    name = f"{row['tool']}: {row['row']}" if "tool" in row else f"**{row['row']}**"
    if "error" in row:
        return [name, row["error"], *[""] * 6]
    changed, memory = row.get("top1_changed"), row.get("peak_memory_mb")
    return [
        name,
        f"{row['bits_per_weight']:.3f}",
        f"{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}",
        f"{row['kl_mean']:.4f}",
        "" if changed is None else f"{changed:.1%}",
        f"{row['perplexity']:.2f}",
        f"{row['processor_seconds']:.0f} s",
        "" if memory is None else f"{memory:.0f} MB",
    ]


def plot(results: list[Row], path: Path) -> None:
    """Loss over bits per weight: a line per method or tool, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "llmsqueeze", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8.0, 3.6))
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results:
            if "nll_difference" in row and row.get("bits"):
                of_tool = re.sub(r"\d bit ", "", row["row"])  # a line for all widths
                name = f"{row['tool']}: {of_tool}" if "tool" in row else row["row"]
                lines.setdefault(name, []).append((row["bits_per_weight"], row["nll_difference"]))
        for name, points in lines.items():
            style = "s:" if ":" in name else "o-"
            axes.semilogy(*zip(*sorted(points), strict=True), style, label=name, markersize=4)
        axes.set(xlabel="bits per weight", ylabel="loss increase, nats per token", title=results[0]["model"])
        axes.grid(alpha=0.3, which="both")
        axes.set_yticks([0.03, 0.1, 0.3, 1.0, 3.0, 10.0], ["0.03", "0.1", "0.3", "1", "3", "10"])
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
