"""Mixtures of experts: a small trained one, its plan, and a budget against uniform widths.

    python evals/experts.py train FOLDER [--steps 700]
    python evals/experts.py measure FOLDER CALIBRATION EVAL_TEXT [--samples 64] [--out FILE.json]
    python evals/experts.py predict FOLDER CALIBRATION [--bits 2] [--samples 32] [--out FILE.json]

The mixture has two layers and eight experts, two for a token, and learns the demo's stories. Nothing balances its
experts, so that some are rarely used. `measure` compresses it by `descent` at uniform widths, and by `budget` at the
same bytes; it prints for every expert how many calibration tokens it saw and how many bits the budget gave it.
`predict` rounds one expert's matrix at a time, and prints the loss that the budget predicts for it beside what the loss
then does, on the same text: with the error as it is, and with half the sum of the error and its negative, in which the
first order of the loss, which no budget sees, is taken off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from methods import add_arguments, measure, recipe_of
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from llmsqueeze.allocation.options import request_of
from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.job import measure_job, open_job
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo.train import SEED, WINDOW, batch, build_tokenizer, perplexity, rate
from llmsqueeze.model.experts.find import expert_linears
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers import rounder
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.recipe.resolve import make_recipe

WIDTHS = (2, 3, 4)


def build(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """The untrained mixture."""
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return MixtralForCausalLM(config)


def train(folder: Path, steps: int) -> None:
    """Trains the mixture and writes it in bfloat16 with its tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer, begun = build_tokenizer(), time.monotonic()
    model = build(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        ids = batch(tokenizer, step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - begun:.0f} s", flush=True)
    model = model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"held-out perplexity {perplexity(model, tokenizer):.4f}; {time.monotonic() - begun:.0f} s in all")


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method and width."""
    rows = []
    for bits in WIDTHS:
        for method in ("descent", "budget"):
            settings = {"method": method, "bits": bits, "group_size": 64, "portable": False}
            row = measure(args, f"{method} {bits}", settings)
            rows.append(row | {"width": bits, "method": method})
            print(f"{method:8} {bits}  {row['bits_per_weight']:6.3f} bpw  +{row['nll_difference']:.4f}", flush=True)
    return rows


def experts_of(folder: Path) -> list[dict[str, Any]]:
    """Of a compressed folder: every expert's tokens, and the mean width of its codes."""
    record = json.loads((folder / "llmsqueeze.json").read_text())
    weights = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"]
    found: list[dict[str, Any]] = []
    for name, tokens in record["tokens"].items():
        rows = weights[name]["shape"][0]
        on_grids = [(spec.get("rows", rows), spec["bits"]) for spec in weights[name]["parts"] if "bits" in spec]
        bits = sum(count * width for count, width in on_grids) / rows
        found.append({"name": name, "tokens": tokens, "bits": bits})
    return found


def show_plan(args: argparse.Namespace, bits: int) -> list[dict[str, Any]]:
    """Compresses with the budget, and prints what every expert got."""
    settings = {"method": "budget", "bits": bits, "group_size": 64, "portable": False}
    with tempfile.TemporaryDirectory() as work:
        quantize(args.model, recipe_of(settings, args), Path(work) / "budget")
        plan = experts_of(Path(work) / "budget")
    for one in sorted(plan, key=lambda row: (row["name"].rpartition(".")[0], -row["tokens"])):
        print(f"{one['name']:46} {one['tokens']:8.0f} tokens  {one['bits']:.2f} bits", flush=True)
    return plan


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted and measured loss increase of every expert's matrix, rounded alone by rtn."""
    settings = {"method": "budget", "quantizer": "rtn", "bits": 3, "group_size": 64, "levels": "integer"}
    settings |= {"widths": "2,3,4", "calibration": args.calibration, "samples": args.samples, "seq_len": 128}
    recipe = make_recipe(settings | {"portable": False})
    job = open_job(Source(str(args.model)), recipe, Progress())
    with tempfile.TemporaryDirectory() as work:
        profile = measure_job(job, request_of(recipe), Path(work), Progress())
    at, option = next((i, o) for i, o in enumerate(profile.options) if o.grid.bits == args.bits and not o.outliers)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    parameters, before, rows = dict(model.named_parameters()), loss_on(model, job.samples), []
    for name in expert_linears(job.skeleton.model):
        stack, _, number = name.rpartition(".")
        weight = parameters[stack].data[int(number)]
        kept, flat = weight.clone(), Curvature.flat(weight.shape[1], weight)
        error = rounder("rtn")(kept, option.grid, torch.bfloat16, flat, None, recipe.search).dense() - kept
        after = [loss_on(model, job.samples, (weight, kept + sign * error)) - before for sign in (1, -1)]
        weight.copy_(kept)
        predicted = float(profile.costs[name][at].sum())
        rows.append({"name": name, "predicted": predicted, "second_order": sum(after) / 2, "measured": after[0]})
        print(f"{name:46} {predicted:.6f}  {sum(after) / 2:+.6f}  {after[0]:+.6f}", flush=True)
    print("sum", *(f"{sum(row[kind] for row in rows):.6f}" for kind in ("predicted", "second_order", "measured")))
    return rows


def loss_on(model: Any, samples: list[Tensor], changed: tuple[Tensor, Tensor] | None = None) -> float:
    """The mean loss of a model; changed: a weight, and what to set it to before."""
    if changed is not None:
        changed[0].copy_(changed[1])
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in samples]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--steps", type=int, default=700)
    add_arguments(verbs.add_parser("measure"))
    predicting = verbs.add_parser("predict")
    predicting.add_argument("model", type=Path)
    predicting.add_argument("calibration")
    predicting.add_argument("--bits", type=int, default=2)
    predicting.add_argument("--samples", type=int, default=32)
    predicting.add_argument("--out", type=Path)
    args = parser.parse_args()
    hush()
    if args.verb == "train":
        train(args.folder, args.steps)
        return
    result: Any = predict(args) if args.verb == "predict" else {"rows": compare(args), "plan": show_plan(args, 3)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
