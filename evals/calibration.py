"""Chats or plain text to calibrate on: which serves chats, and which plain text.

    python evals/calibration.py MODEL QUESTIONS.jsonl PLAIN PLAIN_TEXT --work FOLDER [--samples 32]
        [--rows gptq coded] [--out FILE.json]
    python evals/calibration.py --show FILE.json

MODEL is an instruct model. The chats are QUESTIONS (`context` of every row) with the answers that the model itself
draws, half of them to calibrate on and half to measure on; they stay in FOLDER. PLAIN is plain text to calibrate on,
PLAIN_TEXT to measure on. Every row is a real `quantize` to 3 bits on `--samples` samples of 512 tokens, and the loss of
the folder above the original's on chats and on plain text, 40 windows of 512 tokens each. Rows that FILE.json has are
not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from real import quantized

from llmsqueeze.cli.terminal import hush
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.text.chat import exchange
from llmsqueeze.text.source import read_text

METHODS = {"gptq": {"method": "gptq", "bits": 3, "group_size": 64}, "coded": {"method": "coded", "bits": 3.25}}
BATCH, ANSWER = 16, 160  # chats that are answered at a time, and the longest answer in tokens
Row = dict[str, Any]


def main() -> None:
    if "--show" in sys.argv:
        print("\n".join(table(json.loads(Path(sys.argv[-1]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "questions", "plain", "plain_text"):
        parser.add_argument(name)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rows", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hush()
    write_chats(args)
    results: list[Row] = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for row in measured(args, [(row["method"], row["calibration"]) for row in results]):
        results.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


def write_chats(args: argparse.Namespace) -> None:
    """`calibration.jsonl` and `measure.jsonl` in the folder, each half of the chats; not again if they are there."""
    halves = {"calibration": 0, "measure": 1}
    if all((args.work / f"{name}.jsonl").exists() for name in halves):
        return
    args.work.mkdir(parents=True, exist_ok=True)
    lines = Path(args.questions).read_text().splitlines()[: args.chats]
    chats = list(answered(args.model, [json.loads(line)["context"] for line in lines]))
    for name, at in halves.items():
        rows = (json.dumps({"messages": chat}) for chat in chats[at::2])
        (args.work / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


@torch.no_grad()
def answered(model: str, questions: list[str]) -> Iterator[Any]:
    """The questions with answers that the model draws by its own distribution."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        asked = [[{"role": "user", "content": question}] for question in part]
        given = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = opened.generate(**given, do_sample=True, top_p=1.0, top_k=0, temperature=1.0, max_new_tokens=ANSWER)
        answers = tokenizer.batch_decode(tokens[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from (exchange(question, answer) for question, answer in zip(part, answers, strict=True))
        print(f"{start + len(part)} of {len(questions)} chats", file=sys.stderr, flush=True)


def measured(args: argparse.Namespace, before: list[tuple[str, str]]) -> Iterator[Row]:
    """The rows that are asked for, but those of `before`."""
    texts = {"chats": read_text(str(args.work / "measure.jsonl"), "test"), "plain": read_text(args.plain_text, "test")}
    wanted = [(method, source) for method in args.rows for source in ("plain", "chats")]
    for method, source in (one for one in wanted if one not in before):
        args.calibration = args.plain if source == "plain" else str(args.work / "calibration.jsonl")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            row: Row = {"method": method, "calibration": source, **quantized(args, METHODS[method], out)}
            for name, text in texts.items():
                result = evaluate(str(out), baseline=args.model, text=text, limit=args.limit, window=args.window)
                values = result.as_dict()
                row[name] = {key: values[key] for key in ("nll_difference", "nll_difference_stderr", "kl_mean")}
            yield row


def table(results: list[Row]) -> list[str]:
    """One line for each result."""
    lines = [
        "| method | calibrated on | loss on chats | KL | loss on plain text | KL |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results:
        cells = [row["method"], row["calibration"]]
        for name in ("chats", "plain"):
            values = row[name]
            cells.append(f"{values['nll_difference']:.4f} ± {values['nll_difference_stderr']:.4f}")
            cells.append(f"{values['kl_mean']:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
