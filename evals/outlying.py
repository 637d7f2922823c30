"""Outlying inputs: what damping, scaling of columns and rotation change in the error that descent leaves.

    python evals/outlying.py MODEL CALIBRATION [--blocks 0 4 10 ...] [--samples 32] [--bits 2 3 4] [--out FILE.json]
    python evals/outlying.py --show FILE.json

For every linear of some blocks of a Llama: the output error of descent on held-back text (a quarter of the lines, as in
`choices.py`), over that of the default; the mean over the linears of a kind is geometric. The inputs are the original
model's, so nothing drifts. A folded change costs nothing when the model runs:

    damping X            X of the mean of the diagonal is added to it, instead of 0.01
    own moment X         X of each column's own moment is added to it, after a hundredth of that of the default
    columns ^X           columns times (moment / mean moment)^(X/2), the norm or the rows before divided by it. For all
                         linears with one input; before o_proj that has to be the same in all heads that share values,
                         which is not kept here
    rotated              the residual stream in a random orthonormal basis: the columns of what reads it, with the
                         weights of the norm folded in, and the rows of what is added to it
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from choices import held_back
from torch import Tensor, nn

from llmsqueeze.cli.terminal import hush
from llmsqueeze.measure.moments import SecondMoments
from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import rounder
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.text.rows import Draw, mixed_rows
from llmsqueeze.text.source import calibration_texts
from llmsqueeze.text.tokens import load_tokenizer

GROUPS = {
    "self_attn.q_proj": (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    "self_attn.o_proj": (("o_proj",), ""),
    "mlp.gate_proj": (("gate_proj", "up_proj"), "post_attention_layernorm"),
    "mlp.down_proj": (("down_proj",), ""),
}
CPU = torch.device("cpu")
Row = dict[str, Any]


class Inputs(NamedTuple):
    """The moments [cols, cols] of a group's inputs, shrunk, and those of held-back text."""

    moments: Tensor
    held: Tensor


class Variant(NamedTuple):
    """Weights [rows, cols] -> weights; the moments under which they are rounded and measured; the damping."""

    turn: Callable[[Tensor], Tensor]
    inputs: Inputs
    damp: float = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("calibration", nargs="?", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 4, 10, 16, 22, 28])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=96, help="held-back rows")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    args = parser.parse_args()
    if args.show:
        print("\n".join(table(json.loads(args.show.read_text()))))
        return
    hush()
    results = list(measured(args))
    print("\n".join(table(results)))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """The error of every linear by every variant."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        file, others = held_back(args, Path(folder))
        text = calibration_texts(str(file), args.model)
        rows = mixed_rows(text, load_tokenizer(args.model), Draw(args.samples, args.window, seed=0)).rows
    names = [f"model.layers.{block}.{name}" for block in args.blocks for name in GROUPS]
    calibration, held = (moments_of(model, names, given) for given in (rows, others))
    for name in names:
        block, kind = name.rsplit(".", 2)[0], name.split(".", 3)[3]
        members, norm = GROUPS[kind]
        seen = calibration[name]
        inputs = Inputs(seen.shrunk(seen.mean())[0], held[name].mean())
        scale = model.get_submodule(f"{block}.{norm}").weight.detach() if norm else None
        for variant, changed in variants(inputs, scale).items():
            curvature = factorize(changed.inputs.moments.clone(), changed.damp)
            for member in members:
                weight = model.get_submodule(f"{name.rsplit('.', 1)[0]}.{member}").weight.detach()
                for bits in args.bits:
                    error = held_error(changed, weight, bits, curvature)
                    yield {"block": block, "linear": member, "bits": bits, "variant": variant, "error": error}


def moments_of(model: nn.Module, names: list[str], rows: list[Tensor]) -> dict[str, SecondMoments]:
    """The second moments of the inputs of these linears."""
    moments = {name: SecondMoments(model.get_submodule(name).weight.shape[1], torch.float32, CPU) for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: moments[name].add(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row)
    for handle in handles:
        handle.remove()
    return moments


def variants(inputs: Inputs, norm: Tensor | None) -> dict[str, Variant]:
    """norm [cols]: the weights of the norm before; None if there is none."""

    def scaled(scale: Tensor) -> Variant:
        return Variant(lambda weight: weight * scale, Inputs(*(one / scale.outer(scale) for one in inputs)))

    def same(weight: Tensor) -> Tensor:
        return weight

    diagonal = inputs.moments.diagonal()
    found = {"default": Variant(same, inputs)}
    found |= {f"damping {damp:g}": Variant(same, inputs, damp) for damp in (0.0003, 0.003, 0.03)}
    own = inputs.moments + 0.01 * torch.diag(diagonal)
    found["own moment 0.01"] = Variant(same, Inputs(own, inputs.held), 0.0001)
    for power in (0.125, 0.25, 0.5):
        found[f"columns ^{power:g}"] = scaled((diagonal / diagonal.mean()).clamp(min=1e-6).pow(power / 2))
    if norm is not None:
        turn = basis(len(norm))
        plain = scaled(norm)
        of_basis = Inputs(*(turn.T @ one @ turn for one in plain.inputs))
        found["rotated"] = Variant(lambda weight: plain.turn(weight) @ turn, of_basis)
    else:
        found["rotated"] = Variant(lambda weight: basis(len(weight)) @ weight, inputs)
    return found


def basis(width: int) -> Tensor:
    """[width, width], orthonormal."""
    drawn = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    result: Tensor = torch.linalg.qr(drawn)[0]
    return result


def held_error(variant: Variant, weight: Tensor, bits: int, curvature: Curvature) -> float:
    """The output error on held-back text, summed over the rows."""
    target = variant.turn(weight).contiguous()
    rounded = rounder("descent")(target, Grid(bits, 64, symmetric=True), torch.bfloat16, curvature, None, True)
    return float(row_error(target - rounded.dense(), variant.inputs.held).sum())


def table(results: list[Row]) -> list[str]:
    """Error over the default's: a line per variant, a column per kind of linear."""
    kinds = list(dict.fromkeys(row["linear"] for row in results))
    lines: list[str] = []
    for bits in sorted({row["bits"] for row in results}):
        rows = [row for row in results if row["bits"] == bits]
        default = {(row["block"], row["linear"]): row["error"] for row in rows if row["variant"] == "default"}
        lines += [f"## {bits} bits", "", f"| | {' | '.join(kinds)} | all |", "|---|" + "---:|" * (len(kinds) + 1)]
        for name in dict.fromkeys(row["variant"] for row in rows):
            ratios = {
                (row["block"], row["linear"]): row["error"] / default[row["block"], row["linear"]]
                for row in rows
                if row["variant"] == name
            }
            cells = [mean([ratio for (_, kind), ratio in ratios.items() if kind == wanted]) for wanted in kinds]
            numbers = " | ".join(f"{cell:.3f}" for cell in (*cells, mean(list(ratios.values()))))
            lines.append(f"| {name} | {numbers} |")
        lines.append("")
    return lines


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    main()
