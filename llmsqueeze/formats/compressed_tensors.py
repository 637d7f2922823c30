"""The compressed-tensors format, `pack-quantized`, which stock transformers and vLLM open without llmsqueeze.

Per linear: `weight_packed` int32 [rows, ceil(cols * bits / 32)], codes offset by 2**(bits - 1), element i at bit
i * bits, least significant first, dense across words; `weight_scale` [rows, groups] in the model's dtype;
`weight_shape` int64 [rows, cols]. These are our own codes and scales under other names (parts/affine.py). Symmetric
integer levels only, on all rows, 2 to 8 bits, groups that divide the columns or whole rows; a scale may be negative.

    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
      "quantization_status": "compressed", "ignore": ["lm_head", ...],
      "config_groups": {"group_0": {"targets": ["model.layers.0.mlp.up_proj", ...], "format": "pack-quantized",
        "input_activations": null, "output_activations": null, "weights": {"num_bits": 3, "type": "int",
        "symmetric": true, "strategy": "group", "group_size": 128, "dynamic": false}}}}

One config group per width and group size, its modules named one by one: a class name as a target would swallow all.
Experts are under the names of the Hub's files, one by one (experts.py), and have one group, whose target is a pattern:
transformers reads all experts of a model by the first group that has such a target.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmsqueeze.allocation.plan import Plan
from llmsqueeze.errors import RecipeError
from llmsqueeze.parts import Affine, Grid, Spec, spec_grid
from llmsqueeze.progress.stopwatch import timed

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
EXPERTS = ("re:.*experts.*", r"re:.*\.experts\.\d+\..*")  # targets: transformers looks for one that begins so
NAMES = {"codes": "weight_packed", "scale": "weight_scale"}

OWN_NAMES = {rf"\.{stored}$": f".parts.0.{name}" for name, stored in NAMES.items()}  # as patterns for transformers


def lost(shape: tuple[int, int], specs: Sequence[Spec]) -> str | None:
    """The property of a linear's parts that this format cannot represent, in words; None if it can represent them."""
    others = [spec["part"] for spec in specs if spec["part"] != Affine.kind]
    if others:
        words: dict[str, str] = {
            "sparse": "outliers",
            "lowrank": "a low-rank part",
            "dual_binary": "dual-binary planes",
            "coded": "coded weights",
        }
        return words.get(others[0], f"a part of kind {others[0]}")
    if len(specs) > 1 or "rows" in specs[0]:
        return "rows on several grids"
    grid = spec_grid(specs[0])
    if grid.half:
        return "half-integer levels"
    if not grid.symmetric:
        return "zeros (transformers does not open asymmetric ones)"
    if shape[1] % grid.width(shape[1]):
        return f"a short last group ({shape[1]} columns in groups of {grid.group_size})"
    return None


def barred(plan: Plan, experts: Collection[str]) -> str | None:
    """The first linear of a plan that this format cannot represent, and why; None if it can represent all. experts:
    the linears of the model's experts."""
    reasons = ((name, lost(weight.shape, weight.specs)) for name, weight in plan.weights.items())
    what = next((f"{name}: {why}" for name, why in reasons if why is not None), None)
    if what is not None or not experts:
        return what
    return experts_that_differ({name: (one.grid, one.shape[1]) for name, one in plan.weights.items()}, experts)


def experts_that_differ(grids: Mapping[str, tuple[Grid, int]], experts: Collection[str]) -> str | None:
    """Why the experts of a model cannot be in one group, in words; None if they can. grids: linear -> its grid and
    number of columns."""
    dense = next((name for name in experts if name not in grids), None)
    if dense is not None:
        return f"{dense}: an expert that stays dense"
    if grid_of_experts(grids[name] for name in experts) is not None:
        return None
    on = {f"{g.bits} bits in groups of {g.width(cols)}": name for name in experts for g, cols in [grids[name]]}
    (one, first), *_, (other, second) = on.items()
    return f"{first} on {one}, {second} on {other}: transformers reads all experts with one width and group size"


def grid_of_experts(grids: Iterable[tuple[Grid, int]]) -> tuple[int, int] | None:
    """Bits and group size (-1 for whole rows) of matrices on these grids with so many columns; None if they differ."""
    grids = list(grids)
    widths, bits = {grid.width(cols) for grid, cols in grids}, {grid.bits for grid, _ in grids}
    if len(bits) > 1:
        return None
    if all(grid.width(cols) == cols for grid, cols in grids):
        return bits.pop(), -1
    return (bits.pop(), widths.pop()) if len(widths) == 1 else None


def named(target: str, linears: Collection[str]) -> list[str]:
    """The linears that a target or an entry of `ignore` means: a name, `re:` and a pattern, or the class of all. A name
    that means none of them is given back."""
    if target == "Linear":
        return list(linears)
    if target.startswith("re:"):
        return [name for name in linears if re.match(target.removeprefix("re:"), name)]
    return [target]


def writable_plan(plan: Plan, portable: bool | None, experts: Collection[str]) -> Plan:
    """The plan, in the native format if this one cannot represent all of it. Raises RecipeError if `portable` asks for
    this one. experts: the linears of the model's experts."""
    if plan.format != METHOD or (what := barred(plan, experts)) is None:
        return plan
    if portable:
        raise RecipeError(f"portable contradicts the plan: compressed-tensors cannot represent {what}")
    return replace(plan, format="native")


@timed("pack")
def stored_tensors(linear: str, weight_parts: Sequence[Any]) -> dict[str, Any]:
    """The tensors of a linear's one part, or of what has a spec and tensors like it, under their names in the file."""
    (part,) = weight_parts
    assert part.spec()["part"] == Affine.kind, "parts that cannot be represented were refused before"
    tensors = {f"{linear}.{NAMES[name]}": tensor for name, tensor in part.tensors().items()}
    return tensors | {f"{linear}.weight_shape": torch.tensor(part.shape, dtype=torch.int64)}


def quantization_config(
    grids: Mapping[str, tuple[Grid, int]], ignore: Iterable[str], experts: Collection[str] = ()
) -> dict[str, Any]:
    """The entry `quantization_config` of `config.json`. grids: linear -> its grid and number of columns; ignore: all
    other linears. experts: the linears of the model's experts, which are on one grid; their group comes last."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, (grid, cols) in grids.items():
        if name not in experts:
            size = -1 if grid.width(cols) == cols else grid.group_size
            groups.setdefault((grid.bits, size), []).append(name)
    named = [(*one, names) for one, names in sorted(groups.items())]
    of_experts = grid_of_experts(grids[name] for name in experts if name in grids) if experts else None
    if of_experts is not None:
        named.append((*of_experts, [expert_target(name for name in grids if name not in experts)]))
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(bits, size, names) for i, (bits, size, names) in enumerate(named)},
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def expert_target(others: Iterable[str]) -> str:
    """The target of experts: the first that means none of the `other` linears."""
    names = list(others)
    return next(one for one in EXPERTS if not any(re.match(one.removeprefix("re:"), name) for name in names))


def config_of(plan: Plan, ignore: Iterable[str], experts: Collection[str]) -> dict[str, Any]:
    """`quantization_config` of a plan that the format can represent. experts: the linears of the model's experts."""
    grids = {name: (weight.grid, weight.shape[1]) for name, weight in plan.weights.items()}
    return quantization_config(grids, ignore, experts)


def _group(bits: int, size: int, names: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": names,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
