"""Coded weights against true bytes: the whole method, what its parts are worth, and how much the text matters.

    python evals/coded.py MODEL CALIBRATION EVAL_TEXT [--bits 1.5 2] [--rows coded] [--draws 3] [--out FILE.json]

Every row is a real `quantize` and a real `eval` of the folder written. `--draws`: how many draws of the
calibration text the rows named `coded` are repeated on (the seed of the draw is theirs). The rows that leave something
out do so by replacing functions of quantizers/coded.py, measure/costs.py or parts/coded.py while they run, the last two
by the option `inputs`:

    equal rates       every row and linear gets the same rate: the row's size stands for its gradient
    no column steps   one step for a whole row
    no contexts       one frequency table for a whole linear
    no correction     the inputs are the original model's, and targets are not corrected for their drift
    sequential, no correction   the inputs are those behind what was compressed, and targets are not corrected
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.parts.coding import rans
from llmsqueeze.quantizers import coded
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.recipe.resolve import make_recipe
from llmsqueeze.text.source import evaluation_text

BITS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
ZERO_BITS = 2.05  # binary logarithm of the step, in sizes of the row, at which bits come to none
TEXT_ROWS = ("coded",)


def row_size(weight: Tensor, multiplier: float, _gradient: Tensor | None) -> Tensor:
    """[rows]: steps in proportion to the rows' size."""
    return multiplier * weight.square().mean(dim=1).sqrt().clamp(min=1e-20)


def level(curvature: Curvature) -> Tensor:
    """[]: the geometric mean of the column steps."""
    return curvature.upper.diagonal().log().mean().exp()


def relative_columns(curvature: Curvature) -> Tensor:
    """[cols]: column steps whose geometric mean is 1."""
    return curvature.upper.diagonal() / level(curvature)


def even_columns(curvature: Curvature) -> Tensor:
    """[cols]: their geometric mean everywhere."""
    return level(curvature).expand(len(curvature.upper)).clone()


def one_table(row_step: Tensor, col_step: Tensor) -> rans.Contexts:
    """The same table for every place."""
    zeros = torch.zeros_like(row_step).long().numpy(), torch.zeros_like(col_step).long().numpy()
    return rans.Contexts(*zeros)


@contextlib.contextmanager
def without(what: str) -> Iterator[None]:
    """Within the context something is left out of the method."""
    with contextlib.ExitStack() as stack:
        if what == "equal rates":
            stack.enter_context(mock.patch.object(coded, "row_steps", row_size))
            stack.enter_context(mock.patch.object(coded, "column_steps", relative_columns))
            stack.enter_context(mock.patch("llmsqueeze.measure.costs._zero_bits", return_value=ZERO_BITS))
        elif what == "no column steps":
            stack.enter_context(mock.patch.object(coded, "column_steps", even_columns))
        elif what == "no contexts":
            stack.enter_context(mock.patch("llmsqueeze.parts.coded.contexts_of", one_table))
        yield


ROWS: dict[str, dict[str, Any]] = {
    "coded": {"method": "coded"},
    "equal rates": {"method": "coded"},
    "no column steps": {"method": "coded"},
    "no contexts": {"method": "coded"},
    "no correction": {"method": "coded", "inputs": "original"},
    "sequential, no correction": {"method": "coded", "inputs": "sequential"},
    "with 0.1 % outliers": {
        "method": "coded",
        "outliers": 0.001,
        "outlier_scope": "global",
        "outlier_ranking": "gradient-weight",
    },
    "with LoRC rank 2": {"method": "coded", "lorc_rank": 2},
    "budget": {"method": "budget"},
    "gptq g64": {"method": "gptq", "inputs": "original", "symmetric": False, "group_size": 64},
    "gwq g64": {"method": "gwq", "quantizer": "gptq", "outliers": 0.01, "group_size": 64},
    "mixllm rows": {"method": "mixllm"},
}
# rows whose size follows from the width of their codes, or has to leave room for rows of 8 bits
SIZES = {"gptq g64": (2, 3, 4), "gwq g64": (2, 3, 4), "mixllm rows": (2.5, 3.01, 3.5, 4.01, 4.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hush()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    done = {(row["row"], row["bits"], row["draw"]) for row in results}
    for name in args.rows:
        for bits in SIZES.get(name, args.bits):
            for draw in range(args.draws if name in TEXT_ROWS else 1):
                if (name, bits, draw) in done:
                    continue
                row = measure(args, name, bits, draw)
                results.append(row)
                promised = row["predicted_loss_increase"]
                print(
                    f"{name:26} {bits:4} draw {draw}  {row['bits_per_weight']:6.3f} bpw  ppl {row['perplexity']:9.4f}  "
                    f"nll +{row['nll_difference']:.4f} ± {row['nll_difference_stderr']:.4f}  KL {row['kl_mean']:.4f}  "
                    + ("" if promised is None else f"promised {promised:.4f}"),
                    flush=True,
                )
                if args.out:
                    args.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(args: argparse.Namespace, name: str, bits: float, draw: int) -> dict[str, Any]:
    """One real `quantize` and `eval`."""
    text = {"calibration": args.calibration, "samples": args.samples, "seq_len": args.window, "seed": draw}
    low = {"low_bits": int(bits - 0.2)} if name == "mixllm rows" else {}
    recipe = make_recipe({"bits": bits, **text, **ROWS[name], **low})
    with tempfile.TemporaryDirectory() as folder, without(name):
        summary = quantize(args.model, recipe, Path(folder) / "model")
        evaluated = evaluate(
            summary.out,
            baseline=args.model,
            text=evaluation_text(args.text, args.model),
            limit=args.limit,
            window=args.window,
        )
    scores = {
        key: evaluated.as_dict()[key] for key in ("perplexity", "kl_mean", "nll_difference", "nll_difference_stderr")
    }
    return {
        "model": Path(args.model).name,
        "row": name,
        "bits": bits,
        "draw": draw,
        "bits_per_weight": summary.bits_per_weight,
        "nbytes": summary.nbytes,
        "predicted_loss_increase": summary.predicted_loss_increase,
        "perplexity_original": evaluated.baseline.perplexity if evaluated.baseline else None,
        **scores,
        "seconds": summary.seconds,
    }


if __name__ == "__main__":
    main()
