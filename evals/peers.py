"""Other tools at their own bytes: AutoRound, HQQ, llama.cpp's types; the text and the protocol of `methods.py`.

    python evals/peers.py MODEL CALIBRATION EVAL_TEXT --tool autoround|hqq|llamacpp --python TOOL_ENV/bin/python \\
        [--llama-bin LLAMA_CPP/build/bin] [--rows REGEX] [--limit 300] [--out FILE.json]

Every tool runs in an environment of its own, as a subprocess of this very file: `pip install auto-round`, `pip install
hqq`, `pip install gguf safetensors torch` for llama.cpp, whose llama-quantize and llama-imatrix are real programs. It
quantizes the linears of the decoder blocks and nothing else; what it made is dequantized into the original as an
ordinary float32 folder, and that is measured here, against the original. --out keeps the rows of the other tools.

Calibration: the very token rows that `quantize` draws from CALIBRATION (seed 0). AutoRound takes them as they are.
llama-imatrix reads text, so the GGUF gets a vocabulary in which every token is one private character, which leads to
the same rows again and needs no conversion of tokenizers.

Bits per weight: all bytes that the tool's own format stores for the linears of the blocks, by the number of weights.
AutoRound: the packed qweight, qzeros (stored with symmetric codes also) and float16 scales in the safetensors that it
writes. HQQ: the packed W_q, and scale and zero in float16; its 3-bit codes are ten to an int32, so 3.2 bits, and filled
up to a multiple of ten, which shows on matrices as small as these. llama.cpp: the bytes of the tensors in the GGUF. A
linear that a tool leaves alone (AutoRound where rows or columns are no multiple of 32, llama.cpp where 32 does not
divide the columns) counts its 16 bits a weight.

AutoRound tunes in float32 (amp=False: in bfloat16 it would round the weights first), 200 iterations, batches of 8, its
seed 42; where the group does not divide the columns, the last group of a row is short. HQQ: its own settings; where the
group does not divide the columns, groups run on from row to row. llama.cpp, "pure": every linear of the blocks in this
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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
PRIVATE = 0xF0000  # the first of 65 534 characters that no text uses
BATCH = 8
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

Settings = dict[str, Any]


def autoround_rows() -> dict[str, Settings]:
    return {
        f"{bits} bit g{group} {'sym' if symmetric else 'asym'}": {"bits": bits, "group_size": group, "sym": symmetric}
        for bits in (2, 3, 4)
        for group in (64, 128)
        for symmetric in (True, False)
    }


def hqq_rows() -> dict[str, Settings]:
    plain = {
        f"{bits} bit g{group}": {"nbits": bits, "group_size": group, "axis": 1}
        for bits in (2, 3, 4)
        for group in (32, 64, 128)
    }
    return plain | {f"{bits} bit g64 axis 0": {"nbits": bits, "group_size": 64, "axis": 0} for bits in (2, 3, 4)}


def llamacpp_rows() -> dict[str, Settings]:
    """Types with and without the importance matrix, where they do not insist on it; mixtures always with it."""
    either = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    by_matrix = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"]
    mixtures = ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ2_M", "IQ3_XXS", "IQ3_M"]
    rows: dict[str, Settings] = {f"{kind} pure": {"type": kind, "imatrix": False} for kind in either}
    rows |= {f"{kind} pure, imatrix": {"type": kind, "imatrix": True} for kind in (*either, *by_matrix)}
    return rows | {f"{kind}, imatrix": {"mixture": kind, "imatrix": True} for kind in mixtures}


class UnfitError(Exception):
    """The tool has this row for other widths only."""


@dataclass
class Quantized:
    """What a tool made: float32 linears by the checkpoint's names, the bytes that it stores for them, in its words."""

    dense: dict[str, Any]
    stored: int
    seconds: float
    version: str
    note: str = ""


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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # MODEL is then a folder with a job
    args = parser.parse_args()
    if args.child:
        child(args.model)
        return
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
        row = {"model": args.model.name, "tool": tool, "row": name, **measured(args, work, common, settings)}
        results = [old for old in results if (old["tool"], old["row"]) != (tool, name)]
        results += [row] if "unfit" not in row else []
        print(line(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


def calibration_tokens(args: argparse.Namespace) -> list[list[int]]:
    """The rows that `quantize` would draw."""
    from llmsqueeze.model.text import calibration_rows, calibration_text, load_tokenizer

    tokenizer = load_tokenizer(args.model)
    text = calibration_text(args.calibration, str(args.model))
    return [row[0].tolist() for row in calibration_rows(text, tokenizer, args.samples, args.window, seed=0).rows]


def measured(args: argparse.Namespace, work: Path, common: Settings, settings: Settings) -> dict[str, Any]:
    """One row: the tool's process, and a real evaluation of what came out. Without settings nothing is quantized."""
    from llmsqueeze.cli.terminal import hush
    from llmsqueeze.evaluation.evaluate import evaluate
    from llmsqueeze.model.text import evaluation_text

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
    names = ("nll_difference", "nll_difference_stderr", "kl_mean", "perplexity")
    scores = {name: evaluation.as_dict()[name] for name in names}
    original = evaluation.baseline.perplexity if evaluation.baseline else None
    return answer | scores | {"perplexity_original": original}


def ask(python: str, work: Path, job: Settings) -> dict[str, Any]:
    """Runs the tool in its own environment, without ours on the path; weights and answer lie in `work` then."""
    (work / "job.json").write_text(json.dumps(job))
    (work / "answer.json").unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(Path(__file__).resolve()), str(work), "--child"]
    done = subprocess.run(command, env=kept | offline, cwd=work, capture_output=True, text=True, check=False)
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


# from here on: inside the tool's environment, but for `checkpoint`, which both use


def checkpoint(model: Path) -> dict[str, Any]:
    """Every tensor of the original by its name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def child(work: Path) -> None:
    """Does the job that lies in `work`."""
    from safetensors.torch import save_file

    job = json.loads((work / "job.json").read_text())
    try:
        result = TOOLS[job["tool"]][0](work, job)
        weights = sum(tensor.numel() for tensor in result.dense.values())
        save_file({name: tensor.contiguous() for name, tensor in result.dense.items()}, work / "weights.safetensors")
        answer = {
            "version": result.version,
            "bits_per_weight": result.stored * 8 / weights,
            "nbytes": result.stored,
            "seconds": round(result.seconds, 3),
            "note": result.note,
        }
    except UnfitError as error:
        answer = {"unfit": str(error)}
    except Exception as error:  # whatever the tool says is the result
        answer = {"error": f"{type(error).__name__}: {error}"}
    (work / "answer.json").write_text(json.dumps(answer))


def nbytes(*tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def by_hqq(_: Path, job: Settings) -> Quantized:
    """HQQLinear of every linear. Dequantized in float32, from scales and zeros as they are stored, in float16."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    result = Quantized({}, 0, 0.0, version("hqq"))
    for name, weight in checkpoint(Path(job["model"])).items():
        if not LINEAR.fullmatch(name):
            continue
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.float()
        start = time.monotonic()
        layer = HQQLinear(linear, BaseQuantizeConfig(**job["settings"]), compute_dtype=torch.float16, device="cpu")
        result.seconds += time.monotonic() - start
        scale, zero = layer.meta["scale"], layer.meta["zero"]
        assert scale.dtype == zero.dtype == torch.float16
        result.stored += nbytes(layer.W_q, scale, zero)
        exact = {"compute_dtype": torch.float32, "scale": scale.float(), "zero": zero.float()}
        result.dense[name] = Quantizer.dequantize(layer.W_q.data, layer.meta | exact)
    return result


def by_autoround(work: Path, job: Settings) -> Quantized:
    """AutoRound on the model in float32; its own dequantized weights, and the size of what it then packs."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = torch.tensor(job["tokens"])
    start = time.monotonic()
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        dataset=list(rows.split(BATCH)),
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        iters=200,
        seed=42,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        **job["settings"],
    )
    quantized, _ = tool.quantize()
    result = Quantized({}, 0, time.monotonic() - start, version("auto-round"))
    for name, weight in quantized.state_dict().items():
        if LINEAR.fullmatch(name):
            result.dense[name] = weight.detach().float().clone()
    packed = work / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    tool.save_quantized(str(packed), format="auto_round", inplace=True)
    left = 0
    for file in packed.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if LINEAR.fullmatch(name):  # left as it was, and in float32 only because the model came so
                result.stored += 2 * tensor.numel()
                left += 1
            elif "_proj." in name:
                result.stored += nbytes(tensor)
    result.note = f"{left} of {len(result.dense)} linears left as they were" if left else ""
    return result


def by_llamacpp(work: Path, job: Settings) -> Quantized:
    """llama-quantize, and llama-quantize again to read its types back as float32."""
    import torch
    from gguf import GGUFReader

    settings, whole = job["settings"], work / "whole.gguf"
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    if not whole.exists():
        write_gguf(config, checkpoint(Path(job["model"])), whole)
    seconds = importance(work, job) if settings["imatrix"] else 0.0
    start = time.monotonic()
    options = ["--imatrix", str(work / "imatrix.gguf")] if settings["imatrix"] else []
    # no embedding is quantized; the type goes by its pattern, as some names mean a mixture even with --pure
    options += ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
    if "type" in settings:
        options += ["--tensor-type", f"blk={settings['type'].lower()}"]
    small, back = work / "small.gguf", work / "back.gguf"
    # with a pattern for all linears the name of the whole decides nothing more
    log = program(job, "llama-quantize", *options, str(whole), str(small), settings.get("mixture", "Q8_0"), "1")
    seconds += time.monotonic() - start
    program(job, "llama-quantize", "--allow-requantize", str(small), str(back), "F32", "1")
    release = re.findall(r"version: (.*)", program(job, "llama-imatrix", "--version"))
    result = Quantized({}, 0, seconds, " ".join(release))
    names = {gguf_name(name): name for name in checkpoint(Path(job["model"])) if LINEAR.fullmatch(name)}
    kinds = [(tensor.tensor_type.name, tensor.n_bytes) for tensor in GGUFReader(small).tensors if tensor.name in names]
    count = Counter(kind for kind, _ in kinds)
    result.stored = int(sum(size for _, size in kinds))
    result.note = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))
    if not count[settings["type"]] if "type" in settings else "falling back" in log:
        raise UnfitError(f"does not fit these widths, llama-quantize would make it {result.note}")
    for tensor in GGUFReader(back).tensors:
        if tensor.name in names:
            assert tensor.tensor_type.name == "F32"
            cols, rows = (int(size) for size in tensor.shape)
            weight = torch.from_numpy(tensor.data.copy()).view(rows, cols)
            result.dense[names[tensor.name]] = turned(weight, heads_of(config, tensor.name), back=True)
    return result


def program(job: Settings, name: str, *arguments: str) -> str:
    """Runs one of llama.cpp's programs; what it said. RuntimeError with its complaint if it failed."""
    folder = Path(job["programs"])
    # some name a token, and half a character is no text
    done = subprocess.run([str(folder / name), *arguments], capture_output=True, errors="replace", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: " + " ".join((done.stdout + done.stderr).split()[-40:]))
    return done.stdout + done.stderr


def importance(work: Path, job: Settings) -> float:
    """Writes imatrix.gguf of the calibration rows unless it is there; the seconds that it took."""
    file, taken = work / "imatrix.gguf", work / "imatrix.seconds"
    if not file.exists():
        rows = job["tokens"]
        (work / "rows.txt").write_text("".join(chr(PRIVATE + token) for row in rows for token in row))
        start = time.monotonic()
        length = str(len(rows[0]))
        options = ["-m", str(work / "whole.gguf"), "-f", str(work / "rows.txt"), "-o", str(file), "-c", length]
        log = program(job, "llama-imatrix", *options, "-t", "1")
        taken.write_text(str(time.monotonic() - start))
        assert f"over {len(rows)} chunks" in log, log  # so every token became one token again
    return float(taken.read_text())


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`"""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, _, block, inner = stem.split(".", 3)
    return f"blk.{block}.{GGUF_NAMES[inner]}.weight"


def heads_of(config: dict[str, Any], name: str) -> int:
    """The heads whose rows llama.cpp wants in another order; 0 for a tensor that it takes as it is."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return heads.get(name.split(".")[-2], 0)


def turned(weight: Any, heads: int, back: bool = False) -> Any:
    """Rows of q and k from halves (transformers) to pairs (llama.cpp), or back: rotary embedding pairs them so."""
    if not heads:
        return weight
    half = weight.shape[0] // heads // 2
    parts = weight.reshape(heads, half, 2, -1) if back else weight.reshape(heads, 2, half, -1)
    return parts.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(config: dict[str, Any], tensors: dict[str, Any], file: Path) -> None:
    """The Llama as it is, in float32, with a vocabulary of private characters."""
    from gguf import GGUFWriter, TokenType

    assert config["model_type"] == "llama"
    assert config["vocab_size"] < 65_000
    rope = config.get("rope_parameters") or config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(PRIVATE + token) for token in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([TokenType.NORMAL] * config["vocab_size"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)  # the rows have theirs
    writer.add_add_space_prefix(False)
    for name, tensor in tensors.items():
        as_wanted = turned(tensor.float(), heads_of(config, gguf_name(name)))
        writer.add_tensor(gguf_name(name), as_wanted.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TOOLS: dict[str, tuple[Callable[[Path, Settings], Quantized], Callable[[], dict[str, Settings]]]] = {
    "autoround": (by_autoround, autoround_rows),
    "hqq": (by_hqq, hqq_rows),
    "llamacpp": (by_llamacpp, llamacpp_rows),
}


if __name__ == "__main__":
    main()
