"""What runs inside the environment of a tool, for `peers.py`.

    TOOL_ENV/bin/python evals/peer_tools.py WORK

WORK: a folder with job.json: tool, model, programs, tokens (the rows), settings. What the tool made is left there:
weights.safetensors, float32 by the names of the checkpoint, and answer.json.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
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
    plain: dict[str, Settings] = {
        f"{bits} bit g{group} {'sym' if symmetric else 'asym'}": {"bits": bits, "group_size": group, "sym": symmetric}
        for bits in (2, 3, 4)
        for group in (64, 128)
        for symmetric in (True, False)
    }
    light = {"group_size": 64, "sym": True, "iters": 50}
    return plain | {f"{bits} bit g64 sym, 50 iterations": {"bits": bits, **light} for bits in (2, 3, 4)}


def llmcompressor_rows() -> dict[str, Settings]:
    return {
        f"{name} {bits} bit g64": {"modifier": name, "bits": bits, "group_size": 64}
        for bits in (2, 3, 4)
        for name in ("gptq", "awq")
    }


def bitsandbytes_rows() -> dict[str, Settings]:
    return {"nf4": {"kind": "nf4"}}


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


def checkpoint(model: Path) -> dict[str, Any]:
    """Every tensor of the original by its name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> None:
    """Does the job that lies in WORK."""
    from safetensors.torch import save_file

    work = Path(sys.argv[1])

    job = json.loads((work / "job.json").read_text())
    try:
        result = TOOLS[job["tool"]][0](work, job)
        weights = sum(tensor.numel() for name, tensor in result.dense.items() if LINEAR.fullmatch(name))
        used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        save_file({name: tensor.contiguous() for name, tensor in result.dense.items()}, work / "weights.safetensors")
        answer = {
            "version": result.version,
            "bits_per_weight": result.stored * 8 / weights,
            "nbytes": result.stored,
            "seconds": round(result.seconds, 3),
            "processor_seconds": round(sum(one.ru_utime + one.ru_stime for one in used), 1),
            "peak_memory_mb": round(max(one.ru_maxrss for one in used) / 1024, 1),
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
        seed=42,
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        **{"iters": 200, **job["settings"]},
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


def by_llmcompressor(work: Path, job: Settings) -> Quantized:
    """GPTQ or AWQ of llm-compressor with its defaults, in float32; AWQ changes norms too."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    packed = work / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    seconds = llmcompressor(job["model"], job["tokens"], packed, **job["settings"])
    result = Quantized({}, 0, seconds, version("llmcompressor"))
    for file in packed.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.endswith("_proj.weight_packed"):
                result.stored += nbytes(tensor)
            elif name.endswith("_proj.weight_scale"):  # in float32 only because the model came so
                result.stored += 2 * tensor.numel()
    whole = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=whole, dtype=torch.float32)
    known = checkpoint(Path(job["model"]))
    for name, weight in model.state_dict().items():
        if name in known and ".layers." in name:
            result.dense[name] = weight.detach().float().clone()
    return result


def llmcompressor(model: str, rows: list[list[int]], out: Path, modifier: str, bits: int, group_size: int) -> float:
    """Writes the packed folder; the seconds that it took."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifiers = {"gptq": GPTQModifier, "awq": AWQModifier}
    start = time.monotonic()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[modifiers[modifier](config_groups=scheme, ignore=["lm_head"])],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        output_dir=str(out),
    )
    return time.monotonic() - start


def by_bitsandbytes(_: Path, job: Settings) -> Quantized:
    """NF4 in blocks of 64 with double quantization of the scales, as QLoRA has it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    result = Quantized({}, 0, 0.0, version("bitsandbytes"))
    for name, weight in checkpoint(Path(job["model"])).items():
        if LINEAR.fullmatch(name):
            start = time.monotonic()
            codes, state = quantize_4bit(
                weight.float(), blocksize=64, compress_statistics=True, quant_type=job["settings"]["kind"]
            )
            result.seconds += time.monotonic() - start
            result.stored += nbytes(codes, state.absmax, state.state2.absmax) + 4  # and the offset
            result.dense[name] = dequantize_4bit(codes, state)
    return result


TOOLS: dict[str, tuple[Callable[[Path, Settings], Quantized], Callable[[], dict[str, Settings]]]] = {
    "autoround": (by_autoround, autoround_rows),
    "hqq": (by_hqq, hqq_rows),
    "llamacpp": (by_llamacpp, llamacpp_rows),
    "llmcompressor": (by_llmcompressor, llmcompressor_rows),
    "bitsandbytes": (by_bitsandbytes, bitsandbytes_rows),
}


if __name__ == "__main__":
    main()
