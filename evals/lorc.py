"""Where low-rank compensation pays: ranks over RTN and GPTQ at 2, 3 and 4 bits, plain and weighted by the inputs.

    python evals/lorc.py MODEL CALIBRATION EVAL_TEXT [--limit N] [--out FILE.json]

Every row is a real `quantize` and a real `eval`, as in methods.py; smaller groups are the control at equal bytes.
"""

from __future__ import annotations

import argparse
import json

from methods import add_arguments, measure

from llmsqueeze.cli.terminal import hush


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    hush()
    results = []
    for bits in args.bits:
        for quantizer in ("rtn", "gptq"):
            base = {"method": quantizer, "bits": bits, "symmetric": False, "search": True}
            rows = {f"{quantizer} g{size}": {**base, "group_size": size} for size in (64, 32, 16)}
            for rank in args.ranks:
                for kind in ("plain", "input-weighted"):
                    given = {**base, "group_size": 64, "lorc_rank": rank, "lorc": kind}
                    rows[f"{quantizer} g64, rank {rank} {kind}"] = given
            for name, settings in rows.items():
                row = measure(args, name, settings)
                results.append(row)
                print(
                    f"{bits} bit  {name:34} {row['bits_per_weight']:6.3f} bpw  nll +{row['nll_difference']:.4f}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
