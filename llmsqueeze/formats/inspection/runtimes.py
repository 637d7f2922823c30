"""The programs that open a folder, and the obstacles that bar one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmsqueeze.errors import first_line
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.entries import Entry
from llmsqueeze.formats.experts import experts_of
from llmsqueeze.formats.inspection.reading import Findings
from llmsqueeze.formats.opened import Folder
from llmsqueeze.model.blockwise.dry_run import obstacle_in_stock
from llmsqueeze.model.experts.find import expert_linears, stacks_of
from llmsqueeze.model.experts.names import experts_in_files
from llmsqueeze.model.linears import all_linears, find_blocks
from llmsqueeze.parts import spec_grid

# the linears that vLLM joins to one, by the last part of their names
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SPLIT_BY_COLUMNS = ("o_proj", "down_proj")  # tensor parallelism divides their inputs
VLLM_GROUPS = (-1, 32, 64, 128)
LEAST_HEAD = 32
PADDED = "its codes lie as compressed-tensors up to 0.17 packed them; from 0.18 on they are decoded wrongly, in silence"


def add_obstacles(folder: Folder, findings: Findings) -> None:
    """Adds the obstacles of the folder's format, the errors in its list of ignored linears, and notes."""
    if towers := folder.record.get("towers"):
        findings.notes.append(f"{len(towers)} linears of other towers and projectors are at 8 bits (--vision rtn8)")
    if ends := folder.record.get("embeddings"):
        findings.notes.append(f"rounded too (--embeddings): {', '.join(ends)}")
    if folder.format == native.METHOD:
        reasons = {compressed_tensors.lost(entry.shape, entry.specs) or "" for entry in folder.entries.values()}
        kinds = sorted(reasons - {""})
        if not kinds and (experts := _experts_barred(folder)):
            kinds = [experts]
        why = f"it holds {' and '.join(kinds)}" if kinds else "export --to compressed-tensors would"
        findings.obstacles["transformers"].append("needs `import llmsqueeze.hf`; without it the weights are random")
        findings.obstacles["vllm"].append(f"does not know the llmsqueeze format ({why})")
    elif folder.format == compressed_tensors.METHOD:
        config = folder.checkpoint.config["quantization_config"]
        groups = config["config_groups"].values()
        findings.errors += _ignore_errors(config, folder.entries, folder.model)
        if folder.padded:
            for runtime in ("transformers", "vllm"):
                findings.obstacles[runtime].append(PADDED)
            findings.notes.append("export --to compressed-tensors writes it in the packing of today")
        obstacle = obstacle_in_stock(folder.model, find_blocks(folder.model), list(folder.entries))
        if obstacle is not None:
            findings.obstacles["transformers"].append(f"does not open it: {obstacle}")
        if sum(not set(group["targets"]) & set(compressed_tensors.EXPERTS) for group in groups) > 1:
            findings.notes.append(
                "transformers with dequantize=True reads only the first of several widths correctly, and does not say "
                "so; its default path reads all"
            )
        try:
            _for_vllm(folder.entries, folder.model, findings)
            if experts_of(folder.record):
                findings.obstacles["vllm"] += _called_otherwise(folder.model)
                findings.notes.append("experts were not tried with vLLM")
        except Exception as error:  # what is said of a program must not cost a result
            findings.obstacles["vllm"].append(f"not known: {first_line(error)}")


def _experts_barred(folder: Folder) -> str:
    """Why compressed-tensors has no place for the experts of a folder; empty if it has, or if there are none."""
    experts = expert_linears(folder.model)
    if not experts.keys() & folder.entries.keys():
        return ""
    grids = {name: (spec_grid(entry.specs[0]), entry.shape[1]) for name, entry in folder.entries.items()}
    names = experts_in_files(folder.model)
    if isinstance(names, str):
        return f"experts ({names})"
    what = compressed_tensors.experts_that_differ(grids, experts)
    return "" if what is None else f"experts ({what})"


def _called_otherwise(model: PreTrainedModel) -> Iterator[str]:
    """A tensor beside the experts that has another name in the Hub's files: vLLM reads these names."""
    from transformers.core_model_loading import revert_weight_conversion

    stacks = tuple(f"{name}." for name in stacks_of(model))
    for name in model.state_dict():
        if not name.startswith(stacks):
            other = next(iter(revert_weight_conversion(model, {name: torch.empty(0)})))
            if other != name:
                yield f"{name} is {other} in the Hub's files, and vLLM reads these names"
                return


def _ignore_errors(config: Mapping[str, Any], entries: Mapping[str, Entry], model: nn.Module) -> Iterator[str]:
    """Every linear is either a target or ignored."""
    linears = all_linears(model)
    ignored = {name for one in config.get("ignore") or () for name in compressed_tensors.named(one, linears)}
    for name in sorted(linears - set(entries) - ignored):
        yield f"{name} is neither a target nor on the ignore list"
    for name in sorted(ignored - linears):
        yield f"the ignore list names {name}, which is no linear of the model"
    for name in sorted(ignored & set(entries)):
        yield f"{name} is a target and on the ignore list"


def _for_vllm(entries: Mapping[str, Entry], model: nn.Module, findings: Findings) -> None:
    """Fused linears have one grid; the kernels take the groups; the numbers of devices that keep groups whole."""
    findings.obstacles["vllm"] += _fused_that_differ(entries, all_linears(model))
    grids = [spec_grid(entry.specs[0]) for entry in entries.values()]
    other_groups = sorted({grid.group_size for grid in grids} - set(VLLM_GROUPS))
    if other_groups:
        findings.obstacles["vllm"].append(
            f"its kernels take groups of 32, 64 and 128 or whole rows, not {other_groups[0]}"
        )
    widths = {grid.bits for grid in grids}
    if widths - {4}:
        findings.notes.append(f"vLLM needs a GPU for widths other than 4 (here {', '.join(map(str, sorted(widths)))})")
    heads = [head for module in model.modules() if isinstance(head := getattr(module, "head_dim", None), int)]
    if heads and min(heads) < LEAST_HEAD:
        findings.notes.append(f"vLLM's attention on a CPU needs heads of {LEAST_HEAD} or more (here {min(heads)})")
    whole = [n for n in (1, 2, 4, 8) if all(_divides(name, entry, n) for name, entry in entries.items())]
    findings.notes.append(f"tensor parallelism over {', '.join(map(str, whole))} devices keeps groups whole")


def _fused_that_differ(entries: Mapping[str, Entry], linears: set[str]) -> Iterator[str]:
    for name in sorted(linears):
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED:
            if leaf != fused[0]:
                continue
            together = [f"{parent}.{one}" for one in fused if f"{parent}.{one}" in linears]
            grids = {str(spec_grid(entries[one].specs[0])) if one in entries else "16 bit" for one in together}
            if len(grids) > 1:
                yield f"{', '.join(together)} differ ({', '.join(sorted(grids))})"


def _divides(linear: str, entry: Entry, devices: int) -> bool:
    rows, cols = entry.shape
    if linear.rpartition(".")[2] in SPLIT_BY_COLUMNS:
        width = spec_grid(entry.specs[0]).width(cols)
        return cols % devices == 0 and (width == cols or cols // devices % width == 0)
    return rows % devices == 0
