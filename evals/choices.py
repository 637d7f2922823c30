"""What the defaults are chosen by: one thing changed at a time, measured on calibration text that is held back.

    python evals/choices.py MODEL CALIBRATION [--rows NAME ...] [--samples 8 32 128] [--seeds 0] [--out FILE.json]
    python evals/choices.py --show FILE.json ... [--plot FILE.svg]

A quarter of the lines of CALIBRATION is held back: every row is a real `quantize` on draws from the others, and the
loss of the folder written, on the held-back text, above the original's. No text of an evaluation is read. --out keeps
the rows that are done, and goes on with the others. The rows that change what is no option do so by replacing a
function while they run:

    ... as measured      second moments and drift as they are, nothing of them taken for chance, and without the stream
    half, one and a half, twice   the share that is taken for chance times this
    damping X            X of the mean of the diagonal is added to it, instead of 0.01
    correction X         targets go X of the way to the least-squares solution, instead of 0.5
    ... without the stream   targets make good the drift of their inputs only, not of the stream that they are added to
    rounds N             rounds of refit and coordinate descent, instead of 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.evaluation.losses.perplexity import losses, standard_error
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.measure.shrinkage import Chance
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.curvature import factorize
from llmsqueeze.quantizers.descent import corrected_target
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.rows import windows
from llmsqueeze.text.source import read_text
from llmsqueeze.text.tokens import load_tokenizer

share = Chance.share
HELD_BACK = 4  # one line in so many
Row = dict[str, Any]
Replacement = tuple[str, Callable[..., Any] | int]

DESCENT = {"method": "descent", "bits": 3, "group_size": 64}
GPTQ = {"method": "gptq", "bits": 3, "group_size": 64}
CODED = {"method": "coded", "bits": 3.25}


def shrinking(factor: float) -> Replacement:
    """`factor` times the share is taken for chance."""
    return "llmsqueeze.measure.shrinkage.Chance.share", lambda *given: min(1.0, factor * share(*given))


def damping(damp: float) -> Replacement:
    return "llmsqueeze.compress.weights.weight.factorize", partial(factorize, damp=damp)


def correction(strength: float) -> Replacement:
    return "llmsqueeze.compress.weights.weight.corrected_target", partial(corrected_target, strength=strength)


def without_the_stream() -> Replacement:
    return "llmsqueeze.model.blockwise.trace.BlockTrace.added_to", lambda _trace, _name: ([], 1.0)


def rounds(count: int) -> Replacement:
    return "llmsqueeze.quantizers.descent.ROUNDS", count


ROWS: dict[str, tuple[dict[str, Any], Sequence[Replacement]]] = {
    "gptq": (GPTQ, ()),
    "gptq as measured": (GPTQ, (shrinking(0),)),
    "coded": (CODED, ()),
    "coded as measured": (CODED, (shrinking(0), without_the_stream())),
    "descent": (DESCENT, ()),
    "descent as measured": (DESCENT, (shrinking(0), without_the_stream())),
    "half": (DESCENT, (shrinking(0.5),)),
    "one and a half": (DESCENT, (shrinking(1.5),)),
    "twice": (DESCENT, (shrinking(2),)),
    "damping 0.001": (DESCENT, (damping(0.001),)),
    "damping 0.003": (DESCENT, (damping(0.003),)),
    "damping 0.03": (DESCENT, (damping(0.03),)),
    "correction 0": (DESCENT, (correction(0.0),)),
    "correction 0.25": (DESCENT, (correction(0.25),)),
    "correction 0.75": (DESCENT, (correction(0.75),)),
    "correction 1": (DESCENT, (correction(1.0),)),
    "without the stream": (DESCENT, (without_the_stream(),)),
    "coded without the stream": (CODED, (without_the_stream(),)),
    "gptq with the targets": (GPTQ | {"inputs": "corrected"}, ()),
    "rounds 1": (DESCENT, (rounds(1),)),
    "rounds 6": (DESCENT, (rounds(6),)),
    "scales by search": (DESCENT | {"search": True}, ()),
    "original inputs": (DESCENT | {"inputs": "original"}, ()),
    "sequential inputs": (DESCENT | {"inputs": "sequential"}, ()),
    "asymmetric": (DESCENT | {"symmetric": False}, ()),
    "asymmetric, groups of 128": (DESCENT | {"symmetric": False, "group_size": 128}, ()),
    "asymmetric, groups of 96": (DESCENT | {"symmetric": False, "group_size": 96}, ()),
    "groups of 96": (DESCENT | {"group_size": 96}, ()),
    "groups of 128": (DESCENT | {"group_size": 128}, ()),
    "groups of 32": (DESCENT | {"group_size": 32}, ()),
}


@dataclass(frozen=True)
class Texts:
    """The calibration text, and the held-back token rows [1, window] with the original's losses on them."""

    calibration: Path
    rows: list[Tensor]
    original: list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("calibration", nargs="?", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--window", type=int, default=512, help="tokens of a sample, and of a held-back row")
    parser.add_argument("--limit", type=int, default=32, help="held-back rows that are measured at most")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.show:
        print("\n".join(line for file in args.show for line in section(json.loads(file.read_text()))))
        if args.plot:
            plot([json.loads(file.read_text()) for file in args.show], args.plot)
        return
    if not args.calibration:
        parser.error("MODEL and CALIBRATION are needed")
    hush()
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        texts = split(args, Path(folder))
        for row in measured(args, texts, Path(folder), {key(row) for row in results}):
            results.append(row)
            print(line(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")


def split(args: argparse.Namespace, folder: Path) -> Texts:
    """The texts, and what the original loses on them."""
    calibration, rows = held_back(args, folder)
    return Texts(calibration, rows, losses(opened(args.model), rows, Progress()))


def held_back(args: argparse.Namespace, folder: Path) -> tuple[Path, list[Tensor]]:
    """Every fourth line of the calibration text is held back: the file of the others, and token rows of these."""
    lines = args.calibration.read_text().splitlines(keepends=True)
    calibration, others = (folder / f"{name}{args.calibration.suffix}" for name in ("calibration", "held-back"))
    calibration.write_text("".join(line for i, line in enumerate(lines) if i % HELD_BACK))
    others.write_text("".join(lines[::HELD_BACK]))
    rows = windows(read_text(str(others), "train"), load_tokenizer(args.model), args.window)
    return calibration, rows[: args.limit]


def opened(model: str) -> OpenModel:
    """In float32, whatever is faster."""
    return open_model(model, torch.device("cpu"), trust_remote_code=False, dtype="float32")


def measured(args: argparse.Namespace, texts: Texts, folder: Path, done: set[tuple[Any, ...]]) -> Iterator[Row]:
    """One row after the other, but for those that are done."""
    for name in args.rows:
        for samples in args.samples:
            for seed in args.seeds:
                row: Row = {"row": name, "samples": samples, "seed": seed, "window": args.window}
                if key(row) not in done:
                    yield {"model": Path(args.model).name, **row, **measure(args.model, texts, folder / "out", row)}


def key(row: Row) -> tuple[Any, ...]:
    return row["row"], row["samples"], row["seed"], row["window"]


def measure(model: str, texts: Texts, out: Path, row: Row) -> Row:
    """One real `quantize`, and the losses of what it wrote."""
    settings, replacements = ROWS[row["row"]]
    text = {"calibration": str(texts.calibration), "samples": row["samples"], "seq_len": row["window"]}
    start = time.process_time()
    with contextlib.ExitStack() as stack:
        for name, value in replacements:
            stack.enter_context(mock.patch(name, value))
        summary = quantize(model, make_recipe({**settings, **text, "seed": row["seed"]}), out, overwrite=True)
    taken = time.process_time() - start
    own = losses(opened(str(out)), texts.rows, Progress())
    differences = [a - b for a, b in zip(own, texts.original, strict=True)]
    return {
        "bits_per_weight": summary.bits_per_weight,
        "loss": float(torch.cat(differences).mean()),
        "stderr": standard_error(differences),
        "processor_seconds": round(taken, 1),
        "peak_memory_mb": summary.peak_memory_mb,
    }


def line(row: Row) -> str:
    return (
        f"{row['row']:24} {row['samples']:4} samples  seed {row['seed']}  {row['bits_per_weight']:.3f} bpw  loss "
        f"{row['loss']:.4f} ± {row['stderr']:.4f}  {row['processor_seconds']:.0f} s"
    )


def section(rows: list[Row]) -> list[str]:
    """A model's losses: a line per row, a column per number of samples; seeds are averaged."""
    counts = sorted({row["samples"] for row in rows})
    lines = [f"## {rows[0]['model']}", "", "| | bits per weight | " + " | ".join(f"{n} samples" for n in counts) + " |"]
    lines.append("|---|---:|" + "---:|" * len(counts))
    for name in (name for name in ROWS if any(row["row"] == name for row in rows)):
        own = [row for row in rows if row["row"] == name]
        lines.append(f"| {name} | {own[0]['bits_per_weight']:.3f} | " + " | ".join(cell(own, n) for n in counts) + " |")
    return [*lines, ""]


def cell(rows: list[Row], samples: int) -> str:
    """The mean over the seeds, with the standard error over windows of one, or how far the seeds lie apart."""
    losses_of = [row["loss"] for row in rows if row["samples"] == samples]
    if not losses_of:
        return ""
    mean = sum(losses_of) / len(losses_of)
    if len(losses_of) == 1:
        return f"{mean:.4f} ± {next(row['stderr'] for row in rows if row['samples'] == samples):.4f}"
    return f"{mean:.4f} ({min(losses_of):.4f} to {max(losses_of):.4f})"


def curve(rows: list[Row], name: str) -> list[tuple[int, float]]:
    """Calibration tokens and mean loss of a row, rising."""
    losses_at: dict[int, list[float]] = {}
    for row in rows:
        if row["row"] == name:
            losses_at.setdefault(row["samples"] * row["window"], []).append(row["loss"])
    return [(tokens, sum(values) / len(values)) for tokens, values in sorted(losses_at.items())]


def plot(models: list[list[Row]], path: Path) -> None:
    """Loss over the number of calibration tokens, a panel per model, with and without shrinking."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    with matplotlib.rc_context({"svg.hashsalt": "llmsqueeze", "font.size": 9}):
        figure, panels = pyplot.subplots(
            1, len(models), figsize=(4.2 * len(models), 4), squeeze=False, layout="constrained"
        )
        for rows, axes in zip(models, panels[0], strict=True):
            for color, name in enumerate(("gptq", "descent", "coded")):
                for style, shown in (("o-", name), ("o:", f"{name} as measured")):
                    if points := curve(rows, shown):
                        axes.loglog(*zip(*points, strict=True), f"C{color}{style}", label=shown, markersize=4)
            axes.set(title=rows[0]["model"], xlabel="calibration tokens")
            tokens = sorted({row["samples"] * row["window"] for row in rows})
            axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[0][0].set_ylabel("loss increase on held-back text, nats per token")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
