"""What was measured of a model: small, durable, and good for every budget. measure.py makes it.

The file is safetensors: `<linear>.costs` [options, rows], `<linear>.row_gradient` [rows], `<linear>.gains` [options,
ranks], `<linear>.rates` [options], `<linear>.steps` [3, points], `<module>.moments`
[width, width], `<linear>.salience` [widths,
rows], `<linear>.outliers` [k] (flat index, best first) with `<linear>.outlier_scores`; its metadata hold the rest as
JSON, with what the profile is of: the model's files (size, time and SHA-256), the calibration tokens, the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze.allocation.gwq import Candidates, first
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.allocation.ranks import expected_gains
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.measure.costs import Option
from llmsqueeze.parts import Grid

VERSION = 1


@dataclass(frozen=True)
class Profile:
    """Measurements of a model; what was not asked for is empty.

    loss: mean next-token loss (nats) on the calibration text. costs: linear -> [options, rows], predicted loss
    increase in nats per token; gains: linear -> [options, ranks], what the components of a compensation take off
    them; rates: linear -> [options], bits of an entropy-coded code. steps: linear -> [3, points] of coded weights
    (price.coded_points); moments: embeddings or head -> [width, width] (ends.py); labels: how many the gradient was
    measured on. salience: linear -> [widths, rows] (MixLLM's). candidates: outliers by GWQ's ranking. lim, zd: per
    block. groups: the fusion groups.
    """

    loss: float | None = None
    options: tuple[Option, ...] = ()
    salience_widths: tuple[int, ...] = ()
    costs: dict[str, Tensor] = field(default_factory=dict)
    row_gradient: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    rates: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    labels: int = 0
    salience: dict[str, Tensor] = field(default_factory=dict)
    candidates: dict[str, Candidates] = field(default_factory=dict)
    lim: tuple[float, ...] = ()
    zd: tuple[float, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def trimmed(self, plan: Plan) -> Profile:
        """Only the outliers that the plan takes, so that little is held while blocks are compressed."""
        taken = {name: first(found, plan.weights[name].outliers) for name, found in self.candidates.items()}
        return replace(self, candidates=taken)

    def salience_scores(self, width: int) -> dict[str, Tensor]:
        """linear -> [rows], MixLLM's salience where the low rows have this width."""
        at = self.salience_widths.index(width)
        return {name: salience[at] for name, salience in self.salience.items()}

    def cost_scores(self) -> dict[str, Tensor]:
        """linear -> [rows], one number for what a row costs at any width: the geometric mean over the options.

        Of half-integer and integer levels of one width, the first counts.
        """
        tiny = torch.finfo(torch.float32).tiny
        kinds = [(o.grid.bits, o.grid.group_size, o.grid.dual, o.outliers) for o in self.options]
        at = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        return {name: cost[at].clamp(min=tiny).log().mean(dim=0) for name, cost in self.costs.items()}

    def option_of(self, rows: Rows, cols: int) -> int | None:
        """The number of the option that some rows of `cols` weights have, None if it has no price."""
        for i, option in enumerate(self.options):
            if option.grid == rows.grid and option.kept(cols) == rows.outliers:
                return i
        return None

    def predicted(self, plan: Plan, chosen: Mapping[str, Tensor]) -> float | None:
        """Loss increase (nats per token) that the costs promise for `plan`; None where an option has no price.

        `chosen`: linear -> [rows], which of its `grids` a row is on; linears on one grid may be left out.
        """
        total = 0.0
        for name, weight in plan.weights.items():
            if name not in self.costs:
                continue
            held = self.held_options(weight, chosen.get(name))
            if held is None:
                return None
            total += float(self.costs[name].gather(0, held[None]).double().sum())
            if weight.rank and name in self.gains:
                total -= float(expected_gains(self.costs[name], self.gains[name], held)[: weight.rank].sum())
        return total

    def held_options(self, weight: WeightPlan, chosen: Tensor | None) -> Tensor | None:
        """[rows]: the number of each row's option; None if one of them has no price.

        `chosen` [rows]: which of its grids a row is on, where there are several.
        """
        options = [self.option_of(rows, weight.shape[1]) for rows in weight.grids]
        if None in options:
            return None
        held = chosen if chosen is not None and weight.mixed else torch.zeros(weight.shape[0], dtype=torch.int64)
        return torch.tensor(options)[held]


def save(profile: Profile, path: Path) -> None:
    """Writes the profile as safetensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for kind in ("costs", "row_gradient", "gains", "rates", "steps", "moments", "salience"):
        tensors |= {f"{name}.{kind}": values.contiguous() for name, values in getattr(profile, kind).items()}
    for name, found in profile.candidates.items():
        tensors |= {f"{name}.outliers": found.index, f"{name}.outlier_scores": found.score}
    about = {
        "version": VERSION,
        "loss": profile.loss,
        "labels": profile.labels,
        "options": [_option_fields(option) for option in profile.options],
        "salience_widths": profile.salience_widths,
        "lim": profile.lim,
        "zd": profile.zd,
        "groups": profile.groups,
        "source": profile.source,
    }
    save_file(tensors, path, metadata={"llmsqueeze_profile": json.dumps(about)})


def load(path: Path) -> Profile:
    """Reads a profile. Raises CheckpointError for a file that is none, or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("llmsqueeze_profile", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise RecipeError(f"there is no profile {path}; `llmsqueeze plan` writes one") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no profile: {error}") from error
    if not isinstance(about, dict) or "version" not in about:
        raise CheckpointError(f"{path} is no profile; `llmsqueeze plan` writes one")
    if about["version"] != VERSION:
        raise CheckpointError(f"{path} is a profile of version {about.get('version')}; this version reads {VERSION}")

    def of(kind: str) -> dict[str, Tensor]:
        return {n.removesuffix(f".{kind}"): t for n, t in tensors.items() if n.endswith(f".{kind}")}

    index, score = of("outliers"), of("outlier_scores")
    try:
        return _restored(about, of, index, score)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or no profile: {error!r}") from error


def _restored(
    about: dict[str, Any], of: Callable[[str], dict[str, Tensor]], index: dict[str, Tensor], score: dict[str, Tensor]
) -> Profile:
    return Profile(
        loss=about["loss"],
        options=tuple(Option(Grid(*grid), share) for grid, share in about["options"]),
        salience_widths=tuple(about["salience_widths"]),
        costs=of("costs"),
        row_gradient=of("row_gradient"),
        gains=of("gains"),
        rates=of("rates"),
        steps=of("steps"),
        moments=of("moments"),
        labels=about.get("labels", 0),
        salience=of("salience"),
        candidates={name: Candidates(index[name], score[name]) for name in index},
        lim=tuple(about["lim"]),
        zd=tuple(about["zd"]),
        groups=tuple(tuple(names) for names in about["groups"]),
        source=about["source"],
    )


def lacks(
    profile: Profile,
    source: Mapping[str, Any],
    options: Sequence[Option],
    salience: Sequence[int] = (),
    ranks: bool = False,
    steps: bool = False,
    rates: bool = False,
) -> str | None:
    """What a stored profile has been measured differently, in words; None if it serves."""
    for key, wanted in source.items():
        found = profile.source.get(key)
        if key != "files" and found != wanted:
            return f"{key.replace('_', ' ')} {_short(found)}, not {_short(wanted)}"
    missing = [str(option) for option in options if option not in profile.options]
    if missing:
        return f"no costs for {missing[0]}"
    if ranks and not profile.gains:
        return "no gains of ranks"
    if rates and not profile.rates:
        return "no rates of entropy-coded codes"
    if steps and not profile.steps:
        return "no costs of coded weights"
    unmeasured = [width for width in salience if width not in profile.salience_widths]
    return f"no salience at {unmeasured[0]} bits" if unmeasured else None


def _option_fields(option: Option) -> tuple[tuple[int, int, bool, bool, bool], float]:
    grid = option.grid
    return (grid.bits, grid.group_size, grid.symmetric, grid.half, grid.dual), option.outliers


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
