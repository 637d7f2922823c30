"""What opens what: every recipe against every target, on models with and without ties and biases.

    python evals/matrix.py [--llama-cpp SOURCES] [--real MODEL --text FILE] [--out FILE.json]

Tiny random models are made here; the built-in one comes along. Every recipe compresses every model, the result is
converted for every target, opened there, and its logits in float32 are compared with a reference made without any
loader: the original model with the sum of the stored parts put into its linears. "Stock" is a process in which
llmsqueeze cannot be imported. With the sources of llama.cpp (programs built in SOURCES/build/bin, or --llama-bin) the
maps for it are tried: its converter, llama-quantize, and the types in the file that comes out. --real: a model with 256
columns or more, for llama.cpp's K-types. What --out holds of other models is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llmsqueeze import parts
from llmsqueeze.cli.terminal import hush
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.errors import SqueezeError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.exports import gguf as gguf_map
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import is_transposed
from llmsqueeze.recipe.resolve import make_recipe

BAR = 1e-4
VOCABULARY = 96
NATIVE = "stock, on the native folder"
TARGETS = ("stock", "dense", "load", "hf", "peft", "library", "gguf-map")
PEFT = ("peft", "peft, after a first forward", "peft, base with dequantize=True")  # three ways to open one export
HEADS = {
    "stock": "stock transformers",
    "dense": "dense, stock",
    "load": "`llmsqueeze.load`",
    "hf": "`import llmsqueeze.hf`",
    "peft": "peft, stock",
    "library": "library decode",
    "gguf-map": "llama.cpp map",
}

SELF = {"calibration": "self", "samples": 4, "seq_len": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn 2 bit g64": {"method": "rtn", "bits": 2, "group_size": 64},
    "rtn 3 bit g32": {"method": "rtn", "bits": 3, "group_size": 32},
    "rtn 4 bit g64": {"method": "rtn", "bits": 4, "group_size": 64},
    "rtn 8 bit, whole rows": {"method": "rtn", "bits": 8, "group_size": -1},
    "rtn 3 bit g64 --native": {"method": "rtn", "bits": 3, "group_size": 64, "portable": False},
    "rtn 4 bit g64, first block skipped": {"method": "rtn", "bits": 4, "group_size": 64, "skip": ["*.0.*"]},
    "rtn 3 bit g50, short last groups": {"method": "rtn", "bits": 3, "group_size": 50},
    "rtn 3 bit g64 asymmetric": {"method": "rtn", "bits": 3, "group_size": 64, "symmetric": False},
    "rtn 2 bit g64, half levels": {"method": "rtn", "bits": 2, "group_size": 64, "levels": "half"},
    "layerwise rtn, blocks of 2 and 4 bits": {
        "method": "layerwise",
        "importance": "first",
        "quantizer": "rtn",
        "bits": 3,
        "group_size": 64,
    },
    "auto rtn 3.7 bits --per-group, integer": {
        "method": "budget",
        "bits": 3.7,
        "quantizer": "rtn",
        "granularity": "group",
        "levels": "integer",
        "group_size": 64,
        **SELF,
    },
    "auto rtn 3.3 bits, by row": {"method": "budget", "bits": 3.3, "quantizer": "rtn", "group_size": 64, **SELF},
    "mixllm rtn, random rows": {
        "method": "mixllm",
        "quantizer": "rtn",
        "importance": "random",
        "group_size": 64,
    },
    "gwq rtn 3 bit, magnitudes": {
        "method": "gwq",
        "bits": 3,
        "quantizer": "rtn",
        "outlier_ranking": "magnitude",
        "group_size": 64,
    },
    "dbllm rtn": {"method": "dbllm", "quantizer": "rtn"},
    "rtn 3 bit g64, lorc 4 plain": {"method": "rtn", "bits": 3, "group_size": 64, "lorc_rank": 4, "lorc": "plain"},
    "gwq rtn 3 bit, lorc 4 plain": {
        "method": "gwq",
        "bits": 3,
        "quantizer": "rtn",
        "outlier_ranking": "magnitude",
        "group_size": 64,
        "lorc_rank": 4,
        "lorc": "plain",
    },
}
REAL_RECIPES: dict[str, dict[str, Any]] = {
    "rtn 2 bit": {"method": "rtn", "bits": 2},
    "rtn 3 bit": {"method": "rtn", "bits": 3},
    "rtn 4 bit": {"method": "rtn", "bits": 4},
    "rtn 8 bit": {"method": "rtn", "bits": 8},
    "rtn 3 bit, first block skipped": {"method": "rtn", "bits": 3, "skip": ["*.0.*"]},
    "dbllm rtn": {"method": "dbllm", "quantizer": "rtn"},
    "layerwise rtn, blocks of 2 and 4 bits": {
        "method": "layerwise",
        "importance": "first",
        "quantizer": "rtn",
        "bits": 3,
    },
    "auto rtn 3.3 bits --per-linear": {
        "method": "budget",
        "bits": 3.3,
        "quantizer": "rtn",
        "granularity": "linear",
        "calibration": "self",
        "samples": 8,
        "seq_len": 128,
    },
}

# argv: how to open, a file of jobs (key, folder, adapter or null, tokens), the file to write. One process for all.
OPENER = """
import json, sys
how, jobs, out = sys.argv[1:]
if how == "stock":
    sys.modules["llmsqueeze"] = None
import torch
import transformers
if how != "stock":
    import llmsqueeze.hf
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
results = {}
for key, folder, adapter, tokens in json.load(open(jobs)):
    try:
        if how == "load":
            model, lost = llmsqueeze.load(folder, dtype=torch.float32), 0
        else:
            given = {"dtype": torch.float32, "output_loading_info": True}
            if key.endswith("dequantize=True"):
                given["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
            lost = len(info["missing_keys"])
        if adapter:
            from peft import PeftModel
            if key.endswith("first forward"):
                model(input_ids=torch.tensor(tokens))
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            results[key] = {"logits": model.eval()(input_ids=torch.tensor(tokens)).logits, "lost": lost}
    except Exception as error:
        results[key] = {"error": f"{type(error).__name__}: {error}"}
torch.save(results, out)
"""

# argv: llama.cpp's sources, model, file to write, pre-tokenizer ("": no vocabulary at all). Its converter knows
# published tokenizers by the hash of what they make of a text; those here are none of them.
CONVERTER = """
import sys
sources, model, out, pre = sys.argv[1:]
sys.path.insert(0, sources)
import convert_hf_to_gguf
from conversion import base, gpt2, llama, qwen
def no_vocabulary(self):
    self.gguf_writer.add_tokenizer_model("none")
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
def no_sentencepiece(self, *args, **kwargs):
    raise FileNotFoundError
if pre:
    base.TextModel._set_vocab_sentencepiece = no_sentencepiece
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
else:
    for one in (base.TextModel, llama.LlamaModel, qwen.Qwen2Model, gpt2.GPT2Model):
        one.set_vocab = no_vocabulary
sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "f16", "--outfile", out]
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class Cell:
    """What came of one recipe on one target.

    result: equal, differs, refuses (llmsqueeze says no), fails (another program broke), made (and not tried).
    """

    model: str
    recipe: str
    target: str
    result: str
    difference: float | None = None
    reason: str = ""


@dataclass
class Row:
    """A model compressed by a recipe: its folder, what other programs get of it, and what they have to compute."""

    model: str
    recipe: str
    folder: Path
    format: str
    expected: Tensor
    moved: float
    opens: dict[str, tuple[str, Path, Path | None]] = field(default_factory=dict)

    def cell(self, target: str, result: str, difference: float | None = None, reason: str = "") -> Cell:
        return Cell(self.model, self.recipe, target, result, difference, reason)


@dataclass(frozen=True)
class LlamaCpp:
    """Its sources and programs."""

    sources: Path
    programs: Path

    def convert(self, model: Path, out: Path, pre: str = "") -> str:
        """The model as GGUF in float16; returns what went wrong, if anything."""
        code, log = call([sys.executable, "-c", CONVERTER, str(self.sources), str(model), str(out), pre], out.parent)
        return "" if code == 0 else last_line(log)

    def run(self, command: str, folder: Path) -> tuple[int, str]:
        """A shell command with the programs on the path; its exit status and all that it printed."""
        environment = {"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}
        return call(["sh", "-c", command], folder, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's sources")
    parser.add_argument("--llama-bin", type=Path, help="its programs [SOURCES/build/bin]")
    parser.add_argument("--real", type=Path, help="model for llama.cpp's K-types")
    parser.add_argument("--text", type=Path, help="text for --real's importance matrix and perplexity")
    parser.add_argument("--models", nargs="*", help="of the small models only these")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hush()
    torch.set_num_threads(1)
    cpp = None
    if args.llama_cpp:
        sources = args.llama_cpp.resolve()
        cpp = LlamaCpp(sources, (args.llama_bin or sources / "build" / "bin").resolve())
    results: dict[str, Any] = {"formats": {}, "moved": {}, "cells": [], "llama.cpp": []}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    if cpp or "versions" not in results:
        results["versions"] = versions(cpp)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = make_models(work)
        for name in models if args.models is None else args.models:
            cells, rows = matrix_of(name, models[name], args.recipes, work / f"{name}-results", cpp)
            results["cells"] = [cell for cell in results["cells"] if cell["model"] != name] + [asdict(c) for c in cells]
            results["formats"][name] = {row.recipe: row.format for row in rows}
            results["moved"][name] = {row.recipe: row.moved for row in rows}
            write(results, args.out)
        if cpp and args.real:
            results["llama.cpp"] = real(cpp, args.real.resolve(), args.text, work / "real")
            write(results, args.out)
    print(table(results))
    if results["llama.cpp"]:
        print(real_table(results["llama.cpp"]))


def write(results: Mapping[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


def versions(cpp: LlamaCpp | None) -> dict[str, str]:
    names = ("torch", "transformers", "compressed-tensors", "peft", "gguf", "safetensors")
    installed = {name: version(name) for name in names}
    if cpp is not None:
        _, log = cpp.run("llama-perplexity --version", Path.cwd())
        installed["llama.cpp"] = next((line for line in log.splitlines() if line.startswith("version")), "unknown")
    return installed


def make_models(work: Path) -> dict[str, Path]:
    """name -> folder. Large random weights, so that a wrong one shows; biases and norms are random too."""
    common: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    rope: dict[str, Any] = {
        "intermediate_size": 192,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    }
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    # llama.cpp's converter wants n_ctx, which published ones have
    own: dict[str, Any] = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_ctx": 64}
    gpt2 = GPT2Config(**own, **ends, vocab_size=VOCABULARY, initializer_range=0.1)
    configs: dict[str, tuple[Any, torch.dtype]] = {
        "llama-untied": (LlamaConfig(**common, **rope, **ends), torch.bfloat16),
        "llama-biases": (LlamaConfig(**common, **rope, **ends, attention_bias=True, mlp_bias=True), torch.float32),
        "gpt2": (gpt2, torch.float32),
        "qwen2": (Qwen2Config(**common, **rope, **ends), torch.float16),
    }
    folders = {"demo": MODEL_DIR}
    for name, (config, dtype) in configs.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 1:
                    tensor += 0.2 * torch.randn_like(tensor)
        folders[name] = work / name
        model.save_pretrained(folders[name])
        tokenizer().save_pretrained(folders[name])
    return folders


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w95, for models that calibrate on their own text."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    whole = Tokenizer(WordLevel(words, unk_token="w0"))
    whole.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="w1", eos_token="w2", unk_token="w0")


def matrix_of(
    name: str, model: Path, recipes: list[str], work: Path, cpp: LlamaCpp | None
) -> tuple[list[Cell], list[Row]]:
    """All cells of one model."""
    work.mkdir()
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    cells, rows = [], []
    for index, recipe in enumerate(recipes):
        print(f"{name}: {recipe}", file=sys.stderr, flush=True)
        folder = work / str(index)
        try:
            summary = quantize(str(model), make_recipe(RECIPES[recipe]), folder)
        except SqueezeError as error:
            cells += [Cell(name, recipe, target, "refuses", reason=first_line(error)) for target in TARGETS]
            continue
        expected, moved = reference(original, folder, tokens)
        rows.append(Row(name, recipe, folder, summary.format, expected, moved))
    whole = work / "original.gguf"
    refused = cpp.convert(model, whole) if cpp else ""
    for row in rows:
        cells += converted(row)
        cells.append(mapped(row, cpp, whole, refused))
    for how in ("stock", "load", "hf"):
        cells += opened(rows, how, tokens, work)
    return cells, rows


def reference(original: Any, folder: Path, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits of the original with the parts' sums in its linears, and how far they are from the original's."""
    checkpoint = open_checkpoint(folder)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        before: Tensor = original(input_ids=tokens).logits
        for name, entry in read_entries(checkpoint).items():
            module = original.get_submodule(name)
            dense = parts.sum_of_parts(read_parts(checkpoint, entry))
            kept[name] = module.weight.data
            module.weight.data = dense.T.contiguous() if is_transposed(module) else dense
        after: Tensor = original(input_ids=tokens).logits
        for name, weight in kept.items():
            original.get_submodule(name).weight.data = weight
    return after, float((after - before).abs().max())


def converted(row: Row) -> list[Cell]:
    """Exports the row's folder, notes what each program is to open, and returns the refusals and the library's cell."""
    refusals = []
    row.opens = {"load": ("load", row.folder, None), "hf": ("hf", row.folder, None)}
    portable = row.folder
    if row.format != compressed_tensors.METHOD:
        row.opens[NATIVE] = ("stock", row.folder, None)
        portable = row.folder.with_name(f"{row.folder.name}-compressed-tensors")
    for target, out in (("compressed-tensors", portable), ("dense", None), ("peft", None)):
        folder = out or row.folder.with_name(f"{row.folder.name}-{target}")
        cells = ("stock", "library") if target == "compressed-tensors" else (target,)
        try:
            if folder != row.folder:
                export(str(row.folder), target, folder, dtype="fp32" if target == "dense" else None)
        except SqueezeError as error:
            refusals += [row.cell(cell, "refuses", reason=first_line(error)) for cell in cells]
            continue
        if target == "peft":
            row.opens |= dict.fromkeys(PEFT, ("stock", folder / "base", folder / "adapter"))
        else:
            row.opens[cells[0]] = ("stock", folder, None)
        if "library" in cells:
            refusals.append(decoded(row, folder))
    return refusals


def decoded(row: Row, portable: Path) -> Cell:
    """What compressed-tensors makes of every linear by the folder's config, against the sum of our parts."""
    ours, theirs = open_checkpoint(row.folder), open_checkpoint(portable)
    entries = read_entries(ours)
    seen, largest = 0, 0.0
    for group in theirs.config["quantization_config"]["config_groups"].values():
        scheme = QuantizationScheme.model_validate({k: v for k, v in group.items() if k != "format"})
        for name in group["targets"]:
            packed = {k: theirs.read_raw(f"{name}.{k}") for k in ("weight_packed", "weight_scale", "weight_shape")}
            packed["weight_scale"] = packed["weight_scale"].float()
            weight = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
            expected = parts.sum_of_parts(read_parts(ours, entries[name]))
            seen += 1
            if not torch.equal(weight, expected):
                largest = max(largest, float((weight - expected).abs().max()), sys.float_info.min)
    if seen != len(entries):
        return row.cell("library", "fails", reason=f"{seen} of {len(entries)} linears are targets")
    return row.cell("library", "differs" if largest else "equal", largest, f"{seen} weights, bit by bit")


def opened(rows: list[Row], how: str, tokens: Tensor, work: Path) -> list[Cell]:
    """Opens everything of that kind in one process, and compares the logits."""
    jobs = {f"{i} {target}": (row, target) for i, row in enumerate(rows) for target in row.opens}
    jobs = {key: (row, target) for key, (row, target) in jobs.items() if row.opens[target][0] == how}
    listed = [[key, *map(text, row.opens[target][1:]), tokens.tolist()] for key, (row, target) in jobs.items()]
    (work / f"{how}.json").write_text(json.dumps(listed))
    out = work / f"{how}.pt"
    code, log = call([sys.executable, "-c", OPENER, how, f"{how}.json", str(out)], work)
    if code != 0:
        raise SystemExit(f"the process that opens folders ({how}) broke:\n{log}")
    results = torch.load(out)
    cells = []
    for key, (row, target) in jobs.items():
        if "error" in results[key]:
            cells.append(row.cell(target, "fails", reason=first_line(results[key]["error"])))
            continue
        difference = float((results[key]["logits"] - row.expected).abs().max())
        lost = f"{results[key]['lost']} weights missing" if results[key]["lost"] else ""
        cells.append(row.cell(target, "equal" if difference <= BAR and not lost else "differs", difference, lost))
    return cells


def mapped(row: Row, cpp: LlamaCpp | None, whole: Path, refused: str) -> Cell:
    """The map, and whether llama-quantize makes of the original what it says."""
    out = row.folder.with_name(f"{row.folder.name}-gguf-map")
    try:
        commands = export(str(row.folder), "gguf-map", out)["commands"]
    except SqueezeError as error:
        return row.cell("gguf-map", "refuses", reason=first_line(error))
    if cpp is None:
        return row.cell("gguf-map", "made", reason="not tried")
    if refused:
        return row.cell("gguf-map", "fails", reason=f"converter: {refused}")
    (out / "original.gguf").symlink_to(whole)
    write_even_matrix(whole, out / "imatrix.gguf")
    code, log = cpp.run(commands[2], out)
    (out / "original.gguf").unlink()
    if code != 0:
        return row.cell("gguf-map", "fails", reason=f"llama-quantize: {complaint(log)}")
    same, wanted, kinds, others = compared_types(out)
    counted = f"{same} of {wanted} types as named ({kinds})" + (f"; not named: {others}" if others else "")
    return row.cell("gguf-map", "equal" if same == wanted and not others else "differs", reason=counted)


def write_even_matrix(whole: Path, file: Path) -> None:
    """An importance matrix, in the old format, by which all columns are alike: without a vocabulary no text is read."""
    tensors = [t for t in gguf.GGUFReader(whole).tensors if len(t.shape) > 1 and "blk." in t.name]
    with file.open("wb") as out:
        out.write(struct.pack("<i", len(tensors)))
        for tensor in tensors:
            name, cols = tensor.name.encode(), int(tensor.shape[0])
            out.write(struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, cols))
            out.write(torch.ones(cols).numpy().tobytes())


def compared_types(folder: Path) -> tuple[int, int, str, str]:
    """How many tensors have the type that the map names, how many it names, how many there are of each type, and what
    became of matrices in blocks that it does not name, which stay as they are here."""
    wanted = {}
    for line in (folder / "tensor-types.txt").read_text().splitlines():
        pattern, kind = line.rsplit("=", 1)
        wanted[re.sub(r"\\(.)", r"\1", pattern[1:-1])] = kind.upper()
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    there = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    left = [t.tensor_type.name for t in tensors if len(t.shape) > 1 and "blk." in t.name and t.name not in wanted]
    same = sum(there.get(name) == kind for name, kind in wanted.items())
    return same, len(wanted), counts([there[name] for name in wanted if name in there]), counts(left)


def counts(kinds: list[str]) -> str:
    """`14 IQ4_NL, 7 F16`"""
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


def real(cpp: LlamaCpp, model: Path, words: Path, work: Path) -> list[dict[str, Any]]:
    """A real model through all three commands of quantize.sh, word by word, and llama-perplexity on what comes out."""
    work.mkdir()
    whole = work / "original.gguf"
    plain, log = call([sys.executable, str(cpp.sources / "convert_hf_to_gguf.py"), str(model), "--outtype", "f16",
                        "--outfile", str(whole)], work)  # fmt: skip
    converter = "takes it" if plain == 0 else last_line(log)
    if plain != 0 and (refused := cpp.convert(model, whole, "gpt-2")):
        return [{"recipe": "original", "quantize": f"converter: {refused}"}]
    read = words.read_text()
    (work / "calibration.txt").write_text(read[:30_000])
    (work / "held-back.txt").write_text(read[60_000:80_000])
    start = {"transformers": perplexity_here(model, work / "held-back.txt"), "converter": converter}
    rows = [{"recipe": "original", **start, "perplexity": perplexity(cpp, whole, work)}]
    for index, (recipe, settings) in enumerate({**REAL_RECIPES, "every type that a map can name": {}}.items()):
        print(f"{model.name}: {recipe}", file=sys.stderr, flush=True)
        out = work / f"{index}-map"
        folder = work / str(index)
        quantize(str(model), make_recipe(settings or REAL_RECIPES["rtn 3 bit"]), folder)
        summary = export(str(folder), "gguf-map", out)
        if not settings:
            name_all_types(out)
            summary = {"commands": summary["commands"]}
        rows.append({"recipe": recipe, **by_commands(cpp, summary, out, whole)})
    return rows


def by_commands(cpp: LlamaCpp, summary: Mapping[str, Any], out: Path, whole: Path) -> dict[str, Any]:
    """Runs the second and third command in the folder of the map."""
    (out / "original.gguf").symlink_to(whole)
    (out / "calibration.txt").symlink_to(whole.with_name("calibration.txt"))
    matrix, quantized = summary["commands"][1:]
    kept = whole.with_name("imatrix.gguf")
    if not kept.exists():
        code, log = cpp.run(matrix, out)
        if code != 0:
            return {"quantize": f"llama-imatrix: {complaint(log)}"}
        (out / "imatrix.gguf").rename(kept)
    (out / "imatrix.gguf").symlink_to(kept)
    code, log = cpp.run(quantized, out)
    if code != 0:
        return {"quantize": f"llama-quantize: {complaint(log)}"}
    same, wanted, kinds, others = compared_types(out)
    told = {key: summary[key] for key in ("bits_per_weight", "bits_per_weight_before") if key in summary}
    sizes = [tensor.n_bytes for tensor in gguf.GGUFReader(out / "model.gguf").tensors if ".weight" in tensor.name]
    return {
        "quantize": "takes it",
        "same": same,
        "named": wanted,
        "types": kinds + (f"; not named: {others}" if others else ""),
        **told,
        "nbytes": sum(sizes),
        "perplexity": perplexity(cpp, out / "model.gguf", out),
    }


def name_all_types(folder: Path) -> None:
    """Rewrites the map so that every type of ours is named, in turn."""
    file = folder / "tensor-types.txt"
    names = [re.sub(r"\\(.)", r"\1", line.rsplit("=", 1)[0][1:-1]) for line in file.read_text().splitlines()]
    kinds = (*gguf_map.TYPES, *gguf_map.SMALL_TYPES, gguf_map.WHOLE)
    file.write_text(gguf_map.tensor_type_file({name: kinds[i % len(kinds)] for i, name in enumerate(names)}))


def perplexity(cpp: LlamaCpp, file: Path, work: Path) -> float | str:
    """What llama-perplexity says of the file on the text held back, or why it does not."""
    text_folder = next(folder for folder in (work, work.parent) if (folder / "held-back.txt").exists())
    command = f"llama-perplexity -m {file} -f {text_folder / 'held-back.txt'} -c 256 -t 1 --chunks 8 --no-warmup"
    code, log = cpp.run(command, work)
    estimate = re.search(r"PPL = ([\d.]+)", log)
    return float(estimate[1]) if code == 0 and estimate else complaint(log)


def perplexity_here(model: Path, file: Path) -> float:
    """The original's in transformers as llama-perplexity counts: windows of 256, of each the second half."""
    tokens = AutoTokenizer.from_pretrained(model)
    opened_here = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor(tokens(file.read_text())["input_ids"])
    windows = ids[: 8 * 256].reshape(8, 256).clone()
    windows[:, 0] = tokens.bos_token_id
    with torch.no_grad():
        scores = opened_here(input_ids=windows).logits[:, 128:-1].log_softmax(-1)
    return round(float(scores.gather(-1, windows[:, 129:, None]).mean().neg().exp()), 4)


def call(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and everything printed, on one thread."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode(errors="replace")


def text(value: object) -> str | None:
    return None if value is None else str(value)


def first_line(error: object) -> str:
    """Without the folder's name, which is another one in every cell."""
    return re.sub(r"/\S*/\d+(-[a-z-]+)?\b", "FOLDER", str(error).splitlines()[0])


def last_line(log: str) -> str:
    return log.strip().splitlines()[-1] if log.strip() else "said nothing"


def complaint(log: str) -> str:
    """The first line that speaks of an error, or the last one."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line for line in lines if re.search(r"error|failed|invalid|malformed", line, re.I)), last_line(log))


def table(results: Mapping[str, Any]) -> str:
    """Rows recipes, columns targets; a model that differs from most is named. Reasons stand below, numbered."""
    cells = [Cell(**cell) for cell in results["cells"]]
    recipes = list(dict.fromkeys(cell.recipe for cell in cells))
    notes: dict[str, int] = {}
    heads = ["recipe", "written as", *(HEADS[target] for target in TARGETS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for recipe in recipes:
        formats = {model: results["formats"][model].get(recipe, "") for model in results["formats"]}
        shown = [recipe, agreed(formats)]
        for target in TARGETS:
            names = PEFT if target == "peft" else (target,)
            texts: dict[str, list[str]] = {}
            for cell in cells:
                if cell.recipe == recipe and cell.target in names:
                    texts.setdefault(cell.model, []).append(cell_text(cell, notes))
            shown.append(agreed({model: "; ".join(cell_texts) for model, cell_texts in texts.items()}))
        lines.append("| " + " | ".join(shown) + " |")
    largest = ["largest difference of those equal", "", *(largest_equal(cells, target) for target in TARGETS)]
    lines.append("| " + " | ".join(largest) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    native = [cell.result for cell in cells if cell.target == NATIVE]
    differ = f"{native.count('differs')} of {len(native)} differ"
    lines += [f"Native folders opened by stock transformers as they are: {differ}", ""]
    moved = [value for by in results["moved"].values() for value in by.values()]
    lines.append(f"Largest change of a logit by the compression itself: {min(moved):.2g} to {max(moved):.2g}")
    return "\n".join(lines) + "\n"


def largest_equal(cells: list[Cell], target: str) -> str:
    names = PEFT if target == "peft" else (target,)
    differences = [
        c.difference for c in cells if c.target in names and c.result == "equal" and c.difference is not None
    ]
    return f"{max(differences):.1g}" if differences else ""


def agreed(texts: Mapping[str, str]) -> str:
    """What most models have, and then those that have something else."""
    groups: dict[str, list[str]] = {}
    for model, content in texts.items():
        groups.setdefault(content, []).append(model)
    first, *others = sorted(groups, key=lambda content: -len(groups[content]))
    return ". ".join([first, *(f"{', '.join(groups[content])}: {content}" for content in others)])


def cell_text(cell: Cell, notes: dict[str, int]) -> str:
    """`equal`, or the result with the number of its reason."""
    shown = cell.result
    if cell.result != "equal" and cell.reason:
        # of whichever linear and of however many
        reason = re.sub(r"^(\S+(?= in FOLDER)|\d+ of \d+ types as named)", "LINEAR", cell.reason)
        reason = re.sub(r"^LINEAR \(.*\); not named: .*", "matrices that are not in the map are rounded", reason)
        shown += f" ({notes.setdefault(reason, len(notes) + 1)})"
    return f"{cell.target.removeprefix('peft, ')}: {shown}" if cell.target in PEFT[1:] else shown


def real_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| recipe | llama-quantize | types in the file | as named | bits here | bits there | perplexity |"]
    lines += ["|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        named = f"{row['same']} of {row['named']}" if "named" in row else ""
        bits = [row.get("bits_per_weight_before", ""), row.get("bits_per_weight", "")]
        shown = [row["recipe"], row.get("quantize", ""), row.get("types", ""), named, *bits, row.get("perplexity", "")]
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    lines += ["", f"The original in transformers, the same windows: {rows[0].get('transformers', '')}"]
    lines += ["", f"The converter, unaltered: {rows[0].get('converter', '')}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
