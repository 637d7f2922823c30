"""The verb `export`: a compressed folder in another format, file by file.

compressed-tensors: for stock transformers and vLLM. dense: an ordinary checkpoint, for every program that opens one.
peft: as compressed-tensors, with the low-rank parts as a LoRA adapter beside it. gguf: one file for llama.cpp.
gguf-map: no weights, but the plan in llama.cpp's words. Only what a format has no place for is rounded again, and said;
all other codes and scales stay as they are.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDECAR, write_json
from llmsqueeze.formats import compressed_tensors, verify
from llmsqueeze.formats.check import refuse_misfits
from llmsqueeze.formats.entries import DENSE
from llmsqueeze.formats.exports import gguf, gguf_map, peft
from llmsqueeze.formats.exports.conversion import (
    Conversion,
    Converted,
    conversion,
    write_folder,
)
from llmsqueeze.formats.exports.reround import grid_for, predicted_cost
from llmsqueeze.formats.folder import check_writable, publish
from llmsqueeze.formats.opened import open_compressed
from llmsqueeze.journal.partial import partial_folder
from llmsqueeze.model.linears import find_blocks, find_linears
from llmsqueeze.model.original import locate
from llmsqueeze.model.tensors import shard
from llmsqueeze.parts import LowRank
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.values import choice

EXPORTS = (compressed_tensors.METHOD, DENSE, peft.FORMAT, gguf.FORMAT, gguf_map.FORMAT)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    folder: str,
    to: str,
    out: Path | None,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    adapter: str | None = None,
    gguf_base: Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the folder in the format `to`; returns the summary that the command prints.

    dtype (bf16, fp16, fp32): of dense weights (else the model's own) and adapters (else fp32). bits (else 4) and
    group_size (else the largest of 128, 64, 32 that fits): of the grid onto which coded weights are rounded for
    compressed-tensors. adapter: folder or Hub id of a LoRA adapter that is merged into dense weights. gguf_base: a GGUF
    file of the same model, in which the compressed weights are replaced; None: llama.cpp's converter makes it.
    Raises UnsupportedError if a part would be lost, and names the first; RecipeError.
    """
    check_request(to, dtype)
    if adapter is not None and to != DENSE:
        raise RecipeError(f"--adapter applies to --to dense; {to} has no place for what it adds to a weight")
    if gguf_base is not None and to != gguf.FORMAT:
        raise RecipeError(f"--gguf-base applies to --to gguf, not to {to}")
    opened = open_compressed(folder, "export converts one that llmsqueeze wrote", trust_remote_code)
    refuse_misfits(opened)
    grid = grid_for(opened.entries, to == compressed_tensors.METHOD, bits, group_size)
    plan = conversion(opened, to, DTYPES[dtype] if dtype else None, grid, locate(adapter) if adapter else None)
    out = out or opened.path.with_name(f"{opened.path.resolve().name}{'.' if to == gguf.FORMAT else '-'}{to}")
    notes, progress = Converted(), progress or Progress()
    if to != gguf.FORMAT:
        check_writable(out, overwrite)
    if to == gguf.FORMAT:
        result = gguf.write_gguf(plan, out, gguf_base, overwrite, progress)
    elif to == gguf_map.FORMAT:
        result = write_map(plan, out, overwrite)
    elif to == peft.FORMAT:
        result = write_adapted(plan, out, overwrite, notes, progress)
    else:
        result = {"nbytes": write_folder(plan, out, overwrite, notes, progress)}
    summary: dict[str, Any] = {"out": str(out), "model": folder, "target": to, "linears": len(opened.entries)}
    if grid is not None:
        summary |= {"rerounded": str(grid), "predicted_loss_increase": predicted_cost(opened.record, notes.squares)}
    summary |= {"nbytes_before": opened.checkpoint.nbytes, "opens": notes.opens}
    return summary | notes.opened.as_dict() | result


def check_request(to: str, dtype: str | None) -> None:
    """Raises RecipeError for an unknown format or dtype, and for a dtype that does not apply."""
    choice(EXPORTS)("to", to)
    if dtype is not None:
        choice(tuple(DTYPES))("dtype", dtype)
        if to not in (DENSE, peft.FORMAT):
            raise RecipeError(f"--dtype {dtype} applies to --to dense and --to peft; {to} keeps the model's own dtype")


def write_adapted(plan: Conversion, out: Path, overwrite: bool, notes: Converted, progress: Progress) -> dict[str, Any]:
    """Writes `base` and `adapter` in one folder; returns their part of the summary."""
    ranks = {
        name: int(spec["rank"])
        for name, entry in plan.entries.items()
        for spec in entry.specs
        if spec["part"] == LowRank.kind
    }
    if not ranks:
        raise UnsupportedError(
            f"{plan.folder.path} holds no low-rank parts, so there is nothing to adapt; export --to "
            "compressed-tensors, or quantize with --lorc-rank"
        )
    rank = peft.adapter_rank(ranks)
    with partial_folder(out) as folder:
        nbytes = write_folder(plan, folder / peft.BASE, overwrite, notes, progress)
        adapter_nbytes = write_adapter(folder / peft.ADAPTER, f"{out.name}/{peft.BASE}", notes, rank, plan.dtype)
        nbytes += adapter_nbytes
        write_json(folder / SIDECAR, plan.folder.record | {"format": peft.FORMAT, "nbytes": nbytes})
        publish(folder, out, overwrite)
    base, adapter = f"{out}/{peft.BASE}", f"{out}/{peft.ADAPTER}"
    serve = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"lorc={adapter}"]
    return {
        "nbytes": nbytes,
        "rank": rank,
        "adapted": len(notes.factors),
        "adapter_nbytes": adapter_nbytes,
        "command": shlex.join(serve),
        "code": peft.how_to_load(base, adapter),
    }


def write_adapter(folder: Path, base: str, notes: Converted, rank: int, dtype: torch.dtype | None) -> int:
    """Writes the low-rank parts as an adapter of the model `base`; returns the bytes of its tensors."""
    tensors: dict[str, Tensor] = {}
    for linear, factors in notes.factors.items():
        tensors |= peft.adapter_tensors(linear, factors, rank, dtype or torch.float32)
    folder.mkdir()
    shard.write(folder / ADAPTER_WEIGHTS, tensors)
    verify.same_tensors(folder / ADAPTER_WEIGHTS, tensors)
    write_json(folder / ADAPTER_CONFIG, peft.adapter_config(base, list(notes.factors), rank))
    return sum(tensor.nbytes for tensor in tensors.values())


def write_map(plan: Conversion, out: Path, overwrite: bool) -> dict[str, Any]:
    """Writes `tensor-types.txt` and `quantize.sh` in a folder; returns their part of the summary."""
    model = plan.folder.model
    blocks = find_blocks(model)
    linears = [name for block in blocks for name in find_linears(model, block)]
    names = gguf_map.tensor_names(model.config.model_type, len(blocks), linears)
    types = {names[linear]: gguf_map.WHOLE for linear in linears}  # llama.cpp rounds what the map does not name
    mapped = stored = 0.0  # bits
    for linear, entry in ((name, entry) for name, entry in plan.entries.items() if name not in plan.ends):
        nbytes = sum(plan.folder.checkpoint.tensors[name].nbytes for name in entry.tensors)
        types[names[linear]], bits = gguf_map.nearest_type(8 * nbytes / entry.numel, entry.shape[1])
        mapped, stored = mapped + bits * entry.numel, stored + 8 * nbytes
    original = str(plan.folder.record.get("model") or "original")
    with partial_folder(out) as folder:
        (folder / gguf_map.MAP).write_text(gguf_map.tensor_type_file(types), encoding="utf-8")
        (folder / "quantize.sh").write_text(gguf_map.script(original), encoding="utf-8")
        write_json(folder / SIDECAR, plan.folder.record | {"format": gguf_map.FORMAT})
        publish(folder, out, overwrite)
    return {
        "nbytes": 0,
        "types": {kind: sum(one == kind for one in types.values()) for kind in sorted(set(types.values()))},
        "commands": gguf_map.commands(original),
        "bits_per_weight": round(mapped / plan.numel, 4),
        "bits_per_weight_before": round(stored / plan.numel, 4),
    }
