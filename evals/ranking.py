"""Which cost predicts the loss: one fusion group at a time is rounded, and the loss really measured.

    python evals/ranking.py MODEL CALIBRATION EVAL_TEXT [--limit N] [--out FILE.json]

The groups (linears that share an input) of every block are rounded to 2 and to 3 bits by GPTQ with searched scales,
half-integer levels, group 128, on the original inputs. Printed per predictor: Spearman's rank correlation of its values
with the measured increase of the mean nll, and for the curvature also the sum of its predictions over the sum measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import add_arguments
from torch import Tensor

import llmsqueeze
from llmsqueeze.allocation.options import request_of, salience_grids
from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.job import open_job
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.evaluation.losses.divergence import token_losses
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.original import Source
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.rows import windows
from llmsqueeze.text.source import evaluation_text
from llmsqueeze.text.tokens import load_tokenizer

WIDTHS = (2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args()
    hush()
    base = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.window}
    gptq = {"method": "gptq", "inputs": "original", "search": True, "levels": "half", **base}
    profile, shares = {}, {}
    for labels in ("model", "text"):
        profile[labels], shares = profiled(args.model, replace(make_recipe({**gptq, "bits": 3}), labels=labels))
    text = evaluation_text(args.text, args.model)
    rows = windows(text, load_tokenizer(Path(args.model)), args.window)[: args.limit]
    results: list[dict[str, Any]] = []
    for bits in WIDTHS:
        results += perturbed(args.model, make_recipe({**gptq, "bits": bits}), profile, shares, rows)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(summary(results, Path(args.model).name))


def profiled(model: str, recipe: Recipe) -> tuple[Profile, dict[str, int]]:
    """Everything that predicts, and which block a linear is in."""
    options = tuple(Option(Grid(bits, recipe.group_size, symmetric=True, half=True)) for bits in WIDTHS)
    job = open_job(Source(model), recipe, Progress())
    assert job.calibration is not None
    with Spill() as spill:
        walk = Walk(job.skeleton, job.calibration.rows, spill, torch.float32, torch.device("cpu"))
        salience = salience_grids(recipe, WIDTHS)
        request = replace(request_of(recipe), options=options, salience=salience, lim=True, zd=True)
        profile = measure(walk, walk.embed(), job.plan.dtypes, request, Progress())
    return profile, {name: i for i, names in enumerate(job.skeleton.linears) for name in names}


def perturbed(
    model: str, recipe: Recipe, profiles: dict[str, Profile], block_of: dict[str, int], rows: list[Tensor]
) -> list[dict[str, Any]]:
    """Every fusion group rounded alone: what it costs, and what each predictor says."""
    original = llmsqueeze.load(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        quantize(model, recipe, Path(folder) / "model")
        rounded = llmsqueeze.load(str(Path(folder) / "model"))
        rounded.dequantize()
    before = loss(original, rows)
    profile, at = profiles["model"], WIDTHS.index(recipe.code_bits)
    results = []
    for names in profile.groups:
        kept = {name: original.get_submodule(name).weight.data for name in names}
        rounded_weights = {name: rounded.get_submodule(name).weight.data.float() for name in names}
        for name in names:
            original.get_submodule(name).weight.data = rounded_weights[name]
        measured = loss(original, rows) - before
        for name in names:
            original.get_submodule(name).weight.data = kept[name]
        block = block_of[names[0]]
        squared = sum(float((rounded_weights[name] - kept[name]).square().sum()) for name in names)
        results.append(
            {
                "bits": recipe.code_bits,
                "group": names[0],
                "measured": measured,
                "curvature, labels from the model": total(profile.costs, names, at),
                "curvature, labels from the text": total(profiles["text"].costs, names, at),
                "MixLLM salience, summed over rows": total(profiles["text"].salience, names, at),
                "LIM of the block": profile.lim[block],
                "ZD of the block (negated)": -profile.zd[block],
                "weight error": squared,
                "weight error, relative": squared / sum(float(kept[name].square().sum()) for name in names),
            }
        )
    return results


def total(values: dict[str, Tensor], names: tuple[str, ...], at: int) -> float:
    return sum(float(values[name][at].sum()) for name in names)


@torch.no_grad()
def loss(model: Any, rows: list[Tensor]) -> float:
    """Mean nll over the rows, eight at a time."""
    parts = []
    for start in range(0, len(rows), 8):
        batch = torch.cat(rows[start : start + 8])
        parts.append(token_losses(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
    return float(torch.cat(parts).double().mean())


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        return (x[:, None] > x).sum(1).double() + ((x[:, None] == x).sum(1).double() - 1) / 2

    both = torch.stack([ranks(a), ranks(b)])
    return float(torch.corrcoef(both)[0, 1])


def summary(results: list[dict[str, Any]], model: str) -> str:
    predictors = [key for key in results[0] if key not in ("bits", "group", "measured")]
    lines = [
        f"### {model} ({len(results) // len(WIDTHS)} fusion groups)",
        "",
        "| predictor | 2 bits | 3 bits | predicted / measured, 2 bits | 3 bits |",
        "|---|---:|---:|---:|---:|",
    ]
    for predictor in predictors:
        cells, ratios = [], []
        for bits in WIDTHS:
            of = [row for row in results if row["bits"] == bits]
            cells.append(f"{spearman([r[predictor] for r in of], [r['measured'] for r in of]):.2f}")
            ratio = sum(r[predictor] for r in of) / sum(r["measured"] for r in of)
            ratios.append(f"{ratio:.2f}" if predictor.startswith("curvature") else "")
        lines.append(f"| {predictor} | " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
