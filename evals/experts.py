"""Mixtures of experts: a small trained one, its plan, and a budget against uniform widths.

    python evals/experts.py train FOLDER [--steps 700]
    python evals/experts.py measure FOLDER CALIBRATION EVAL_TEXT [--samples 64] [--out FILE.json]

The mixture has two layers and eight experts, two for a token, and learns the demo's stories. Nothing balances its
experts, so that some are rarely used. `measure` compresses it by `descent` at uniform widths, and by `budget` at the
same bytes; it prints for every expert how many calibration tokens it saw and how many bits the budget gave it.
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
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo.train import SEED, WINDOW, batch, build_tokenizer, perplexity, rate

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--steps", type=int, default=700)
    add_arguments(verbs.add_parser("measure"))
    args = parser.parse_args()
    hush()
    if args.verb == "train":
        train(args.folder, args.steps)
        return
    result = {"rows": compare(args), "plan": show_plan(args, 3)}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
