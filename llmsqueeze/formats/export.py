"""The verb `export`: a compressed folder in another format, shard by shard; nothing is rounded again.

compressed-tensors: the same codes and scales under the names that stock transformers and vLLM know; refused where a
part has no place there. dense: the sum of the parts as an ordinary checkpoint, for whatever opens one. peft: the same
as compressed-tensors, with low-rank parts as a LoRA adapter beside it. gguf-map: no weights, but the plan in
llama.cpp's words.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmsqueeze import parts
from llmsqueeze.allocation.plan import short_groups
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json_if_there, write_json
from llmsqueeze.formats import compressed_tensors, gguf, peft, verify
from llmsqueeze.formats.entries import Entry, read_entries, read_parts
from llmsqueeze.formats.folder import Output, check_writable, digest, partial_folder, publish
from llmsqueeze.formats.reround import reround
from llmsqueeze.formats.rewrite import rewrite
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.linears import all_linears, find_blocks, find_linears, is_transposed
from llmsqueeze.model.skeleton import empty_model, load_config
from llmsqueeze.parts import Grid, LowRank, Part, spec_grid
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.values import choice, whole
from llmsqueeze.recipe.values import group_size as checked_group_size

TARGETS = (compressed_tensors.METHOD, "dense", peft.FORMAT, gguf.FORMAT)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUP_SIZES = (128, 64, 32)  # of coded weights that are rounded again, the first that leaves no short group
BASE_TYPE = "Q4_K_M"  # of what the map does not name; llama-quantize reads a map only beside a type that rounds
SCRIPT = """\
#!/bin/sh
# usage: sh quantize.sh [FOLDER OF THE ORIGINAL]; needs llama.cpp's programs and a calibration.txt
set -e
"""


@dataclass(frozen=True)
class Source:
    """The folder to convert: what it holds, and the model that its config describes. ends: embeddings and head, where
    they are coded; other formats have them dense. grid: onto which coded weights are
    rounded again, where they are."""

    path: Path
    checkpoint: Checkpoint
    entries: dict[str, Entry]
    model: PreTrainedModel
    transposed: frozenset[str]
    trust_remote_code: bool
    ends: frozenset[str] = frozenset()
    grid: Grid | None = None

    @property
    def numel(self) -> int:
        return sum(rows * cols for rows, cols in (entry.shape for entry in self.entries.values()))

    @property
    def kept_nbytes(self) -> int:
        """Bytes of all that is not a compressed linear's weight."""
        stored = {name for entry in self.entries.values() for name in entry.tensors}
        return self.checkpoint.nbytes - sum(self.checkpoint.tensors[name].nbytes for name in stored)


@dataclass
class Made:
    """What a conversion leaves beside the new folder: digests of the weights that its parts have to sum to, low-rank
    parts that went elsewhere, squared errors in steps of what was rounded again, and the verdicts of the check."""

    meant: dict[str, bytes] = field(default_factory=dict)
    rerounded: dict[str, float] = field(default_factory=dict)
    factors: dict[str, LowRank] = field(default_factory=dict)
    opens: dict[str, str] = field(default_factory=dict)


def export(
    folder: str,
    target: str,
    out: Path | None,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the folder in the format `target`; `dtype` (bf16, fp16, fp32) is for dense weights (else the model's own)
    and for adapters (else fp32). `bits` (else 4) and `group_size` (else what fits) are those of the grid onto which
    coded weights are rounded again for compressed-tensors.

    Raises UnsupportedError where a part would be lost, naming the first.
    """
    target, dtype = checked(target, dtype)
    source = open_source(folder, trust_remote_code)
    source = replace(source, grid=grid_again(source, target, bits, group_size))
    out = out or source.path.with_name(f"{source.path.resolve().name}-{target}")
    check_writable(out, overwrite)
    made, progress = Made(), progress or Progress()
    if target == "gguf-map":
        extra = write_map(source, out, overwrite)
    elif target == "peft":
        extra = write_adapted(source, out, dtype, overwrite, made, progress)
    else:
        extra = {"nbytes": write_folder(source, target, out, dtype, overwrite, made, progress)}
    about = {"out": str(out), "model": folder, "target": target, "linears": len(source.entries)}
    if source.grid is not None:
        about |= {"rerounded": str(source.grid), "predicted_loss_increase": cost_of(source, made)}
    return about | {"nbytes_before": source.checkpoint.nbytes, "opens": made.opens} | extra


def checked(target: str, dtype: str | None) -> tuple[str, str | None]:
    """What was asked for, if there is such a thing. Raises RecipeError."""
    target = choice(TARGETS)("target", target)
    if dtype is not None:
        dtype = choice(tuple(DTYPES))("dtype", dtype)
        if target not in ("dense", "peft"):
            raise RecipeError(f"dtype {dtype} goes with --to dense and --to peft; {target} keeps the model's own")
    return target, dtype


def grid_again(source: Source, target: str, bits: int | None, group_size: int | None) -> Grid | None:
    """The grid onto which coded weights have to be rounded for the target; None if there are none, or no need to.

    Raises RecipeError for a grid that is asked for where nothing is rounded again, or that does not fit.
    """
    coded = any(spec["part"] == parts.Coded.kind for entry in source.entries.values() for spec in entry.specs)
    if not coded or target != compressed_tensors.METHOD:
        for name, value in (("bits", bits), ("group size", group_size)):
            if value is not None:
                raise RecipeError(
                    f"{name} {value} goes with coded weights for --to {compressed_tensors.METHOD}; nothing else is "
                    "rounded again"
                )
        return None
    width = whole(2, 8)("bits", 4 if bits is None else bits)
    shapes = {name: entry.shape for name, entry in source.entries.items()}
    if group_size is None:
        fitting = (size for size in GROUP_SIZES if short_groups(shapes, [size]) is None)
        return Grid(width, next(fitting, -1), symmetric=True)
    if why := short_groups(shapes, [checked_group_size("group_size", group_size)]):
        raise RecipeError(why)
    return Grid(width, group_size, symmetric=True)


def cost_of(source: Source, made: Made) -> float | None:
    """Predicted loss (nats per token) of rounding again; None where the folder does not say what errors cost."""
    known = read_json_if_there(source.path / SIDECAR).get("sensitivities", {})
    if any(name not in known for name in made.rerounded):
        return None
    return float(sum(known[name] * squares for name, squares in made.rerounded.items()))


def open_source(folder: str, trust_remote_code: bool) -> Source:
    """Raises RecipeError, CheckpointError or UnsupportedError for what is no folder of ours."""
    path = Path(folder)
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; export converts one that llmsqueeze wrote")
    checkpoint = open_checkpoint(path)
    entries = read_entries(checkpoint)
    model = empty_model(path, load_config(path, trust_remote_code), trust_remote_code)
    transposed = frozenset(name for name in entries if is_transposed(model.get_submodule(name)))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = frozenset(name for name in entries if model.get_submodule(name) in ends)
    return Source(path, checkpoint, entries, model, transposed, trust_remote_code, outer)


def write_folder(
    source: Source, target: str, out: Path, dtype: str | None, overwrite: bool, made: Made, progress: Progress
) -> int:
    """A model folder in the format `target` (peft: the base); returns the bytes of its tensors."""
    checkpoint = source.checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if target == "dense":
        config |= {"dtype": parts.dtype_name(DTYPES[dtype])} if dtype else {}
    else:
        held = {name: without_factors(entry) if target == "peft" else entry for name, entry in source.entries.items()}
        if source.grid is not None:
            held = {name: on_grid(entry, source.grid) for name, entry in held.items() if name not in source.ends}
        refuse_loss(source, held)
        config["quantization_config"] = portable_config(source.model, held)
    record, form = (
        read_json_if_there(source.path / SIDECAR),
        "dense" if target == "dense" else compressed_tensors.METHOD,
    )

    def sidecar(nbytes: int) -> Mapping[str, Any]:
        bits = round((nbytes - source.kept_nbytes) * 8 / source.numel, 6)
        return record | {"nbytes": nbytes, "bits_per_weight": bits, "format": form}

    def inspect(output: Output) -> None:
        computed = verify.Computed(made.meant)
        made.opens |= verify.verify(output, computed, trust_remote_code=source.trust_remote_code).opens

    needed = dense_nbytes(source.entries, dtype) + source.kept_nbytes if target == "dense" else 2 * checkpoint.nbytes
    shard_of = converter(source, target, dtype, made)
    return rewrite(checkpoint, out, needed, overwrite, shard_of, config, sidecar, inspect, progress)


def converter(source: Source, target: str, dtype: str | None, made: Made) -> Callable[[list[str]], dict[str, Tensor]]:
    """Names of the tensors in a file -> those of the new file; a linear goes where the first of its tensors was."""
    owner = {name: linear for linear, entry in source.entries.items() for name in entry.tensors}
    first = {entry.tensors[0] for entry in source.entries.values()}

    def shard_of(names: list[str]) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for name in names:
            if name not in owner:
                held[name] = as_asked(source.checkpoint.read(name), target, dtype)
            elif name in first:
                held |= converted(source, owner[name], target, dtype, made)
        return held

    return shard_of


def converted(source: Source, linear: str, target: str, dtype: str | None, made: Made) -> dict[str, Tensor]:
    """A linear's tensors in the format `target`."""
    held: list[Part] = read_parts(source.checkpoint, source.entries[linear])
    if target == "peft":
        for part in (part for part in held if isinstance(part, LowRank)):
            made.factors[linear] = part
        held = [part for part in held if not isinstance(part, LowRank)]
    if source.grid is not None and linear not in source.ends:
        affine, made.rerounded[linear] = reround(held, source.grid)
        held = [affine]
    if target != "dense" and linear not in source.ends:
        made.meant[linear] = digest(parts.sum_of_parts(held))
        return compressed_tensors.stored_tensors(linear, held)
    own = getattr(torch, source.entries[linear].specs[0]["dtype"])
    dense = parts.sum_of_parts(held).to(DTYPES[dtype] if dtype else own)
    if not bool(dense.isfinite().all()):
        raise UnsupportedError(f"{linear} has weights beyond what {dtype or dense.dtype} can hold; take --dtype bf16")
    return {f"{linear}.weight": dense.T.contiguous() if linear in source.transposed else dense}


def refuse_loss(source: Source, entries: Mapping[str, Entry]) -> None:
    """Raises UnsupportedError if compressed-tensors has no place for something that the folder holds."""
    for linear, entry in entries.items():
        what = "a transposed weight (Conv1D)" if linear in source.transposed else None
        what = what or compressed_tensors.lost(entry.shape, entry.specs)
        if what is not None:
            adapted = " or --to peft" if what == "a low-rank part" else ""
            raise UnsupportedError(
                f"{linear} in {source.path} holds {what}, which compressed-tensors has no place for; export --to dense"
                f"{adapted}"
            )


def portable_config(model: PreTrainedModel, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The quantization config of linears that compressed-tensors can hold; all others are on its ignore list."""
    grids = {name: (spec_grid(entry.specs[0]), entry.shape[1]) for name, entry in entries.items()}
    return compressed_tensors.quantization_config(grids, all_linears(model) - set(entries))


def on_grid(entry: Entry, grid: Grid) -> Entry:
    """The entry as it will be once its weight is rounded onto the grid."""
    spec = parts.grid_spec(grid, getattr(torch, entry.specs[0]["dtype"]))
    return replace(entry, specs=(spec,), names=entry.names[:1])


def without_factors(entry: Entry) -> Entry:
    """The entry without its low-rank parts."""
    kept = [i for i, spec in enumerate(entry.specs) if spec["part"] != LowRank.kind]
    return replace(entry, specs=tuple(entry.specs[i] for i in kept), names=tuple(entry.names[i] for i in kept))


def write_adapted(
    source: Source, out: Path, dtype: str | None, overwrite: bool, made: Made, progress: Progress
) -> dict[str, Any]:
    """`base` and `adapter` in one folder; returns what to say of them."""
    ranks = {
        name: int(spec["rank"])
        for name, entry in source.entries.items()
        for spec in entry.specs
        if spec["part"] == LowRank.kind
    }
    if not ranks:
        raise UnsupportedError(
            f"{source.path} holds no low-rank parts, so there is nothing to adapt; export --to compressed-tensors, or "
            "quantize with --lorc-rank"
        )
    rank = peft.adapter_rank(ranks)
    with partial_folder(out) as folder:
        nbytes = write_folder(source, "peft", folder / peft.BASE, None, overwrite, made, progress)
        tensors: dict[str, Tensor] = {}
        for linear, factors in made.factors.items():
            tensors |= peft.adapter_tensors(linear, factors, rank, DTYPES[dtype or "fp32"])
        (folder / peft.ADAPTER).mkdir()
        save_file(tensors, folder / peft.ADAPTER / peft.WEIGHTS, {"format": "pt"})
        verify.same_tensors(folder / peft.ADAPTER / peft.WEIGHTS, tensors)
        config = peft.adapter_config(f"{out.name}/{peft.BASE}", list(made.factors), rank)
        write_json(folder / peft.ADAPTER / peft.CONFIG, config)
        record = read_json_if_there(source.path / SIDECAR)
        added = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / SIDECAR, record | {"format": peft.FORMAT, "nbytes": nbytes + added})
        publish(folder, out, overwrite)
    serve = ["vllm", "serve", f"{out}/{peft.BASE}", "--enable-lora", "--max-lora-rank", str(rank)]
    serve += ["--lora-modules", f"lorc={out}/{peft.ADAPTER}"]
    code = peft.how_to_load(f"{out}/{peft.BASE}", f"{out}/{peft.ADAPTER}")
    about: dict[str, Any] = {"rank": rank, "adapted": len(made.factors), "adapter_nbytes": added}
    about |= {"command": shlex.join(serve), "code": code}
    return {"nbytes": nbytes + added} | about


def write_map(source: Source, out: Path, overwrite: bool) -> dict[str, Any]:
    """`tensor-types.txt` and `quantize.sh` in a folder; returns what to say of them."""
    config = source.model.config
    blocks = find_blocks(source.model)
    linears = [name for block in blocks for name in find_linears(source.model, block)]
    names = gguf.tensor_names(config.model_type, len(blocks), linears)
    # what the map does not name is rounded as well
    types = {names[linear]: gguf.WHOLE for linear in linears}
    spent = wanted = 0.0
    for linear, entry in source.entries.items():
        rows, cols = entry.shape
        bits = 8 * sum(source.checkpoint.tensors[name].nbytes for name in entry.tensors) / (rows * cols)
        types[names[linear]], taken = gguf.nearest_type(bits, cols)
        spent, wanted = spent + taken * rows * cols, wanted + bits * rows * cols
    record = read_json_if_there(source.path / SIDECAR)
    commands = map_commands(str(record.get("model") or "original"))
    with partial_folder(out) as folder:
        (folder / "tensor-types.txt").write_text(gguf.tensor_type_file(types), encoding="utf-8")
        lines = [line.replace("tensor-types.txt", '"$(dirname "$0")/tensor-types.txt"') for line in commands]
        (folder / "quantize.sh").write_text(SCRIPT + "\n".join([*lines, ""]), encoding="utf-8")
        write_json(folder / SIDECAR, record | {"format": gguf.FORMAT})
        publish(folder, out, overwrite)
    found = {kind: sum(one == kind for one in types.values()) for kind in sorted(set(types.values()))}
    sizes = {
        "bits_per_weight": round(spent / source.numel, 4),
        "bits_per_weight_before": round(wanted / source.numel, 4),
    }
    return {"nbytes": 0, "types": found, "commands": commands} | sizes


def map_commands(model: str) -> list[str]:
    """What makes a GGUF file of the original by the map, with llama.cpp's programs; `model` unless $1 names it."""
    whole = gguf.WHOLE.lower()
    quantize = ["llama-quantize", "--imatrix", "imatrix.gguf", "--tensor-type-file", "tensor-types.txt"]
    quantize += ["--token-embedding-type", whole, "--output-tensor-type", whole]
    return [
        f'python convert_hf_to_gguf.py "${{1:-{model}}}" --outtype {whole} --outfile original.gguf',
        "llama-imatrix -m original.gguf -f calibration.txt -o imatrix.gguf",
        shlex.join([*quantize, "original.gguf", "model.gguf", BASE_TYPE]),
    ]


def as_asked(tensor: Tensor, target: str, dtype: str | None) -> Tensor:
    """What was not compressed, in the dtype asked for."""
    return tensor.to(DTYPES[dtype]) if target == "dense" and dtype and tensor.is_floating_point() else tensor


def dense_nbytes(entries: Mapping[str, Entry], dtype: str | None) -> int:
    """Bytes of the linears' dense weights."""
    return sum(
        rows * cols * (DTYPES[dtype] if dtype else getattr(torch, entry.specs[0]["dtype"])).itemsize
        for entry in entries.values()
        for rows, cols in [entry.shape]
    )
