"""How far calibration on text sampled from the model is from real text: GPTQ, descent and the budget on both.

    python evals/self_calibration.py MODEL CALIBRATION EVAL_TEXT [--samples 64] [--out FILE.json]

Every row is a real `quantize` and a real `eval`; both texts have the same number of samples of the same length.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from methods import add_arguments, measure

from llmsqueeze.cli.terminal import hush

ROWS: dict[str, dict[str, Any]] = {
    "gptq 2 bit g64": {"method": "gptq", "bits": 2, "symmetric": False, "group_size": 64, "search": True},
    "descent 2 bit g64": {"method": "descent", "bits": 2, "group_size": 64},
    "dual binary g64": {"method": "dbllm"},
    "auto 2.25": {"method": "budget", "bits": 2.25},
    "gptq 3 bit g64": {"method": "gptq", "bits": 3, "symmetric": False, "group_size": 64, "search": True},
    "descent 3 bit g64": {"method": "descent", "bits": 3, "group_size": 64},
    "auto 3.25": {"method": "budget", "bits": 3.25},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    hush()
    real, results = args.calibration, []
    for name, settings in ROWS.items():
        for seed in args.seeds:
            scores = {}
            for kind, source in (("real", real), ("self", "self")):
                args.calibration = source
                scores[kind] = measure(args, f"{name}, {kind}", {**settings, "seed": seed})
                results.append(scores[kind] | {"seed": seed})
            losses = [scores[kind]["nll_difference"] for kind in ("real", "self")]
            print(
                f"{name:20} seed {seed}  {scores['real']['bits_per_weight']:6.3f} bpw  real +{losses[0]:.4f}  "
                f"self +{losses[1]:.4f}  ratio {losses[1] / losses[0]:.2f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
