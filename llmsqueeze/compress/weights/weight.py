"""One weight matrix: its target, its rows on their grids, its outliers -> its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Rows, WeightPlan
from llmsqueeze.errors import VerificationError
from llmsqueeze.measure.moments import Moments
from llmsqueeze.parallel import processes
from llmsqueeze.parts import Coded, Grid, Part, Sparse
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.quantizers import coded, lorc, rounder, rows_at_a_time
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.quantizers.descent import corrected_target
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.quantizers.outliers import row_outliers
from llmsqueeze.recipe.recipe import Recipe


@dataclass(frozen=True)
class WeightSettings:
    """How each weight is compressed. search: search the scales of grids; lorc: the weighting of the low-rank
    compensation; pack: store codes on grids entropy-coded; seed: of the compensation."""

    search: bool = False
    lorc: str = "input-weighted"
    pack: bool = False
    seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> WeightSettings:
        return cls(recipe.search, recipe.lorc, recipe.packs, recipe.seed)


@timed("compensate")
def group_targets(group: dict[str, Tensor], moments: Moments | None) -> tuple[dict[str, Tensor], Curvature | None]:
    """The target [rows, cols] of each linear of a fusion group, and the curvature that it is rounded under.

    The target is the weight, corrected for what its output has lost (descent.py). Uses up the moments: they are as
    large as the result.
    """
    if moments is None:
        return group, None
    curvature = factorize(moments.xtx)
    targets = {
        name: _corrected(weight, moments.pulls.pop(name), curvature) if moments.pulls else weight
        for name, weight in group.items()
    }
    return targets, curvature


def _corrected(weight: Tensor, pull: Tensor, curvature: Curvature) -> Tensor:
    def rows_corrected(rows: slice) -> list[Tensor]:
        return [corrected_target(weight[rows], pull[rows], curvature)]

    return processes.over_rows(len(weight), rows_corrected)[0]


@timed("round")
def compress_weight(
    weight: Tensor,
    target: Tensor,
    planned: WeightPlan,
    curvature: Curvature | None,
    mask: Tensor | None,
    chosen: Tensor | None,
    settings: WeightSettings,
    row_gradient: Tensor | None = None,
) -> tuple[list[Part], Tensor, float]:
    """`target` [rows, cols] (float32) -> its parts, their sum in float32, and the output error relative to `weight`.

    `chosen` [rows]: which of the plan's grids a row is on, if there are several; `row_gradient` [rows]: mean squared
    gradients, by which a coded row gets its steps. Outliers (`mask`, and those that the plan gives to rows) keep their
    value in `weight`. Without curvature every input counts the same, and the error is the weight's own.
    """
    curvature = curvature or Curvature.flat(planned.shape[1], weight)
    rows_on = rows_of(planned, chosen, weight.device)
    mask = _all_outliers(weight, curvature, rows_on, None if mask is None else mask.to(weight.device))
    if mask is not None:
        target = torch.where(mask, weight, target)
    stored: list[Part] = []
    decoded: list[Part] = []  # the stored parts, but for those that would have to be decoded again and again
    if planned.coded:
        part, integers = _code(target, planned, curvature, mask, row_gradient)
        stored.append(part)
        decoded.append(integers)
    for grid in planned.by_grid:
        on_grid = [chosen_rows for rows, chosen_rows in rows_on if rows.grid == grid]
        on = torch.stack(on_grid).any(dim=0) if len(planned.by_grid) > 1 else None
        decoded.append(_round(target, planned, grid, curvature, mask, on, settings.search))
    if planned.rank:
        decoded += compensation(target, decoded, planned, curvature, mask, settings)
    if mask is not None:
        decoded.append(Sparse.from_mask(mask, weight.to(planned.dtype)))
    stored += [parts.packed(part) if settings.pack else part for part in decoded[len(stored) :]]
    dense = parts.sum_of_parts(decoded)
    lost, had = processes.over_rows(
        len(weight), lambda rows: [row_error(one[rows], curvature.H) for one in (weight - dense, weight)]
    )
    return stored, dense, float(lost.sum() / had.sum().clamp(min=1e-30))


@timed("compensate")
def compensation(
    target: Tensor,
    decoded: list[Part],
    planned: WeightPlan,
    curvature: Curvature,
    mask: Tensor | None,
    settings: WeightSettings,
) -> list[Part]:
    """Low-rank factors of the error that the parts leave of `target`; none if they do not lower the output error."""
    error = target - parts.sum_of_parts(decoded)
    if mask is not None:
        error.masked_fill_(mask, 0.0)
    weighting = curvature if settings.lorc == "input-weighted" else None
    factors = lorc.factors(error, planned.rank, weighting, planned.dtype, settings.seed)
    left = error - factors.dense()
    if mask is not None:
        left.masked_fill_(mask, 0.0)
    helps = row_error(left, curvature.H).sum() < row_error(error, curvature.H).sum()
    return [factors] if helps else []


def rows_of(planned: WeightPlan, chosen: Tensor | None, device: torch.device) -> list[tuple[Rows, Tensor]]:
    """The rows (bool [rows]) of each of the plan's counts."""
    if planned.coded:
        return []
    if not planned.mixed:
        return [(planned.grids[0], torch.ones(planned.shape[0], dtype=torch.bool, device=device))]
    assert chosen is not None, "rows on different grids need a choice"
    return [(rows, (chosen == i).to(device)) for i, rows in enumerate(planned.grids)]


def _all_outliers(
    weight: Tensor, curvature: Curvature, rows_on: Sequence[tuple[Rows, Tensor]], mask: Tensor | None
) -> Tensor | None:
    """`mask` [rows, cols] with the outliers of single rows added; None if there are none."""
    for rows, chosen in rows_on:
        if rows.outliers:
            taken = None if mask is None else mask[chosen]
            mask = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask.clone()
            mask[chosen] |= row_outliers(weight[chosen], curvature, rows.outliers, taken)
    return mask


def _code(
    target: Tensor, planned: WeightPlan, curvature: Curvature, mask: Tensor | None, row_gradient: Tensor | None
) -> tuple[Coded, Part]:
    """`target` in whole numbers of the plan's steps: as it is stored, and decoded again."""
    gradient = None if row_gradient is None else row_gradient.to(target.device)
    steps = coded.row_steps(target, planned.step, gradient)
    rounded = coded.round_to_steps(target, steps, curvature, mask, rows_at_a_time(target), over=processes.over_rows)
    part = Coded.from_integers(rounded.integers, rounded.row_exponent, rounded.col_exponent, planned.dtype)
    decoded = part.decoded(target.device)
    if not torch.equal(decoded.dense(), rounded.dense()):
        raise VerificationError("the coded integers are not those that were chosen")
    return part, decoded


def _round(
    target: Tensor,
    planned: WeightPlan,
    grid: Grid,
    curvature: Curvature,
    mask: Tensor | None,
    on: Tensor | None,
    search: bool,
) -> Part:
    """The rows `on` (None: all) of `target` on one grid, some at a time."""
    if on is not None:
        target, mask = target[on], None if mask is None else mask[on]
    if mask is not None and not mask.any():
        mask = None  # rows on a grid without a level 0 have none
    round_rows, count = rounder(planned.quantizer), rows_at_a_time(target)

    def round_own(own: slice) -> list[Tensor]:
        rounded = [
            round_rows(target[rows], grid, planned.dtype, curvature, None if mask is None else mask[rows], search)
            for rows in (slice(at, min(at + count, own.stop)) for at in range(own.start, own.stop, count))
        ]
        return [torch.cat([getattr(one, field) for one in rounded]) for field in ("codes", "scale", "zero")]

    codes, scale, zero = processes.over_rows(len(target), round_own)
    part = parts.of_codes(codes, scale, zero, grid, on)
    dense = part.dense() if on is None else part.dense()[on]
    if not torch.equal(dense, Rounded(codes, scale, zero, grid).dense()):
        raise VerificationError(f"the packed codes on {grid} are not those that were chosen")
    return part
