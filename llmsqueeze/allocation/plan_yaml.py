"""Plans as YAML: readable, diffable, editable.

    llmsqueeze_plan: 1
    model: babyllama-361
    weights_sha256: 3f2c...           which weights it is for
    rows_by: cost                     the ranking that says which rows the counts mean, the first grid the best ones
    profile: profile.safetensors      where that ranking is
    recipe: {...}
    weights:
      model.layers.0.mlp.up_proj: 3 bit g128
      model.layers.0.self_attn.q_proj: {4 bit g128 half: 20, 3 bit g128 half: 108}
      model.layers.0.mlp.down_proj: {3 bit g128 + 2 outliers: 128, outliers: 512}
      model.layers.0.self_attn.o_proj: coded x0.5

`+ 2 outliers` are those of every row, `outliers` those of the linear by GWQ's ranking. `coded` weights have the steps
of one multiplier for the whole model, which the budget decides; `x0.5` makes them half as coarse. A linear that the
plan leaves out stays as it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.errors import RecipeError, nearest
from llmsqueeze.files import STRICT, conform, read_yaml, write_text
from llmsqueeze.parts import Grid
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe

VERSION = 1
PLAN, PROFILE = "plan.yaml", "profile.safetensors"
GRID = re.compile(
    r"(?P<bits>\d{1,9}) bit (?P<group>row|g\d{1,9})(?P<kind> half| asymmetric| dual)?"
    r"(?: \+ (?P<outliers>\d{1,9}) outliers)?"
)
CODED = re.compile(r"coded(?: x(?P<factor>\d+(?:\.\d+)?(?:e-?\d+)?))?")
# of a plan of grids, and of one of steps
GRIDS = "how many rows of each linear are on which grid, the most important rows first"
STEPS = "the budget gives each linear its step; `coded x0.5` halves it, a linear without a line stays as it is"
HEAD = """\
# {content}.
# Edit it and run: llmsqueeze quantize {model} --plan {file}
"""


class Content(BaseModel):
    """What is read of a plan; what it says of each linear is read by `plan_of`."""

    model_config = STRICT
    profile: str | None = None
    weights_sha256: str | None = None
    recipe: dict[str, Any]
    weights: Annotated[dict[str, Any], Field(min_length=1)]


@dataclass(frozen=True)
class PlanFile:
    """A plan as read: its recipe, and what it says of every linear, not yet checked against a model."""

    path: Path
    recipe: Recipe
    profile: Path | None
    weights_sha256: str | None
    entries: Mapping[str, Any]


def write_plan(
    path: Path, plan: Plan, recipe: Recipe, about: Mapping[str, Any], rows_by: str | None, profile: str | None
) -> None:
    """Writes the plan; `about` holds what is said of it besides (model, fingerprint, predictions)."""
    import yaml

    content = {
        "llmsqueeze_plan": VERSION,
        **about,
        "rows_by": rows_by,
        "profile": profile,
        "recipe": recipe.as_dict(),
        "weights": {name: entry(weight) for name, weight in plan.weights.items()},
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    subject = STEPS if any(weight.coded for weight in plan.weights.values()) else GRIDS
    model = shlex.quote(" ".join(str(about["model"]).split()))
    write_text(path, HEAD.format(content=subject, model=model, file=path.name) + text)


def entry(weight: WeightPlan) -> Any:
    """One linear as the file has it."""
    if not weight.mixed and not weight.outliers and not weight.rank:
        return coded_name(weight) if weight.coded else rows_name(weight.grids[0])
    counts: dict[str, int] = {coded_name(weight): weight.shape[0]} if weight.coded else {}
    for rows in weight.grids:
        counts[rows_name(rows)] = counts.get(rows_name(rows), 0) + rows.count
    counts |= {"outliers": weight.outliers} if weight.outliers else {}
    return counts | ({"rank": weight.rank} if weight.rank else {})


def coded_name(weight: WeightPlan) -> str:
    """'coded', 'coded x0.5': by how much the linear's steps are coarser than the model's."""
    return "coded" if weight.factor == 1 else f"coded x{weight.factor:g}"


def rows_name(rows: Rows) -> str:
    """'3 bit g128 half', '3 bit g128 + 2 outliers'."""
    return str(rows.grid) + (f" + {rows.outliers} outliers" if rows.outliers else "")


def read_plan(path: Path) -> PlanFile:
    """Reads a plan file. Raises RecipeError for one that is missing, damaged, or of another version."""
    content = read_yaml(path, "plan file")
    if not isinstance(content, dict) or content.get("llmsqueeze_plan") != VERSION:
        raise RecipeError(f"{path} is no plan of version {VERSION}: `llmsqueeze plan` writes one")
    conform(path, content, Content, RecipeError)
    try:
        recipe = make_recipe(content["recipe"])
    except RecipeError as error:
        raise RecipeError(f"'{path}': recipe: {error}") from error
    stored = content.get("profile")
    if stored and Path(stored).name != stored:
        raise RecipeError(f"'{path}': profile is {stored!r}; it must be a file in the folder of the plan")
    return PlanFile(
        path=path,
        recipe=recipe,
        profile=path.parent / stored if stored else None,
        weights_sha256=content.get("weights_sha256"),
        entries=content["weights"],
    )


def plan_of(file: PlanFile, base: Plan) -> Plan:
    """The plan for the linears of `base` that it names. Raises RecipeError, naming all that is wrong."""
    wrong: list[str] = []
    weights: dict[str, WeightPlan] = {}
    for name in file.entries:
        if name not in base.weights:
            wrong.append(f"{file.path} names {name}, which the model does not have{nearest(name, base.weights)}")
    for name, weight in base.weights.items():
        if name in file.entries:
            try:
                weights[name] = _weight(weight, file.entries[name])
            except RecipeError as error:
                wrong.append(f"{file.path}, {name}: {error}")
    if wrong:
        more = f"\n       and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RecipeError("\n       ".join(wrong[:5]) + more)
    return base.only(weights)


def _weight(weight: WeightPlan, entry: Any) -> WeightPlan:
    counts = {entry: weight.shape[0]} if isinstance(entry, str) else dict(entry) if isinstance(entry, dict) else None
    if not counts:
        raise RecipeError(f"{entry!r} is neither a grid such as '3 bit g128' nor a mapping of grids to rows")
    outliers, rank = counts.pop("outliers", 0), counts.pop("rank", weight.rank)
    for what, count in (*counts.items(), ("outliers", outliers), ("rank", rank)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise RecipeError(f"{what}: {count!r} is no number of rows")
    coded = [CODED.fullmatch(str(text)) for text in counts]
    if weight.coded or any(coded):
        planned = _coded(weight, list(counts))
        if counts[next(iter(counts))] != weight.shape[0]:
            raise RecipeError(f"all of its {weight.shape[0]} rows are coded, not {counts[next(iter(counts))]}")
    else:
        planned = weight.on(*_grids(weight, counts))
    if outliers and any(rows.grid.half for rows in planned.grids):
        raise RecipeError("outliers want grids with a level 0, which half ones lack")
    if planned.kept + outliers > weight.numel:
        raise RecipeError(f"{outliers} outliers are more than its {weight.numel} weights")
    if rank > min(weight.shape):
        raise RecipeError(f"rank {rank} is more than a weight of {weight.shape[0]} x {weight.shape[1]} has")
    return replace(planned, outliers=outliers, rank=rank)


def _coded(weight: WeightPlan, texts: list[Any]) -> WeightPlan:
    match = CODED.fullmatch(str(texts[0])) if len(texts) == 1 else None
    if not weight.coded:
        raise RecipeError(f"{texts[0]!r}: the plan's recipe is not of method coded")
    if match is None:
        raise RecipeError(f"{texts[0]!r}: of method coded there is 'coded', or 'coded x0.5' for steps half as coarse")
    factor = float(match["factor"] or 1)
    if not 1 / 64 <= factor <= 64:
        raise RecipeError(f"{texts[0]!r}: steps may be from 1/64 of the model's to 64 times as coarse")
    return replace(weight, factor=factor)


def _grids(weight: WeightPlan, counts: Mapping[str, int]) -> list[Rows]:
    grids = [_rows(text, count) for text, count in counts.items()]
    total = sum(counts.values())
    if total != weight.shape[0]:
        raise RecipeError(f"its grids have {total} rows, the linear has {weight.shape[0]}")
    return grids


def _rows(text: Any, count: int) -> Rows:
    match = GRID.fullmatch(str(text))
    if not match:
        raise RecipeError(
            f"{text!r} is no grid; write '3 bit g128', '2 bit row half', '4 bit g64 asymmetric' or '2 bit g64 dual'"
        )
    bits, kind = int(match["bits"]), (match["kind"] or "").strip()
    low, high = {"half": (1, 8), "dual": (2, 2)}.get(kind, (2, 8))
    if not low <= bits <= high:
        raise RecipeError(f"{text!r}: no quantizer has that width; {low} to {high} bits are there")
    size = -1 if match["group"] == "row" else int(match["group"][1:])
    if size == 0:
        raise RecipeError(f"{text!r}: a group has at least one column")
    outliers = int(match["outliers"] or 0)
    if outliers and kind == "half":
        raise RecipeError(f"{text!r}: outliers want a grid with a level 0, which a half one lacks")
    return Rows(Grid(bits, size, kind != "asymmetric", kind == "half", kind == "dual"), count, outliers)
