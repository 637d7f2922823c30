"""Folders as people have them, and what becomes of them: the command line and `llmsqueeze.load` on each.

    python evals/folders.py MODEL CALIBRATION TEXT [--gguf FILE.gguf] [--cases WORD ...] [--out FILE.json]
    python evals/folders.py --show FILE.json

MODEL: a small Llama with tied embeddings; CALIBRATION and TEXT are texts. Every case changes a copy of the model, runs
what a user would, and notes how that ended or what was measured. A traceback, or "this is a defect", is marked.
--cases: those that have one of the words; others keep their row in --out. Needs peft. A GGUF file is compressed too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from outcomes import Bench, ended
from safetensors.torch import load_file

import llmsqueeze
from llmsqueeze.cli.terminal import hush

TOKENS = torch.randint(3, 200, (2, 32), generator=torch.Generator().manual_seed(0))
RTN = ["--method", "rtn", "--bits", 4]
Case = dict[str, str]


def quantized(bench: Bench, model: Path, *options: object) -> str:
    """How `quantize` ended; after a success the perplexities of the model and the result."""
    result = bench.quantize(model, *RTN, *options, text=False)
    if result[0]:
        return ended(result)
    return f"perplexity {bench.perplexity(model)} -> {bench.perplexity(Path(result[1]['out']))}"


def an_adapter(bench: Bench) -> list[str]:
    import peft
    from transformers import AutoModelForCausalLM

    own = bench.changed("with-adapter", lambda config, tensors: None)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(own)
    merged = bench.folder / "merged"
    model.merge_and_unload().save_pretrained(merged)
    for file in own.glob("tokenizer*"):
        (merged / file.name).write_bytes(file.read_bytes())
    told = ended(bench.quantize(own, *RTN, text=False))
    code, summary, _ = bench.quantize(own, *RTN, "--merge-adapter", text=False)
    after = bench.perplexity(Path(summary["out"])) if not code else f"code {code}"
    return [
        f"{told}; with --merge-adapter: perplexity {after}, PEFT's merge compressed alike {quantized(bench, merged)}"
    ]


def training(bench: Bench) -> list[str]:
    import peft

    said = []
    for name, options in {"own format": ["--native"], "compressed-tensors": ["--portable"]}.items():
        model = bench.changed(f"train-{name[:3]}", lambda config, tensors: None)
        _, summary, _ = bench.quantize(model, *RTN, *options, text=False)
        torch.manual_seed(0)
        opened = llmsqueeze.load(summary["out"], dtype=torch.float32)
        adapted: Any = peft.get_peft_model(opened, peft.LoraConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        said.append(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in 20 steps")
    return ["; ".join(said)]


def without_head(bench: Bench) -> list[str]:
    def change(config: dict[str, Any], _: Any) -> None:
        config["architectures"] = ["LlamaModel"]

    return [quantized(bench, bench.changed("without-head", change))]


def a_lying_index(bench: Bench) -> list[str]:
    model = bench.changed("lying-index", lambda config, tensors: None)
    (model / "model.safetensors").rename(model / "a.safetensors")
    names = list(load_file(model / "a.safetensors"))
    listed = dict.fromkeys([*names[1:], "nowhere"], "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    pointer = bench.changed("pointer", lambda config, tensors: None)
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    unknown = bench.changed("unknown-class", lambda config, tensors: config.update(architectures=["LlamaForGuessing"]))
    others = [ended(bench.quantize(one, *RTN, text=False)) for one in (pointer, unknown)]
    return [f"index: {quantized(bench, model)}; pointer: {others[0]}; class: {others[1]}"]


def a_kernel(bench: Bench) -> list[str]:
    def change(config: dict[str, Any], _: Any) -> None:
        config["attn_implementation"] = "flash_attention_2"

    return [quantized(bench, bench.changed("kernel", change))]


def opening(bench: Bench) -> list[str]:
    """`load` and what follows, on a coded folder and a portable one."""
    said = []
    for name, options in {"coded": ["--method", "coded", "--bits", 3], "portable": ["--bits", 3]}.items():
        code, summary, told = bench.quantize(bench.changed(f"open-{name}", lambda c, t: None), *options)
        if code:
            return [told]
        works = {what: worked(step, summary["out"]) for what, step in STEPS.items()}
        failed = [f"{what} ({why})" for what, why in works.items() if why]
        said.append(
            f"{name}: {len(works) - len(failed)} of {len(works)} work{': not ' if failed else ''}{', '.join(failed)}"
        )
    return [f"{'; '.join(said)} ({', '.join(STEPS)})"]


def worked(step: Callable[[str], Any], folder: str) -> str:
    """ "" if it works, else why it does not."""
    try:
        step(folder)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""


def _run(folder: str, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = llmsqueeze.load(folder, **options)(TOKENS).logits
    assert bool(logits.isfinite().all())
    return logits


def _dequantize(folder: str) -> None:
    model = llmsqueeze.load(folder, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS).logits
        # coded weights are dense already: then there is nothing to do
        dense = model.dequantize() if getattr(model, "hf_quantizer", None) is not None else model
        assert torch.allclose(dense(TOKENS).logits, before, atol=1e-3)


def _compile(folder: str) -> None:
    model: Any = llmsqueeze.load(folder, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")  # its own backend takes minutes on a CPU
        assert torch.allclose(compiled(TOKENS).logits, model(TOKENS).logits, atol=1e-3)


def _static(folder: str) -> None:
    model: Any = llmsqueeze.load(folder)
    given = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **given), model.generate(TOKENS, **given))


def _pipeline(folder: str) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert pipeline("text-generation", llmsqueeze.load(folder), tokenizer=tokenizer)("Once upon", max_new_tokens=4)


def _trainer(folder: str) -> None:
    import peft
    from transformers import Trainer, TrainingArguments

    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(llmsqueeze.load(folder, dtype=torch.float32), config)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(out, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
        assert Trainer(model, arguments, train_dataset=rows).train().global_step == 2  # type: ignore[arg-type]


STEPS: dict[str, Callable[[str], Any]] = {
    "device_map": lambda folder: _run(folder, device_map="auto"),
    "dtype": lambda folder: _run(folder, dtype=torch.float16),
    "attn_implementation": lambda folder: _run(folder, attn_implementation="eager"),
    "dequantize": _dequantize,
    "torch.compile": _compile,
    "a static cache": _static,
    "pipeline": _pipeline,
    "Trainer with an adapter": _trainer,
}


def the_card(bench: Bench) -> list[str]:
    model = bench.changed("card", lambda config, tensors: None)
    head = "license: mit\nlanguage:\n- en\ntags:\n- chat\nbase_model: owner/base\n"
    (model / "README.md").write_text(f"---\n{head}---\n# The original\n")
    _, summary, _ = bench.quantize(model, *RTN, text=False)
    from llmsqueeze.publish.card import model_card

    front = model_card(Path(summary["out"])).split("---")[1].split("\n")
    kept = [line for line in head.splitlines() if line in front]
    return [f"{len(kept)} of {len(head.splitlines())} lines of the original's metadata are in the new card"]


def overwritten(bench: Bench) -> list[str]:
    model = bench.changed("overwrite", lambda config, tensors: None)
    _, summary, _ = bench.quantize(model, *RTN, text=False)
    out = Path(summary["out"])
    (out / "notes.txt").write_text("mine")
    real = out.rename(out.with_name("elsewhere"))
    out.symlink_to(real)
    bench.quantize(model, *RTN, text=False)
    stays = "stays" if (out / "notes.txt").exists() else "is lost"
    return [f"a file of the user {stays}; the link {'stays one' if out.is_symlink() else 'was replaced'}"]


CASES: dict[str, Callable[[Bench], list[str]]] = {
    "a LoRA adapter inside the model's folder": an_adapter,
    "LoRA training on a compressed model": training,
    "`architectures: [LlamaModel]`": without_head,
    "an index that names a missing tensor, and forgets one; an LFS pointer; an unknown class": a_lying_index,
    "flash-attention in config.json, not installed": a_kernel,
    "`load`, and what people do with it": opening,
    "the original's card": the_card,
    "`--overwrite` of a link to a folder with a file of the user": overwritten,
}


def main() -> None:
    if "--show" in sys.argv:
        print("\n".join(table(json.loads(Path(sys.argv[-1]).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--cases", nargs="*", default=[""])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hush()
    before = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    results: dict[str, str] = {row["what"]: row["now"] for row in before}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, args.calibration, args.text, Path(folder))
        cases = dict(CASES)
        if args.gguf is not None:
            cases["a GGUF file"] = lambda bench: [a_gguf(bench, args.gguf.resolve())]
        for what in (what for what in cases if any(word in what for word in args.cases)):
            results[what] = "; ".join(cases[what](bench)).replace(f"{bench.folder}/", "")
            print(f"{what}: {results[what]}", flush=True)
            if args.out:
                rows = [{"what": what, "now": now} for what, now in results.items()]
                args.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def a_gguf(bench: Bench, file: Path) -> str:
    code, summary, told = bench.run("quantize", file, *RTN, "--out", bench.folder / "from-gguf")
    return (
        f"code {code}: {told}" if code else f"code 0, perplexity of the result {bench.perplexity(Path(summary['out']))}"
    )


def table(results: list[Case]) -> list[str]:
    return ["| what | today |", "|---|---|", *(f"| {row['what']} | {row['now']} |" for row in results)]


if __name__ == "__main__":
    main()
