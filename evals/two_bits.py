"""What the portable two-bit grid costs: signed integer levels with a scale of either sign, against the grids that only
the native format holds, all by `descent`.

    python evals/two_bits.py MODEL CALIBRATION EVAL_TEXT [--samples 64] [--out FILE.json]

integer: {-2, -1, 0, 1} times a scale that may be negative, as compressed-tensors stores it; half: {-3, -1, 1, 3} / 2
times a scale; asymmetric: {0, 1, 2, 3} minus a zero, which costs two more bits a group. One-sided: integer levels whose
scale is never negative, which a writer that does not know of negative scales is left with (patched here only).
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any
from unittest import mock

from methods import add_arguments, measure
from torch import Tensor

from llmsqueeze.cli.terminal import hush
from llmsqueeze.quantizers import grids

GRIDS: dict[str, dict[str, Any]] = {
    "integer": {},
    "one-sided": {},
    "half": {"levels": "half"},
    "asymmetric": {"symmetric": False},
}


def positive(scale: Tensor, dtype: Any) -> Tensor:
    """`storable`, with the sign taken off."""
    return STORABLE(scale.abs(), dtype)


STORABLE = grids.storable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    hush()
    results = []
    for size, (name, extra) in itertools.product(args.groups, GRIDS.items()):
        settings = {"method": "descent", "bits": 2, "group_size": size, **extra}
        with mock.patch.object(grids, "storable", positive if name == "one-sided" else STORABLE):
            row = measure(args, f"{name} g{size}", settings)
        results.append(row | {"grid": name, "group_size": size})
        print(f"{name:11} g{size:<4} {row['bits_per_weight']:6.3f} bpw  +{row['nll_difference']:.4f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
