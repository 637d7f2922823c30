"""The measurements of a model: small, durable, and good for every budget of a method. sweeps.py makes them.

The file is safetensors. `<name>.<key>` holds the tensors of one linear (or embeddings, or head), with the keys that
`Profile` declares; its metadata hold the rest as JSON, and with it the origin: the model's files (size, time and
SHA-256), the calibration tokens, the settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import Tensor

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.files import STRICT, Count, Finite, conform
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.request import Request
from llmsqueeze.model.tensors import shard
from llmsqueeze.parts import Grid
from llmsqueeze.progress.stopwatch import timed

VERSION = 1
ABOUT = "llmsqueeze_profile"  # in the metadata of the file


LIST = Field(strict=False)  # a tuple is a list in JSON
Width = Annotated[int, Field(ge=1, le=8)]
GridFields = Annotated[tuple[Width, Annotated[int, Field(ge=-1)], bool, bool, bool], LIST]
Share = Annotated[float, Field(ge=0, le=1)]


class File(BaseModel):
    """A file of the model that was measured."""

    model_config = STRICT
    size: Count = 0
    mtime_ns: int = 0
    sha256: str = ""


class Origin(BaseModel):
    """What the profile is of; the rest is only compared."""

    model_config = STRICT
    files: dict[str, File] = {}
    weights: str | None = None


class Content(BaseModel):
    """The JSON of a profile."""

    model_config = STRICT
    version: int
    loss: Finite | None
    labels: Count = 0
    options: list[Annotated[tuple[GridFields, Share], LIST]]
    salience_widths: list[Width]
    lim: list[Finite]
    zd: list[Finite]
    groups: list[list[str]]
    source: Origin
    order: list[str] = []


def _tensors(key: str, shape: str, requested: str = "", missing: str = "") -> dict[str, Any]:
    """Of a field that maps names to tensors of floats, stored under `key`; shape: its sizes in words, or a number.
    `requested`: the field of a request that asks for it; `missing`: how a message calls it."""
    return {"key": key, "shape": shape.split(), "requested": requested, "missing": missing}


def _json(
    encode: Callable[[Any], Any], decode: Callable[[Any], Any] | None = None, requested: str = "", missing: str = ""
) -> dict[str, Any]:
    """Of a field that the file's JSON holds."""
    return {"encode": encode, "decode": decode or encode, "requested": requested, "missing": missing}


def _same(value: Any) -> Any:
    return value


def _options(rows: Any) -> tuple[Option, ...]:
    return tuple(Option(Grid(*grid), share) for grid, share in rows)


def _groups(groups: Any) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names) for names in groups)


def _option_fields(options: Sequence[Option]) -> list[Any]:
    grids = [(option.grid, option.outliers) for option in options]
    return [((g.bits, g.group_size, g.symmetric, g.half, g.dual), outliers) for g, outliers in grids]


@dataclass(frozen=True)
class Profile:
    """Measurements of a model; those that were not requested are empty. Each field says how it is stored.

    loss: mean next-token loss (nats) on the calibration text. labels: how many the gradients are of. costs:
    linear -> [options, rows], predicted loss increase in nats per token; row_gradient: [rows]; gains: [options, ranks],
    the part of the costs that each component of a compensation removes; rates: [options], bits of an entropy-coded
    code; curves: [3, points] of coded weights (costs.coded_points); moments: embeddings or head -> [width, width]
    (ends.py). salience: linear -> [widths, rows]; candidates: outliers by the ranking. lim, zd: per block. groups: the
    fusion groups.
    """

    loss: float | None = field(default=None, metadata=_json(_same))
    labels: int = field(default=0, metadata=_json(_same))
    options: tuple[Option, ...] = field(default=(), metadata=_json(_option_fields, _options))
    salience_widths: tuple[int, ...] = field(default=(), metadata=_json(tuple))
    lim: tuple[float, ...] = field(default=(), metadata=_json(tuple, requested="lim", missing="LIM"))
    zd: tuple[float, ...] = field(default=(), metadata=_json(tuple, requested="zd", missing="ZD"))
    groups: tuple[tuple[str, ...], ...] = field(default=(), metadata=_json(_groups))
    source: Mapping[str, Any] = field(default_factory=dict, metadata=_json(_same))
    costs: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("costs", "options rows"))
    row_gradient: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("row_gradient", "rows"))
    gains: dict[str, Tensor] = field(
        default_factory=dict, metadata=_tensors("gains", "options ranks", "gains", "gains of ranks")
    )
    rates: dict[str, Tensor] = field(
        default_factory=dict, metadata=_tensors("rates", "options", "rates", "rates of entropy-coded codes")
    )
    curves: dict[str, Tensor] = field(
        default_factory=dict, metadata=_tensors("steps", "3 points", "coded", "costs of coded weights")
    )
    moments: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("moments", "width width"))
    salience: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("salience", "salience_widths rows"))
    candidates: dict[str, Candidates] = field(default_factory=dict)


STORED = [one for one in fields(Profile) if "key" in one.metadata]
IN_JSON = [one for one in fields(Profile) if "encode" in one.metadata]


def joined(profiles: Sequence[Profile]) -> Profile:
    """One profile of several: mappings united, sequences in turn; the other fields are those of none."""
    values: dict[str, Any] = {}
    for one in fields(Profile):
        every = [getattr(profile, one.name) for profile in profiles]
        if every and isinstance(every[0], dict):
            values[one.name] = {name: value for mapping in every for name, value in mapping.items()}
        elif every and isinstance(every[0], tuple):
            values[one.name] = tuple(value for sequence in every for value in sequence)
    return Profile(**values)


@timed("write")
def save(profile: Profile, path: Path) -> None:
    """Writes the profile as safetensors."""
    tensors = {
        f"{name}.{one.metadata['key']}": values.contiguous()
        for one in STORED
        for name, values in getattr(profile, one.name).items()
    }
    for name, candidates in profile.candidates.items():
        tensors |= {f"{name}.outliers": candidates.index, f"{name}.outlier_scores": candidates.score}
    about = {one.name: one.metadata["encode"](getattr(profile, one.name)) for one in IN_JSON}
    about["order"] = list(tensors)  # a file has an order of its own, and what is allocated first may depend on it
    shard.write(path, tensors, {ABOUT: json.dumps({"version": VERSION, **about})})


@timed("read")
def load(path: Path) -> Profile:
    """Reads a profile. Raises CheckpointError for a file that is none, damaged, or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no profile {path}; `llmsqueeze plan` writes one") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no profile: {error}") from error
    if not isinstance(about, dict) or "version" not in about:
        raise CheckpointError(f"{path} is no profile; `llmsqueeze plan` writes one")
    if about["version"] != VERSION:
        raise CheckpointError(f"{path} is a profile of version {about['version']}; this version reads {VERSION}")
    conform(path, about, Content)
    stored = shard.read(path)
    order = dict.fromkeys([name for name in about.get("order", ()) if name in stored] + sorted(stored))
    profile = _restored({"labels": 0, **about}, {name: stored[name] for name in order})
    if wrong := next(_misshapen(profile), None):
        raise CheckpointError(f"{path} is damaged or no profile: {wrong}")
    return profile


def _misshapen(profile: Profile) -> Iterator[str]:
    """The tensors that have another shape or dtype than their field says, or NaN."""
    counts = {"options": len(profile.options), "salience_widths": len(profile.salience_widths)}
    known = {word: count for word, count in counts.items() if count}  # that of a block in a journal names none
    for one in STORED:
        wanted = one.metadata["shape"]
        for name, values in getattr(profile, one.name).items():
            sizes = dict(known)
            fits = len(wanted) == values.dim() and values.is_floating_point()
            for size, word in zip(values.shape, wanted, strict=False):
                fits = fits and size == (int(word) if word.isdigit() else sizes.setdefault(word, size))
            if not fits or values.isnan().any():
                yield f"{name}.{one.metadata['key']} is {list(values.shape)} {values.dtype}, not [{', '.join(wanted)}]"
    for name, best in profile.candidates.items():
        if best.index.dim() != 1 or best.index.is_floating_point() or best.score.shape not in (best.index.shape, (0,)):
            yield f"{name}.outliers and its scores are not two lists of the same length"


def misfit(profile: Profile, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """What a profile has of a linear that does not fit to its shape [rows, cols]; None if all of it does."""
    for one in STORED:
        for name, values in getattr(profile, one.name).items():
            if "rows" in one.metadata["shape"] and name in shapes and values.shape[-1] != shapes[name][0]:
                return f"{name}.{one.metadata['key']} is of {values.shape[-1]} rows, the linear has {shapes[name][0]}"
    for name, best in profile.candidates.items():
        index, weights = best.index, math.prod(shapes.get(name, ()))
        if name in shapes and len(index) and not 0 <= int(index.min()) <= int(index.max()) < weights:
            return f"{name}.outliers names weights that the linear does not have"
    return None


def _restored(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Profile:
    def under(key: str) -> dict[str, Tensor]:
        return {n.removesuffix(f".{key}"): tensor for n, tensor in tensors.items() if n.endswith(f".{key}")}

    index, score = under("outliers"), under("outlier_scores")
    if index.keys() != score.keys():
        raise CheckpointError(f"a profile has outliers without scores: {min(index.keys() ^ score.keys())}")
    values: dict[str, Any] = {one.name: one.metadata["decode"](about[one.name]) for one in IN_JSON}
    values |= {one.name: under(one.metadata["key"]) for one in STORED}
    return Profile(**values, candidates={name: Candidates(index[name], score[name]) for name in index})


def lacks(profile: Profile, source: Mapping[str, Any], request: Request) -> str | None:
    """The first thing in which a stored profile is of something else than `source`, or less than `request`, in words;
    None if it is of no less."""
    for key, value in source.items():
        stored = profile.source.get(key)
        if key != "files" and stored != value:
            return f"{key.replace('_', ' ')} {_short(stored)}, not {_short(value)}"
    missing = [f"costs for {option}" for option in request.options if option not in profile.options]
    for one in (*STORED, *IN_JSON):
        requested = one.metadata["requested"]
        if requested and getattr(request, requested) and not getattr(profile, one.name):
            missing.append(one.metadata["missing"])
    missing += [f"salience at {w} bits" for w in request.salience_widths if w not in profile.salience_widths]
    return f"no {missing[0]}" if missing else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
