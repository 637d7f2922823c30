"""The verb `check`: whether a compressed folder is whole and sound, and what opens it; no model is run.

Found are errors, which make the folder unusable, and obstacles, which bar single targets. Every tensor is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, RecipeError, SqueezeError, UnsupportedError
from llmsqueeze.files import SIDECAR, read_json_if_there
from llmsqueeze.formats import compressed_tensors, gguf, native, peft
from llmsqueeze.formats.entries import Entry, is_compressed, read_entries
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.model.linears import all_linears
from llmsqueeze.model.skeleton import empty_model, load_config
from llmsqueeze.parts import Affine, Coded, DualBinary, Integers, LowRank, Sparse, bitpack, spec_grid
from llmsqueeze.quantizers import dual_binary
from llmsqueeze.recipe.values import choice

FORMATS = (native.METHOD, compressed_tensors.METHOD)
TARGETS = ("native", "transformers", "vllm")
# what vLLM makes one linear of, by the last part of their names
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SPLIT_BY_COLUMNS = ("o_proj", "down_proj")  # over which tensor parallelism divides the inputs
VLLM_GROUPS = (-1, 32, 64, 128)
LEAST_HEAD = 32


@dataclass
class Found:
    """errors: what is wrong with the folder. obstacles: target -> why it does not open it. notes: good to know."""

    errors: list[str] = field(default_factory=list)
    obstacles: dict[str, list[str]] = field(default_factory=lambda: {target: [] for target in TARGETS})
    notes: list[str] = field(default_factory=list)


def check(folder: str, target: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks the folder; `verdicts` says for each target (or the one asked for) why it does not open, "" if it does."""
    if target is not None:
        target = choice(TARGETS)("target", target)
    path = Path(folder)
    if not path.is_dir():
        raise RecipeError(f"{path} is no folder; check looks at one that llmsqueeze wrote")
    found = Found()
    form = "unknown"
    told = read_json_if_there(path / SIDECAR).get("format")
    if told == peft.FORMAT:
        found.notes.append(f"looked at the base; the adapter in {peft.ADAPTER} belongs to it")
        path = path / peft.BASE
    try:
        if told == gguf.FORMAT:
            raise UnsupportedError(
                f"{path} holds a plan for llama.cpp and no weights; quantize.sh in it makes the model"
            )
        checkpoint = open_checkpoint(path)
        form = form_of(checkpoint)
        if form not in (*FORMATS, "dense"):
            raise UnsupportedError(
                f"{path} is in {form}, another tool's format; check knows {', '.join(FORMATS)} and dense"
            )
        entries = read_entries(checkpoint) if is_compressed(checkpoint) else {}
        model = empty_model(path, load_config(path, trust_remote_code), trust_remote_code)
        found.errors += [*names_and_shapes(checkpoint, entries, model), *sizes(checkpoint)]
        if not found.errors:
            found.errors += [error for name, entry in entries.items() for error in values(checkpoint, name, entry)]
        _obstacles(checkpoint, entries, model, form, found)
    except SqueezeError as error:
        found.errors.append(str(error))
    if path.resolve().name.endswith(".partial"):
        found.notes.append("a folder of this name is what a run that did not end well left behind")
    verdicts = {
        one: found.errors[0] if found.errors else "; ".join(found.obstacles[one])
        for one in ([target] if target else TARGETS)
    }
    return {
        "folder": folder,
        "format": form,
        "sound": not found.errors,
        "errors": found.errors,
        "verdicts": verdicts,
        "notes": found.notes,
    }


def form_of(checkpoint: Checkpoint) -> str:
    """llmsqueeze, compressed-tensors, dense, or what another tool calls its own."""
    config = checkpoint.config.get("quantization_config")
    return str(config.get("quant_method")) if isinstance(config, dict) else "dense"


def names_and_shapes(checkpoint: Checkpoint, entries: Mapping[str, Entry], model: nn.Module) -> Iterator[str]:
    """Every tensor that config and model ask for is there in its shape and dtype, and nothing else is."""
    held: Any = model
    tied = set(held.all_tied_weights_keys) | set(held.all_tied_weights_keys.values())
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for linear, entry in entries.items():
        if wanted.pop(f"{linear}.weight", None) is None:
            yield f"the config names {linear}, which the model does not have"
        for spec, names in zip(entry.specs, entry.names, strict=True):
            for kind, (shape, dtype) in parts.layout(entry.shape, spec).items():
                stored = checkpoint.tensors.get(names[kind])
                if stored is None:
                    yield f"{names[kind]} is missing"
                elif stored.shape != shape or stored.dtype != dtype:
                    yield (
                        f"{names[kind]} is {list(stored.shape)} {parts.dtype_name(stored.dtype)}; the config says "
                        f"{list(shape)} {parts.dtype_name(dtype)}"
                    )
    for name, size in wanted.items():
        stored = checkpoint.tensors.get(name)
        if stored is None and name not in tied:
            yield f"{name} is missing"
        elif stored is not None and stored.shape != size:
            yield f"{name} is {list(stored.shape)}; the model wants {list(size)}"
    known = set(wanted) | {name for entry in entries.values() for name in entry.tensors}
    for name in sorted(set(checkpoint.tensors) - known):
        yield f"{name} is explained by nothing in the config"


def sizes(checkpoint: Checkpoint) -> Iterator[str]:
    """Counted bytes are the bytes on disk: of every file, and of what the folder says of itself."""
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        held = sum(stored.nbytes for stored in checkpoint.tensors.values() if stored.file == file)
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
        if file.stat().st_size != header + held:
            yield f"{file.name} has {file.stat().st_size} bytes; its tensors and header take {header + held}"
    told = read_json_if_there(checkpoint.path / SIDECAR).get("nbytes")
    if told is not None and told != checkpoint.nbytes:
        yield f"{SIDECAR} speaks of {told} bytes of weights; there are {checkpoint.nbytes}"


def values(checkpoint: Checkpoint, linear: str, entry: Entry) -> Iterator[str]:
    """The numbers of a linear's parts: finite, in their range, in agreement with each other."""
    for spec, names in zip(entry.specs, entry.names, strict=True):
        held = {kind: checkpoint.read_raw(name) for kind, name in names.items()}
        for kind, tensor in held.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                yield f"{names[kind]} holds numbers that are not finite"
        yield from _of_part(linear, entry, spec, names, held)
    for name in entry.beside:
        if checkpoint.read_raw(name).tolist() != list(entry.shape):
            yield f"{name} is not {list(entry.shape)}"


def _of_part(
    linear: str, entry: Entry, spec: parts.Spec, names: Mapping[str, str], held: Mapping[str, Tensor]
) -> Iterator[str]:
    rows, cols = entry.shape
    if spec["part"] in (Affine.kind, DualBinary.kind):
        yield from _on_grid(spec, names, held, cols)
    elif spec["part"] == Sparse.kind:
        part = Sparse.restore(entry.shape, spec, held)
        if int(part.counts.sum()) != spec["count"]:
            yield f"{names['row_count']} counts {int(part.counts.sum())} outliers; there are {spec['count']}"
        if len(part.columns) and int(part.columns.max()) >= cols:
            yield f"{names['index']} points beyond the {cols} columns of {linear}"
    elif spec["part"] in (Coded.kind, Integers.kind):
        if bool((held["escape_index"].diff() <= 0).any()):
            yield f"{names['escape_index']} is not in order"
    elif spec["part"] != LowRank.kind:
        yield f"{linear} holds a part of kind {spec['part']}, which is not known"
    if parts.is_coded(spec) or spec["part"] == Integers.kind:
        try:
            parts.restore(entry.shape, spec, held).dense()
        except CheckpointError as error:
            yield f"{linear}: {error}"
    if "rows" in held:
        marked = int(bitpack.unpack(held["rows"][None], 1, rows).sum())
        if marked != spec["rows"]:
            yield f"{names['rows']} marks {marked} rows; the part holds {spec['rows']}"


def _on_grid(spec: parts.Spec, names: Mapping[str, str], held: Mapping[str, Tensor], cols: int) -> Iterator[str]:
    if spec["part"] == Affine.kind and bool((held["scale"] == 0).any()):
        yield f"{names['scale']} holds zeros"
    alphas = (held["alpha1"].float(), held["alpha2"].float()) if spec["part"] == DualBinary.kind else None
    if alphas is not None and not bool(dual_binary.in_order(*alphas).all()):
        yield f"{names['alpha1']} and {names['alpha2']} cross: their levels are not in order"
    for kind in ("codes", "plane1", "plane2"):
        if kind in held:
            yield from _beyond(names[kind], held[kind], cols * (spec["bits"] if kind == "codes" else 1))


def _beyond(name: str, packed: Tensor, bits: int) -> Iterator[str]:
    """What is left of a row's last word must be zeros."""
    used = bits % 32
    if used and bool((packed[:, -1].long() & 0xFFFFFFFF).bitwise_right_shift(used).any()):
        yield f"{name} has bits set beyond its last column"


def _obstacles(checkpoint: Checkpoint, entries: Mapping[str, Entry], model: nn.Module, form: str, found: Found) -> None:
    """What bars single targets."""
    if form == native.METHOD:
        kinds = sorted({compressed_tensors.lost(e.shape, e.specs) or "" for e in entries.values()} - {""})
        why = f"it holds {' and '.join(kinds)}" if kinds else "export --to compressed-tensors would"
        found.obstacles["transformers"].append("needs `import llmsqueeze.hf`; without it the weights are random")
        found.obstacles["vllm"].append(f"does not know the llmsqueeze format ({why})")
    elif form == compressed_tensors.METHOD:
        found.errors += _ignored(checkpoint, entries, model)
        if len(checkpoint.config["quantization_config"]["config_groups"]) > 1:
            found.notes.append(
                "transformers with dequantize=True reads only the first of several widths rightly, and does not say "
                "so; its default path reads all"
            )
        _for_vllm(entries, model, found)


def _ignored(checkpoint: Checkpoint, entries: Mapping[str, Entry], model: nn.Module) -> Iterator[str]:
    """Every linear is either a target or ignored."""
    ignored = set(checkpoint.config["quantization_config"].get("ignore", []))
    linears = all_linears(model)
    for name in sorted(linears - set(entries) - ignored):
        yield f"{name} is neither a target nor on the ignore list"
    for name in sorted(ignored - linears):
        yield f"the ignore list names {name}, which is no linear of the model"
    for name in sorted(ignored & set(entries)):
        yield f"{name} is a target and on the ignore list"


def _for_vllm(entries: Mapping[str, Entry], model: nn.Module, found: Found) -> None:
    """Fused linears agree; groups that its kernels take; over how many devices the groups can be divided."""
    names = all_linears(model)
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED:
            if leaf != fused[0]:
                continue
            together = [f"{parent}.{one}" for one in fused if f"{parent}.{one}" in names]
            grids = {str(spec_grid(entries[one].specs[0])) if one in entries else "16 bit" for one in together}
            if len(grids) > 1:
                found.obstacles["vllm"].append(f"{', '.join(together)} differ ({', '.join(sorted(grids))})")
    widths = {spec_grid(entry.specs[0]).bits for entry in entries.values()}
    odd = sorted({spec_grid(e.specs[0]).group_size for e in entries.values()} - set(VLLM_GROUPS))
    if odd:
        found.obstacles["vllm"].append(f"its kernels take groups of 32, 64 and 128 or whole rows, not {odd[0]}")
    if widths - {4}:
        found.notes.append(f"vLLM wants a GPU for widths other than 4 (here {', '.join(map(str, sorted(widths)))})")
    config: Any = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head < LEAST_HEAD:
        found.notes.append(f"vLLM's attention on a CPU wants heads of {LEAST_HEAD} or more (here {head})")
    whole = [n for n in (1, 2, 4, 8) if all(_divides(name, entry, n) for name, entry in entries.items())]
    found.notes.append(f"tensor parallelism over {', '.join(map(str, whole))} devices keeps groups whole")


def _divides(linear: str, entry: Entry, devices: int) -> bool:
    rows, cols = entry.shape
    if linear.rpartition(".")[2] in SPLIT_BY_COLUMNS:
        width = spec_grid(entry.specs[0]).width(cols)
        return cols % devices == 0 and (width == cols or cols // devices % width == 0)
    return rows % devices == 0
