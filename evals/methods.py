"""Quality at equal bytes: RTN, GPTQ, descent and GWQ on real small models, with random outliers as the control.

    python evals/methods.py MODEL CALIBRATION EVAL_TEXT [--window 256] [--bits 2 3 4] [--out FILE.json]

Every row is a real `quantize` and a real `eval` of the folder written. Rows with outliers cost more bytes than rows
without, so plain methods are also run at smaller groups: compare rows of about the same bits per weight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.source import evaluation_text

GWQ = {"method": "gwq", "outlier_scope": "global", "outlier_ranking": "gradient-weight"}
PAPER = {"method": "gwq", "outlier_scope": "layer", "outlier_ranking": "gradient"}
RANDOM = {"method": "gwq", "outlier_scope": "layer", "outlier_ranking": "random"}
PLAIN = {"symmetric": False, "group_size": 64}

ROWS: dict[str, dict[str, Any]] = {
    "rtn g64": {"method": "rtn", **PLAIN},
    "gptq g64, original inputs": {"method": "gptq", "inputs": "original", **PLAIN},
    "gptq g64": {"method": "gptq", **PLAIN},
    "descent g64 asymmetric": {"method": "descent", **PLAIN},
    "descent g64": {"method": "descent", "group_size": 64},
    "descent g128": {"method": "descent"},
    "rtn g32": {"method": "rtn", "symmetric": False, "group_size": 32},
    "gptq g32": {"method": "gptq", "symmetric": False, "group_size": 32},
    "descent g32": {"method": "descent", "group_size": 32},
    "descent g24": {"method": "descent", "group_size": 24},
    "gwq paper, rtn g64": {**PAPER, "quantizer": "rtn", **PLAIN},
    "gwq best, rtn g64": {**GWQ, "quantizer": "rtn", **PLAIN},
    "gwq random, rtn g64": {**RANDOM, "quantizer": "rtn", **PLAIN},
    "gwq paper, descent g128": {**PAPER},
    "gwq best, descent g128": {**GWQ},
    "gwq random, descent g128": {**RANDOM},
    "gwq best 0.1 %, descent g128": {**GWQ, "outliers": 0.001},
    "gwq best 0.5 %, descent g128": {**GWQ, "outliers": 0.005},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every such script takes."""
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    hush()
    results = []
    for bits in args.bits:
        for name in args.rows:
            row = measure(args, name, {"bits": bits, **ROWS[name]})
            results.append(row)
            print(
                f"{bits} bit  {name:32} {row['bits_per_weight']:6.3f} bpw  ppl {row['perplexity']:9.4f}  "
                f"nll +{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}  KL {row['kl_mean']:.4f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def recipe_of(settings: dict[str, Any], args: argparse.Namespace) -> Recipe:
    """The recipe of these settings, with the text of `args` if it reads any."""
    text = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.window}
    recipe = make_recipe(settings)
    return make_recipe({**text, **settings}) if recipe.needs_text else recipe


def measure(args: argparse.Namespace, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One real `quantize` and `eval`."""
    recipe = recipe_of(settings, args)
    with tempfile.TemporaryDirectory() as folder:
        summary = quantize(args.model, recipe, Path(folder) / "model")
        text = evaluation_text(args.text, args.model)
        result = evaluate(summary.out, baseline=args.model, text=text, limit=args.limit, window=args.window)
    scores = {
        key: result.as_dict()[key] for key in ("perplexity", "kl_mean", "nll_difference", "nll_difference_stderr")
    }
    return {
        "model": Path(args.model).name,
        "row": name,
        "bits": settings.get("bits"),
        "bits_per_weight": summary.bits_per_weight,
        "nbytes": summary.nbytes,
        "predicted_loss_increase": summary.predicted_loss_increase,
        "perplexity_original": result.baseline.perplexity if result.baseline else None,
        **scores,
        "seconds": summary.seconds,
    }


if __name__ == "__main__":
    main()
