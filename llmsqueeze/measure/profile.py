"""The measurements of a model: small, durable, and good for every budget of a method. sweeps.py makes them.

The file is safetensors. `<name>.<key>` holds the tensors of one linear (or embeddings, or head), with the keys that
`Profile` declares; its metadata hold the rest as JSON, and with it the origin: the model's files (size, time and
SHA-256), the calibration tokens, the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.request import Request
from llmsqueeze.parts import Grid
from llmsqueeze.progress.stopwatch import timed

VERSION = 1


def _tensors(key: str, requested: str = "", missing: str = "") -> dict[str, Any]:
    """Of a field that maps names to tensors, stored under `key`. `requested`: the field of a request that asks for it;
    `missing`: how a message calls it."""
    return {"key": key, "requested": requested, "missing": missing}


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
    costs: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("costs"))
    row_gradient: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("row_gradient"))
    gains: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("gains", "gains", "gains of ranks"))
    rates: dict[str, Tensor] = field(
        default_factory=dict, metadata=_tensors("rates", "rates", "rates of entropy-coded codes")
    )
    curves: dict[str, Tensor] = field(
        default_factory=dict, metadata=_tensors("steps", "coded", "costs of coded weights")
    )
    moments: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("moments"))
    salience: dict[str, Tensor] = field(default_factory=dict, metadata=_tensors("salience"))
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
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{one.metadata['key']}": values.contiguous()
        for one in STORED
        for name, values in getattr(profile, one.name).items()
    }
    for name, candidates in profile.candidates.items():
        tensors |= {f"{name}.outliers": candidates.index, f"{name}.outlier_scores": candidates.score}
    about = {one.name: one.metadata["encode"](getattr(profile, one.name)) for one in IN_JSON}
    about["order"] = list(tensors)  # a file has an order of its own, and what is allocated first may depend on it
    save_file(tensors, path, metadata={"llmsqueeze_profile": json.dumps({"version": VERSION, **about})})


@timed("read")
def load(path: Path) -> Profile:
    """Reads a profile. Raises CheckpointError for a file that is none, or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("llmsqueeze_profile", "{}"))
            names = set(file.keys())
            order = [name for name in about.get("order", []) if name in names] if isinstance(about, dict) else []
            tensors = {name: file.get_tensor(name) for name in dict.fromkeys([*order, *sorted(names)])}
    except FileNotFoundError as error:
        raise RecipeError(f"there is no profile {path}; `llmsqueeze plan` writes one") from error
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no profile: {error}") from error
    if not isinstance(about, dict) or "version" not in about:
        raise CheckpointError(f"{path} is no profile; `llmsqueeze plan` writes one")
    if about["version"] != VERSION:
        raise CheckpointError(f"{path} is a profile of version {about['version']}; this version reads {VERSION}")
    try:
        return _restored({"labels": 0, **about}, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no profile: {error!r}") from error


def _restored(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Profile:
    def under(key: str) -> dict[str, Tensor]:
        return {n.removesuffix(f".{key}"): tensor for n, tensor in tensors.items() if n.endswith(f".{key}")}

    index, score = under("outliers"), under("outlier_scores")
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
