"""What users did that once lost work or told lies, done again: the command line in processes of its own.

    python evals/outcomes.py MODEL CALIBRATION TEXT [--out FILE.json]
    python evals/outcomes.py --show FILE.json

MODEL: a small Llama with tied embeddings. Every case changes a copy of it (its config, its tensors), runs the commands
that a user ran, and notes how each ended: its code, and the line that it printed, or what was measured. A case that
ends in a traceback, or in the words "this is a defect", is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmsqueeze

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
Case = dict[str, str]


class Bench:
    """The model, a text to calibrate on and one to measure on, and a folder to work in."""

    def __init__(self, model: Path, text: Path, held_out: Path, folder: Path) -> None:
        self.model, self.held_out, self.folder = model.resolve(), held_out.resolve(), folder.resolve()
        self.calibration = ["--calibration", text.resolve(), "--samples", 4, "--seq-len", 64]

    def changed(self, name: str, change: Change) -> Path:
        """A copy of the model, its config and its tensors changed."""
        folder = Path(shutil.copytree(self.model, self.folder / name))
        for path in folder.iterdir():
            path.chmod(0o644)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def run(self, *arguments: object) -> tuple[int, dict[str, Any], str]:
        """The code of a command, its JSON, and the last line of its errors."""
        command = [sys.executable, "-m", "llmsqueeze.cli", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=os.environ | QUIET)
        lines = done.stdout.strip().splitlines()
        told = " ".join(done.stderr.split("error:")[-1].split()) if "error:" in done.stderr else ""
        if "Traceback" in done.stderr or "this is a defect" in done.stderr:
            told = f"**{told or 'traceback'}**"
        return done.returncode, json.loads(lines[-1]) if lines and not done.returncode else {}, told

    def quantize(self, model: Path, *options: object, text: bool = True) -> tuple[int, dict[str, Any], str]:
        out = self.folder / f"{model.name}-out"
        return self.run("quantize", model, *options, *(self.calibration if text else []), "--out", out, "--overwrite")

    def perplexity(self, model: Path) -> str:
        code, result, told = self.run("eval", model, "--text", self.held_out, "--seq-len", 128, "--limit", 8)
        return f"{result['perplexity']:.1f}" if not code else told


QUIET = {"HF_HUB_OFFLINE": "1", "COLUMNS": "1000"}


def ended(result: tuple[int, dict[str, Any], str], what: str = "") -> str:
    """How a command ended, in a cell of a table."""
    code, _, told = result
    return f"code {code}: {told}" if code else what or "code 0"


def saved_again(bench: Bench) -> list[str]:
    code, summary, told = bench.quantize(bench.model, "--method", "rtn", "--bits", 4, text=False)
    if code:
        return [told]
    again = bench.folder / "again"
    model = llmsqueeze.load(summary["out"], dtype=torch.float32)
    try:
        model.save_pretrained(again)
    except Exception as error:  # a clear error is right too
        return [str(error)]
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        before, after = (one(tokens).logits for one in (model, llmsqueeze.load(again, dtype=torch.float32)))
    state, apart = bench.run("check", again)[1]["state"], float((before - after).abs().max())
    return [f"`check` calls the folder {state}; the largest difference of its logits is {apart:.1g}"]


def another_head(bench: Bench) -> list[str]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        noise = torch.randn(tensors[EMBEDDINGS].shape, generator=torch.Generator().manual_seed(0))
        tensors[HEAD] = (tensors[EMBEDDINGS].float() * (1 + 0.05 * noise)).to(tensors[EMBEDDINGS].dtype)

    return like_the_original(bench, "another-head", change, ["--method", "coded", "--bits", 4, "--code-embeddings"])


def only_the_head(bench: Bench) -> list[str]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors.pop(EMBEDDINGS)

    return like_the_original(bench, "only-the-head", change, ["--bits", 4])


def like_the_original(bench: Bench, name: str, change: Change, options: list[Any]) -> list[str]:
    """A changed model and its result, each by its perplexity as `eval` opens it."""
    model = bench.changed(name, change)
    result = bench.quantize(model, *options)
    if result[0]:
        return [ended(result)]
    return [f"perplexity {bench.perplexity(model)} -> {bench.perplexity(Path(result[1]['out']))}"]


def left_out(bench: Bench) -> list[str]:
    def drafts(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.0.weight"] = torch.ones(64, 64)

    def fewer(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["num_hidden_layers"] -= 1

    told = []
    for name, change in (("drafts", drafts), ("fewer-layers", fewer)):
        result = bench.quantize(bench.changed(name, change), "--method", "rtn", "--bits", 4, text=False)
        rest = result[1].get("left_out") or {}
        told.append(
            ended(result, f"{name}: left out, and said: {rest.get('tensors')} tensors, {rest.get('nbytes')} bytes")
        )
    return told


def unused(bench: Bench) -> list[str]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.bias"] = torch.ones(2000, 2000, dtype=torch.uint8)

    model = bench.changed("masks", change)
    size = (bench.model / "model.safetensors").stat().st_size // 2
    result = bench.quantize(model, "--method", "budget", "--size", size)
    return [ended(result, f"half of the original's size, {size} bytes: {result[1].get('nbytes')} bytes")]


def checked(bench: Bench) -> list[str]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def other_tool(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4}

    def own_code(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}

    neox = bench.folder / "neox"
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(neox)
    folders = {"of another tool": bench.changed("tool", other_tool), "own code": bench.changed("own", own_code)}
    told = []
    for name, folder in (folders | {"an untouched GPT-NeoX": neox}).items():
        command = [sys.executable, "-m", "llmsqueeze.cli", "check", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)
        state = json.loads(done.stdout)
        told.append(f"{name}: {state['state']}" + (f" ({state['unknown']})" if state.get("unknown") else ""))
    return told


def failing_note(bench: Bench) -> list[str]:
    """A model of whose config a note once made an error; a page into a folder that is a file."""
    from transformers import MambaConfig, MambaForCausalLM

    mamba = bench.folder / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)).save_pretrained(
        mamba
    )
    result = bench.quantize(mamba, "--method", "rtn", "--bits", 4, text=False)
    kept = result[0] == 0 and Path(result[1]["out"]).is_dir()
    told = [ended(result, f"Mamba in the default format: code 0, the folder is {'there' if kept else 'gone'}")]
    page = bench.folder / "file" / "page.html"
    page.parent.write_text("")
    compared = bench.run("compare", bench.model, "--text", bench.held_out, "--limit", 2, "--html", page)
    return [*told, f"a page that cannot be written: {ended(compared)}"]


def unusual_budgets(bench: Bench) -> list[str]:
    def doubled(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["dtype"] = "float64"
        tensors |= {name: tensor.double() for name, tensor in tensors.items()}

    told = [ended(bench.quantize(bench.changed("float64", doubled), "--bits", 4), "float64: code 0")]
    size = sum(tensor.nbytes for tensor in load_file(bench.model / "model.safetensors").values())
    for share in (0.9, 0.95, 0.99):
        asked = int(share * size)
        result = bench.quantize(bench.model, "--method", "coded", "--size", asked)
        told.append(ended(result, f"{share:.0%} of the size: {asked - result[1].get('nbytes', 0)} bytes below it"))
    for bits in (8.0, 8.5):
        result = bench.quantize(bench.model, "--method", "coded", "--bits", bits)
        told.append(ended(result, f"--bits {bits}: {result[1].get('bits_per_weight', 0):.2f} bits per weight"))
    return told


def refused_by_transformers(bench: Bench) -> list[str]:
    def heads(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config |= {"num_attention_heads": 5, "head_dim": None}

    def nothing(_: dict[str, Any], __: dict[str, Tensor]) -> None:
        return

    broken = bench.changed("tokenizer", nothing)
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nope"}}')
    return [ended(bench.quantize(model, "--bits", 4)) for model in (bench.changed("heads", heads), broken)]


def tokens_beyond(bench: Bench) -> list[str]:
    def cut(rows: int) -> Change:
        def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            config |= {"vocab_size": rows}
            tensors[EMBEDDINGS] = tensors[EMBEDDINGS][:rows].clone()

        return change

    few = bench.changed("few", cut(300))
    itself = ["--calibration", "self", "--samples", 2, "--seq-len", 32]
    return [
        ended(bench.run("eval", few, "--text", bench.held_out, "--limit", 2)),
        ended(bench.quantize(few, "--bits", 4, *itself, text=False), "from the model itself: code 0"),
    ]


def private_path(bench: Bench) -> list[str]:
    def change(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["_name_or_path"] = "/home/somebody/secret"

    result = bench.quantize(bench.changed("private", change), "--method", "rtn", "--bits", 4, text=False)
    if result[0]:
        return [ended(result)]
    files = [file for file in Path(result[1]["out"]).rglob("*") if file.is_file()]
    named = [file.name for file in files if b"somebody" in file.read_bytes()]
    return [f"the path is in {', '.join(named) or 'no file of the result'}"]


CASES: dict[str, Callable[[Bench], list[str]]] = {
    "`load` of a portable folder, then `save_pretrained`": saved_again,
    "config says tied, the file holds a different head; `--code-embeddings`": another_head,
    "config says tied, only `lm_head.weight` is stored": only_the_head,
    "tensors for multi-token prediction; a config with fewer layers than the file": left_out,
    "tensors that the model does not use, and `--size`": unused,
    "`check` on a folder of another tool, of a model with its own code, of an untouched original": checked,
    "a note, plot or trial fails at the end": failing_note,
    "weights in float64; a budget of 90 to 99 % of the size; fractional bits from 8 on": unusual_budgets,
    "a config or a tokenizer that transformers itself refuses": refused_by_transformers,
    "token ids beyond the embedding in `eval` and `--calibration self`": tokens_beyond,
    "`_name_or_path` with a private path in config.json": private_path,
}


def main() -> None:
    if "--show" in sys.argv:
        print("\n".join(table(json.loads(Path(sys.argv[2]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases: list[Case] = []
    for what, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            told = case(Bench(args.model, args.calibration, args.text, Path(folder)))
            cases.append({"case": what, "outcome": "; ".join(told).replace(f"{folder}/", "")})
        print("\n".join(table(cases[-1:])[2:]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(cases, indent=1) + "\n")


def table(cases: list[Case]) -> list[str]:
    lines = ["| what a user did | what happens |", "|---|---|"]
    return lines + [f"| {one['case']} | {one['outcome'].replace('|', '/')} |" for one in cases]


if __name__ == "__main__":
    main()
