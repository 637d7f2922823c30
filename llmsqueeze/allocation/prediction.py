"""The loss increase that the costs of a profile promise for a plan, and the outliers that a plan takes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan
from llmsqueeze.allocation.ranks import expected_gains
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.profile import Profile

LIKELY = 0.4, 2.0  # times the promise: within these lie nine of ten measured losses (evals/results/real.md)


def likely(promised: float) -> list[float]:
    """The interval in which the loss increase of a promise lies in nine of ten cases."""
    return [times * promised for times in LIKELY]


def predicted(profile: Profile, plan: Plan, chosen: Mapping[str, Tensor]) -> float | None:
    """Loss increase (nats per token) of `plan`; None if one of its options has no price.

    `chosen`: linear -> [rows], which of its `grids` a row is on; linears on one grid may be left out.
    """
    total = 0.0
    for name, weight in plan.weights.items():
        if name not in profile.costs:
            continue
        options = options_of_rows(profile, weight, chosen.get(name))
        if options is None:
            return None
        total += float(profile.costs[name].gather(0, options[None]).double().sum())
        if weight.rank and name in profile.gains:
            total -= float(expected_gains(profile.costs[name], profile.gains[name], options)[: weight.rank].sum())
    return total


def options_of_rows(profile: Profile, weight: WeightPlan, chosen: Tensor | None) -> Tensor | None:
    """[rows]: the number of each row's option; None if one of them has no price.

    `chosen` [rows]: which of its grids a row is on, if it has several.
    """
    options = [option_of(profile, rows, weight.shape[1]) for rows in weight.grids]
    if None in options:
        return None
    grid = chosen if chosen is not None and weight.mixed else torch.zeros(weight.shape[0], dtype=torch.int64)
    return torch.tensor(options)[grid]


def option_of(profile: Profile, rows: Rows, cols: int) -> int | None:
    """The number of the option that some rows of `cols` weights have; None if it has no price."""
    for i, option in enumerate(profile.options):
        if option.grid == rows.grid and option.kept(cols) == rows.outliers:
            return i
    return None


def costs_of(profile: Profile, options: Sequence[Option]) -> dict[str, Tensor]:
    """The profile's costs [options, rows] of these options alone."""
    at = [profile.options.index(option) for option in options]
    return {name: cost[at] for name, cost in profile.costs.items()}


def taken_outliers(profile: Profile, plan: Plan) -> dict[str, Candidates]:
    """Only the outliers that the plan takes, so that little stays in memory while blocks are compressed."""
    return {name: ranked.first(plan.weights[name].outliers) for name, ranked in profile.candidates.items()}
