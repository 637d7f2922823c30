"""Which architectures are handled: tiny random models, made of transformers' own config classes, through every stage.

    python evals/architectures.py [TYPE ...] [--variants] [--multimodal] [--add] [--out FILE.json]
    python evals/architectures.py --rows FOLDER --commit COMMIT [--out FILE.json]

TYPE: causal types of transformers, all of them if none is named; --variants: the variants below instead; --multimodal:
the image-text types instead; --add: keep the rows that the file has of others. A model gets small values for the usual
fields of its config. Stages: `quantize` at 8 and 4 bits (rtn), 3 bits (gptq), and 3.0 bits on average (coded). whole:
all stages end well, the logits of the 8-bit folder correlate with the original's at more than 0.99, and at least 0.9 of
the weights in matrices outside embeddings, head and towers is compressed. partly: less of them, or a stage refuses.
Writes the rows as JSON, and a table beside it (`.md`).

--rows: instead takes over the rows of a judge that looks from outside, one JSON file for each type in FOLDER: `type`
("mm:" before an image-text type), `verdict`, `stages` (name -> `status`, `said`), and if they are known `share`,
`correlation`, `format`, `dense` (kinds of weights that stay as they are), `wrong` (list), `not_built`. A row of the
same type replaces what the file has; --commit: that of the program that was judged.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

import llmsqueeze
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.errors import SqueezeError
from llmsqueeze.model.checkpoint import open_checkpoint

VOCABULARY = 512
SMALL: dict[str, int] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim", "embedding_size"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "d_inner"), 128)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "lru_width"), 64)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2)
    | dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "num_blocks"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "top_k_experts"), 2)
    | dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_kv", "d_head"), 16)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 256)
    | dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank", "sliding_window"), 16)
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "image_size": 32, "patch_size": 8, "rotary_dim": 16}
)
LLAMA = {"num_key_value_heads": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases in attention and MLP": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "untied embeddings": ("llama", {"tie_word_embeddings": False}),
    "one head of keys and values": ("llama", {"num_key_value_heads": 1}),
    "heads wider than the model": ("llama", {"head_dim": 32}),
    "columns that no group size divides": ("llama", {"intermediate_size": 100}),
    "windows and full attention in turn": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "keys and values of earlier blocks": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "intermediate_size": 128,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
        },
    ),
    "embeddings narrower than blocks": ("opt", {"word_embed_proj_dim": 32}),
    "attention among state spaces": (
        "bamba",
        {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    ),
    "convolutions and attention": (
        "lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "full_attn_idxs": [1]},
    ),
    "a linear whose weight others read": ("mamba", {}),
    "parallel branches": ("gpt_neox", {"use_parallel_residual": True}),
    "transposed linears": ("gpt2", {}),
    "lists from blocks": ("openai-gpt", {}),
    "hidden states scaled in place": ("ctrl", {}),
}
CAUSAL, IMAGE_TEXT = "causal types", "image-text types"
ORDER = ("whole", "partly", "failing", "refused", "not built")
FLIPS = "a random router (or indexer) that decides otherwise for a few tokens; with the original's choices: "
KNOWN = {  # causes that were looked into, by type
    "glm_moe_dsa": FLIPS + "0.9996",
    "phimoe": FLIPS + "0.9996 (the other tokens)",
    "muse_spark": FLIPS + "0.9994",
    "shieldgemma2": "transformers saves it under names that it does not read again: the original does not open either",
    "ctrl": "the table of embeddings, here called `w`, counts as a matrix; all linears of the blocks are compressed",
    "git": "the head, here called `output`, counts as a matrix; all linears of the blocks are compressed",
    "rembert": "the head, here called `cls.predictions.decoder`, counts as a matrix; all linears are compressed",
    "minimax": "a table of decays that is computed, not learned, counts as a matrix; all linears are compressed",
    "idefics2": "the connector between towers stays as it is (`--vision rtn8` rounds it)",
    "idefics3": "the connector between towers stays as it is (`--vision rtn8` rounds it)",
    "smolvlm": "the connector between towers stays as it is (`--vision rtn8` rounds it)",
    "janus": "the parts that make images stay as they are (`--vision rtn8` rounds them)",
}
ASIDE = re.compile(r"embed|lm_head|wte|wpe|word_emb|position|^head|shared\.weight|vision|image|audio|projector|merger")
STAGES: dict[str, dict[str, Any]] = {
    "rtn8": {"method": "rtn", "bits": 8, "group_size": 32},
    "rtn4": {"method": "rtn", "bits": 4, "group_size": 32},
    "gptq3": {"method": "gptq", "bits": 3, "group_size": 32, "samples": 4, "seq_len": 32},
    "coded3": {"method": "coded", "bits": 3.0, "samples": 4, "seq_len": 32},
}


def shrunk(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config with small values, and then with the changes."""
    small = copy.deepcopy(values)
    for key, value in values.items():
        if isinstance(value, dict):
            small[key] = shrunk(value, {})
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            small[key] = SMALL[key]
        elif key == "layer_types" and isinstance(value, list):
            small[key] = value[:2]
        elif key.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            small[key] = 1
    return small | changes


def make(kind: str, changes: dict[str, Any], multimodal: bool, folder: Path) -> Any:
    """Writes a tiny random model of a type; returns it in float32."""
    config_class = CONFIG_MAPPING[kind]
    dropped = ("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id")
    values = {key: value for key, value in config_class().to_dict().items() if key not in dropped}
    config = config_class.from_dict(shrunk(values, changes))
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # the numbers that transformers draws are so small that the blocks of a model of this size would do nothing
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            parameter.data.normal_(std=0.5)
        elif parameter.dim() >= 2 and min(parameter.shape[-2:]) >= 2 and "A_log" not in name:
            parameter.data.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[tokens * vocabulary] for the same few tokens."""
    ids = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(11))
    output: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return output.double().flatten()


def share(original: Path, compressed: Path) -> float:
    """Of the weights in matrices that could be compressed, those that are."""
    before, after = open_checkpoint(original).tensors, open_checkpoint(compressed).tensors
    sizes = {
        name: torch.Size(tensor.shape).numel()
        for name, tensor in before.items()
        if len(tensor.shape) > 1 and min(tensor.shape[-2:]) >= 8 and not ASIDE.search(name)
    }
    dense = {n for n, t in after.items() if n in before and t.shape == before[n].shape}
    return 1 - sum(size for name, size in sizes.items() if name in dense) / max(1, sum(sizes.values()))


def judged(name: str, kind: str, changes: dict[str, Any], multimodal: bool) -> dict[str, Any]:
    """A model's row: what became of each stage, and the verdict."""
    row: dict[str, Any] = {"name": name, "type": kind, "stages": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            expected = logits(make(kind, changes, multimodal, folder / "original"))
        except Exception as error:
            return row | {"verdict": "not built", "why": f"{type(error).__name__}: {str(error)[:160]}"}
        for stage, recipe in STAGES.items():
            text = {} if recipe["method"] == "rtn" else {"calibration": "demo"}
            try:
                summary = llmsqueeze.quantize(str(folder / "original"), str(folder / stage), **recipe, **text)
                row["stages"][stage] = "ok"
            except SqueezeError as error:
                row["stages"][stage] = f"refused: {error}"[:300]
                continue
            except Exception:
                row["stages"][stage] = f"failed: {traceback.format_exc()[-300:]}"
                continue
            if stage == "rtn8":
                row |= {"format": summary["format"], "share": round(share(folder / "original", folder / stage), 3)}
                opened = llmsqueeze.load(str(folder / stage), dtype=torch.float32).eval()
                both = torch.stack([expected, logits(opened)])
                row["correlation"] = round(float(torch.corrcoef(both)[0, 1]), 5)
    return row | {"verdict": verdict(row)}


def verdict(row: dict[str, Any]) -> str:
    """whole, partly, refused or failing."""
    stages = list(row["stages"].values())
    if any(stage.startswith("failed") for stage in stages) or row.get("correlation", 1.0) <= 0.99:
        return "failing"
    if stages[0] != "ok":
        return "refused"
    return "whole" if set(stages) == {"ok"} and row["share"] >= 0.9 else "partly"


def from_outside(row: dict[str, Any], commit: str) -> dict[str, Any]:
    """A row of an outside judge as one of ours."""
    kind = row["type"].removeprefix("mm:")
    stages = {name: stage["status"] for name, stage in row["stages"].items()}
    said = [f"{name}: {stage['said'].splitlines()[-1]}" for name, stage in row["stages"].items() if stage["said"]]
    why = row.get("not_built") or "; ".join(row.get("wrong") or said[:1])
    verdict = row["verdict"]
    if row.get("not_built"):
        verdict, why = "not built", "; ".join([" ".join(why.split())[:120], *said[:1]])
    elif verdict == "partly" and not why:
        why = f"{', '.join(row['dense'][:3])} stay as they are"
    numbers = {key: round(row[key], 5) for key in ("share", "correlation") if key in row}
    group = CAUSAL if kind == row["type"] else IMAGE_TEXT
    why = " ".join(re.sub(r"/\S*/", "", why).split())[:240]
    own = {"group": group, "name": kind, "type": kind, "stages": stages, "verdict": verdict, "why": why}
    return own | numbers | {"format": row.get("format", ""), "commit": commit}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["# Architectures", "", "Tiny random models through every stage (`evals/architectures.py`).", ""]
    for group in dict.fromkeys(row["group"] for row in rows):
        some = [row for row in rows if row["group"] == group]
        counts = Counter(row["verdict"] for row in some)
        totals = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts, key=ORDER.index))
        lines += [f"## {group}: {len(some)}, of which {totals}", ""]
        if any("commit" in row for row in some):
            lines += compact(some)
            continue
        lines += ["| model | type | verdict | compressed | correlation | format |", "|---|---|---|---|---|---|"]
        for row in some:
            numbers = (f"{row['share']:.2f}", f"{row['correlation']:.4f}") if "share" in row else ("", "")
            lines.append(
                f"| {row['name']} | {row['type']} | {row['verdict']} | {' | '.join(numbers)} "
                f"| {row.get('format', '')} |"
            )
        said = [(r["name"], r.get("why") or next((s for s in r["stages"].values() if s != "ok"), "")) for r in some]
        lines += ["", *(f"- {name}: {' '.join(why.split())}" for name, why in said if why), ""]
    return "\n".join(lines)


def compact(rows: list[dict[str, Any]]) -> list[str]:
    """Many types as Markdown: the names of the whole ones, and a line for every other."""
    whole = sorted(row["name"] for row in rows if row["verdict"] == "whole")
    commits = Counter(row["commit"] for row in rows)
    seen = ", ".join(f"{count} at {commit}" for commit, count in commits.most_common())
    lines = [f"Judged from outside: {seen}.", "", f"Whole: {', '.join(whole)}.", ""]
    lines += ["| type | verdict | compressed | correlation | why |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (ORDER.index(row["verdict"]), row["name"])):
        if row["verdict"] != "whole":
            numbers = (f"{row['share']:.2f}" if "share" in row else "", f"{row.get('correlation', '')}")
            why = KNOWN.get(row["name"], "") or row["why"].replace("|", "/")
            lines.append(f"| {row['name']} | {row['verdict']} | {' | '.join(numbers)} | {why} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--multimodal", action="store_true")
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("evals/results/architectures.json"))
    options = parser.parse_args()
    if options.rows is not None:
        rows = json.loads(options.out.read_text()) if options.out.exists() else []
        new = [
            from_outside(json.loads(file.read_text()), options.commit) for file in sorted(options.rows.glob("*.json"))
        ]
        named = {(row["group"], row["name"]) for row in new}
        write(options.out, [*(row for row in rows if (row["group"], row["name"]) not in named), *new])
        return
    mapping: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if options.multimodal:
        mapping = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    group = "variants" if options.variants else IMAGE_TEXT if options.multimodal else CAUSAL
    wanted = VARIANTS if options.variants else {kind: (kind, {}) for kind in options.types or mapping}
    rows = json.loads(options.out.read_text()) if options.add and options.out.exists() else []
    for name, (kind, changes) in wanted.items():
        row = {"group": group} | judged(name, kind, changes, options.multimodal)
        rows = [one for one in rows if (one["group"], one["name"]) != (group, name)] + [row]
        print(f"{name:36} {row['verdict']:9} {row.get('share', '')} {row.get('correlation', '')}", flush=True)
        write(options.out, rows)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as JSON, the variants first, and as Markdown beside it."""
    rows = sorted(rows, key=lambda row: ("variants", CAUSAL, IMAGE_TEXT).index(row["group"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
