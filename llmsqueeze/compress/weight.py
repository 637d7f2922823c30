"""One weight matrix: its target, its rows on their grids, its outliers -> its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Rows, WeightPlan
from llmsqueeze.errors import VerificationError
from llmsqueeze.measure.moments import Moments
from llmsqueeze.parts import Coded, Grid, Part, Sparse
from llmsqueeze.quantizers import coded, lorc, rounder
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.quantizers.descent import corrected_target
from llmsqueeze.quantizers.grids import Rounded
from llmsqueeze.quantizers.outliers import row_outliers
from llmsqueeze.recipe.recipe import Recipe

# rows are independent, so a weight is rounded some rows at a time; a GPU is kept busy only by many
ROUNDING_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}


def group_targets(group: dict[str, Tensor], moments: Moments | None) -> tuple[dict[str, Tensor], Curvature | None]:
    """What each linear of a fusion group is rounded towards [rows, cols], and the curvature it is rounded under.

    The target is the weight, corrected for the drift of its inputs. Uses up the moments: they are as large as what
    is made of them.
    """
    if moments is None:
        return group, None
    pulls = {} if moments.drift is None else {name: weight @ moments.drift for name, weight in group.items()}
    moments.drift = None
    curvature = factorize(moments.xtx)
    targets = {
        name: corrected_target(weight, pulls.pop(name), curvature) if pulls else weight
        for name, weight in group.items()
    }
    return targets, curvature


def compress_weight(
    weight: Tensor,
    target: Tensor,
    planned: WeightPlan,
    curvature: Curvature | None,
    mask: Tensor | None,
    chosen: Tensor | None,
    recipe: Recipe,
    row_gradient: Tensor | None = None,
) -> tuple[list[Part], Tensor, float]:
    """`target` [rows, cols] (float32) -> its parts, their sum in float32, and the output error relative to `weight`.

    `chosen` [rows] says which of the plan's grids a row is on, where there are several; `row_gradient` [rows] how fine
    a coded row has to be. Outliers (`mask`, and those
    that the plan gives to rows) keep their value in `weight`. Without curvature every input counts the same, so the
    error is the weight's own.
    """
    curvature = curvature or Curvature.flat(planned.shape[1], weight)
    stored = weight.to(planned.dtype)
    held = rows_of(planned, chosen, weight.device)
    mask = _all_outliers(weight, curvature, held, None if mask is None else mask.to(weight.device))
    if mask is not None:
        target = torch.where(mask, weight, target)
    made: list[Part] = []
    decoded: list[Part] = []  # the same, but for what would have to be decoded again and again
    if planned.coded:
        part, integers = _code(target, planned, curvature, mask, row_gradient)
        made.append(part)
        decoded.append(integers)
    for grid in planned.by_grid:
        on_grid = [rows for part, rows in held if part.grid == grid]
        on = torch.stack(on_grid).any(dim=0) if len(planned.by_grid) > 1 else None
        decoded.append(_round(target, planned, grid, curvature, mask, on, recipe))
    if planned.rank:
        decoded += compensation(target, decoded, planned, curvature, mask, recipe)
    if mask is not None:
        decoded.append(Sparse.from_mask(mask, stored))
    made += [parts.packed(part) if recipe.packs else part for part in decoded[len(made) :]]
    dense = parts.sum_of_parts(decoded)
    error = row_error(weight - dense, curvature.H).sum() / row_error(weight, curvature.H).sum().clamp(min=1e-30)
    return made, dense, float(error)


def compensation(
    target: Tensor,
    made: list[Part],
    planned: WeightPlan,
    curvature: Curvature,
    mask: Tensor | None,
    recipe: Recipe,
) -> list[Part]:
    """Low-rank factors for what the parts leave of `target`; none where they would not lower the output error."""
    error = target - parts.sum_of_parts(made)
    if mask is not None:
        error.masked_fill_(mask, 0.0)
    weighting = curvature if recipe.lorc == "input-weighted" else None
    found = lorc.factors(error, planned.rank, weighting, planned.dtype, recipe.seed)
    left = error - found.dense()
    if mask is not None:
        left.masked_fill_(mask, 0.0)
    helps = row_error(left, curvature.H).sum() < row_error(error, curvature.H).sum()
    return [found] if helps else []


def rows_of(planned: WeightPlan, chosen: Tensor | None, device: torch.device) -> list[tuple[Rows, Tensor]]:
    """Which rows (bool [rows]) each of the plan's counts means."""
    if planned.coded:
        return []
    if not planned.mixed:
        return [(planned.grids[0], torch.ones(planned.shape[0], dtype=torch.bool, device=device))]
    assert chosen is not None, "rows on different grids need a choice"
    return [(rows, (chosen == i).to(device)) for i, rows in enumerate(planned.grids)]


def _all_outliers(
    weight: Tensor, curvature: Curvature, held: Sequence[tuple[Rows, Tensor]], mask: Tensor | None
) -> Tensor | None:
    """`mask` [rows, cols] with the outliers of single rows added; None where there are none."""
    for rows, chosen in held:
        if rows.outliers:
            found = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask.clone()
            taken = None if mask is None else mask[chosen]
            found[chosen] |= row_outliers(weight[chosen], curvature, rows.outliers, taken)
            mask = found
    return mask


def _code(
    target: Tensor, planned: WeightPlan, curvature: Curvature, mask: Tensor | None, row_gradient: Tensor | None
) -> tuple[Coded, Part]:
    """`target` in whole numbers of the plan's steps: as it is stored, and decoded again."""
    gradient = None if row_gradient is None else row_gradient.to(target.device)
    steps = coded.row_steps(target, planned.step, gradient)
    some = max(1, ROUNDING_BYTES[target.device.type] // (4 * planned.shape[1]))
    found = coded.round_to_steps(target, steps, curvature, mask, some)
    part = Coded.from_integers(found.integers, found.row_exponent, found.col_exponent, planned.dtype)
    decoded = part.decoded(target.device)
    if not torch.equal(decoded.dense(), found.dense()):
        raise VerificationError("the coded integers are not those that were chosen")
    return part, decoded


def _round(
    target: Tensor,
    planned: WeightPlan,
    grid: Grid,
    curvature: Curvature,
    mask: Tensor | None,
    on: Tensor | None,
    recipe: Recipe,
) -> Part:
    """The rows `on` (None: all) of `target` on one grid, some at a time."""
    if on is not None:
        target, mask = target[on], None if mask is None else mask[on]
    if mask is not None and not mask.any():
        mask = None  # rows on a grid without a level 0 have none
    step = max(1, ROUNDING_BYTES[target.device.type] // (4 * planned.shape[1]))
    rounded = [
        rounder(planned.quantizer)(
            target[rows],
            grid,
            planned.dtype,
            curvature,
            None if mask is None else mask[rows],
            recipe.search,
        )
        for rows in (slice(start, start + step) for start in range(0, len(target), step))
    ]
    codes, scale, zero = (torch.cat([getattr(r, field) for r in rounded]) for field in ("codes", "scale", "zero"))
    part = parts.of_codes(codes, scale, zero, grid, on)
    made = part.dense() if on is None else part.dense()[on]
    if not torch.equal(made, Rounded(codes, scale, zero, grid).dense()):
        raise VerificationError(f"the packed codes on {grid} are not those that were chosen")
    return part
