"""Other tools at their own bytes: AutoRound, HQQ, llama.cpp's types, llm-compressor, and NF4 of bitsandbytes.

    python evals/peers.py MODEL CALIBRATION EVAL_TEXT --tool NAME --python TOOL_ENV/bin/python \\
        [--llama-bin LLAMA_CPP/build/bin] [--rows REGEX] [--limit 300] [--out FILE.json]

NAME: autoround, hqq, llamacpp, llmcompressor or bitsandbytes. The text and the protocol are those of `methods.py`; with
`--window 512 --limit 40 --samples 32` they are those of `real.py`. Every tool runs in an environment of its own, as a
subprocess (`peer_tools.py`): `pip install auto-round`, `hqq`, `llmcompressor`, or `gguf safetensors torch` for
llama.cpp, whose llama-quantize and llama-imatrix are real programs. It quantizes the linears of the decoder blocks and
nothing else; what it made is dequantized into the original as an ordinary float32 folder, and that is measured here,
against the original. --out keeps the rows of the other tools.

Calibration: the very token rows that `quantize` draws from CALIBRATION (seed 0). AutoRound takes them as they are.
llama-imatrix reads text, so the GGUF gets a vocabulary in which every token is one private character, which leads to
the same rows again and needs no conversion of tokenizers.

Bits per weight: all bytes that the tool's own format stores for the linears of the blocks, by the number of weights.
AutoRound: the packed qweight, qzeros (stored with symmetric codes also) and float16 scales in the safetensors that it
writes. HQQ: the packed W_q, and scale and zero in float16; its 3-bit codes are ten to an int32, so 3.2 bits, and filled
up to a multiple of ten, which shows on matrices as small as these. llama.cpp: the bytes of the tensors in the GGUF. A
linear that a tool leaves alone (AutoRound where rows or columns are no multiple of 32, llama.cpp where 32 does not
divide the columns) counts its 16 bits a weight.

AutoRound tunes in float32 (amp=False: in bfloat16 it would round the weights first), 200 iterations unless said,
batches of 8, its seed 42; where the group does not divide the columns, the last group of a row is short. llm-compressor
rounds in float32 with its defaults. HQQ: its own settings; where the group does not divide the columns, groups run on
from row to row. llama.cpp, "pure": every linear of the blocks in this
type; without "pure": the mixture of types that goes under this name. Types that need blocks of 256 are left out where
no linear has such columns. Q8_0 says that nothing is lost on the way; the types below two bits, Q2_0, TQ, MXFP4 and
NVFP4 are not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from peer_tools import TOOLS, Settings, checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--tool", choices=list(TOOLS))
    parser.add_argument("--python", help="python of an environment that has the tool")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--rows", default="", help="regular expression that the rows' names must contain")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.text and args.tool and args.python):
        parser.error("CALIBRATION, EVAL_TEXT, --tool and --python are needed")
    if args.tool == "llamacpp" and not args.llama_bin:
        parser.error("--tool llamacpp needs --llama-bin")
    os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, work: Path) -> None:
    """Makes and measures one row after the other; prints a line for each, and keeps them in --out."""
    common = {
        "tool": args.tool,
        "model": str(args.model.resolve()),
        "programs": str((args.llama_bin or Path()).resolve()),
        "tokens": calibration_tokens(args),
    }
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    wanted = {name: row for name, row in TOOLS[args.tool][1]().items() if re.search(args.rows, name)}
    control: dict[str, Settings] = {"the original in float32": {}}
    for name, settings in (control | wanted).items():
        tool = args.tool if settings else "none"
        row = {"model": args.model.name, "tool": tool, "row": name, "bits": bits_of(settings)}
        row |= measured(args, work, common, settings)
        results = [old for old in results if (old["tool"], old["row"]) != (tool, name)]
        results += [row] if "unfit" not in row else []
        print(line(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def bits_of(settings: Settings) -> int | None:
    """The width of the codes, if one width is all that there is."""
    bits: int | None = settings.get("bits", settings.get("nbits", 4 if settings.get("kind") == "nf4" else None))
    return bits


def calibration_tokens(args: argparse.Namespace) -> list[list[int]]:
    """The rows that `quantize` would draw."""
    from llmsqueeze.text.rows import Draw, mixed_rows
    from llmsqueeze.text.source import calibration_texts
    from llmsqueeze.text.tokens import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    text = calibration_texts(args.calibration, str(args.model))
    return [row[0].tolist() for row in mixed_rows(text, tokenizer, Draw(args.samples, args.window, seed=0)).rows]


def measured(args: argparse.Namespace, work: Path, common: Settings, settings: Settings) -> dict[str, Any]:
    """One row: the tool's process, and a real evaluation of what came out. Without settings nothing is quantized."""
    from llmsqueeze.cli.terminal import hush
    from llmsqueeze.evaluation.evaluate import evaluate
    from llmsqueeze.text.source import evaluation_text

    hush()
    answer: dict[str, Any] = {"version": "", "bits_per_weight": None, "seconds": 0.0}
    (work / "weights.safetensors").unlink(missing_ok=True)
    if settings:
        answer = ask(args.python, work, common | {"settings": settings})
        if answer.keys() & {"error", "unfit"}:
            return answer
    folder = dense_folder(args.model, work)
    text = evaluation_text(args.text, str(args.model))
    evaluation = evaluate(str(folder), baseline=str(args.model), text=text, limit=args.limit, window=args.window)
    names = ("nll_difference", "nll_difference_stderr", "kl_mean", "perplexity", "top1_changed")
    scores = {name: evaluation.as_dict()[name] for name in names}
    original = evaluation.baseline.perplexity if evaluation.baseline else None
    return answer | scores | {"perplexity_original": original}


def ask(python: str, work: Path, job: Settings) -> dict[str, Any]:
    """Runs the tool in its own environment, without ours on the path; weights and answer lie in `work` then."""
    script = Path(__file__).with_name("peer_tools.py").resolve()
    (work / "job.json").write_text(json.dumps(job))
    (work / "answer.json").unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, str(script), str(work)], env=kept | offline, cwd=work, capture_output=True, text=True, check=False
    )
    if not (work / "answer.json").exists():
        return {"error": "the process died: " + " ".join(done.stderr.split()[-40:])}
    answer: dict[str, Any] = json.loads((work / "answer.json").read_text())
    return answer


def dense_folder(model: Path, work: Path) -> Path:
    """The original with what the tool made in its place, all in float32, as any program opens it."""
    from safetensors.torch import load_file, save_file

    folder = work / "dense"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, folder)
    dequantized = load_file(work / "weights.safetensors") if (work / "weights.safetensors").exists() else {}
    tensors = {name: tensor.float().contiguous() for name, tensor in checkpoint(model).items()}
    assert dequantized.keys() <= tensors.keys()
    assert all(dequantized[name].shape == tensors[name].shape for name in dequantized)
    save_file(tensors | dequantized, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def line(row: dict[str, Any]) -> str:
    start = f"{row['tool']:9}  {row['row']:26}"
    if unmade := row.get("error", row.get("unfit")):
        return f"{start} {unmade}"
    return (
        f"{start} {row['bits_per_weight'] or 0:6.3f} bpw  ppl {row['perplexity']:9.4f}  "
        f"nll {row['nll_difference']:+.4f} ± {row['nll_difference_stderr']:.4f}  KL {row['kl_mean']:.4f}  "
        f"{row['seconds']:.0f} s  {row.get('note', '')}"
    )


if __name__ == "__main__":
    main()
