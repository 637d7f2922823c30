"""The budget: one greedy over the whole model that buys, byte by byte, the largest fall in predicted loss.

    minimise  sum_u cost[u, o(u)]   subject to   sum_u bytes[u, o(u)] <= budget

u is a row, a linear or a fusion group; o(u) its option (measure/costs.py): a grid, and a share of weights that stay as
they are. For every unit the options on the lower convex hull of (bytes, cost) are kept; going up a hull, every further
byte buys less. All upgrades along all hulls, sorted by the gain per byte, are taken in turn until the budget is spent:
that is the Lagrangian solution, optimal for its bytes. The rest of the budget goes to later upgrades that fit.

Costs are all of one kind, nats per token, or the sum would mean nothing. Source: ours; the rule itself is Fox's
marginal analysis (1966), known from rate-distortion theory. Memory: 16 bytes per row and step.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan, Rows, WeightPlan, fused
from llmsqueeze.errors import RecipeError
from llmsqueeze.measure.costs import Option

TRIES = 50


@dataclass(frozen=True)
class Units:
    """What gets an option of its own, for linears that share theirs: cost [options, units], bytes [options].

    The options are sorted by their bytes; `order` [options] has their numbers.
    """

    names: tuple[str, ...]
    cost: Tensor
    nbytes: Tensor
    order: Tensor

    @classmethod
    def of(cls, names: tuple[str, ...], cost: Tensor, nbytes: Tensor) -> Units:
        """From options in any order."""
        order = torch.argsort(nbytes, stable=True)
        return cls(names, cost[order], nbytes[order], order)


@dataclass(frozen=True)
class Upgrades:
    """Upgrades up the hulls: which unit [n], from and to which option (counted by size), what a byte buys, how many.

    `lowest` [units]: the option that each unit begins on.
    """

    lowest: Tensor
    unit: Tensor
    start: Tensor
    to: Tensor
    slope: Tensor
    nbytes: Tensor


def allocate(
    plan: Plan,
    costs: Mapping[str, Tensor],
    options: Sequence[Option],
    target: int,
    granularity: str,
    groups: Sequence[Sequence[str]],
) -> Plan:
    """`plan` with the options that buy most within `target` bytes.

    `costs`: name -> [options, rows]; `groups`: the fusion groups. Raises RecipeError where nothing fits.
    """
    units = make_units(plan, costs, options, granularity, groups)
    counts = [unit.cost.shape[1] for unit in units]
    upgrades = best_first([hull_upgrades(unit.cost, unit.nbytes) for unit in units], counts)

    def plan_at(state: Tensor) -> Plan:
        grids = {}
        for unit, part in zip(units, state.split(counts), strict=True):
            chosen = unit.order[part]
            for name in unit.names:
                grids[name] = row_counts(plan.weights[name], chosen, options)
        return plan.on(grids)

    def state_at(cut: int) -> Tensor:
        state = upgrades.lowest.clone()
        return state.scatter_reduce_(0, upgrades.unit[:cut], upgrades.to[:cut], "amax")

    smallest = plan_at(state_at(0))
    if smallest.nbytes > target:
        raise RecipeError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight, {target} bytes; the smallest plan takes "
            f"{smallest.bits_per_weight:.3f}, {smallest.nbytes} bytes, everything counted"
        )
    low, high = 0, len(upgrades.unit)
    while low < high:  # bytes grow with the cut, but for a word of row marks here and there
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_at(state_at(middle)).nbytes <= target else (low, middle - 1)
    return spend_rest(state_at(low), upgrades, low, plan_at, target)


def spend_rest(state: Tensor, upgrades: Upgrades, cut: int, plan_at: Callable[[Tensor], Plan], target: int) -> Plan:
    """What the upgrades from `cut` on can still buy: the first that fits, then the next, until none does.

    Gives up after some that turn out not to fit, for every try counts the whole plan.
    """
    plan = plan_at(state)
    unit, start, to, nbytes = (column[cut:] for column in (upgrades.unit, upgrades.start, upgrades.to, upgrades.nbytes))
    refused = torch.zeros(len(unit), dtype=torch.bool)
    while refused.sum() < TRIES:
        fitting = ~refused & (nbytes <= target - plan.nbytes) & (start == state[unit])
        if not fitting.any():
            break
        first = int(fitting.int().argmax())
        before = int(state[unit[first]])
        state[unit[first]] = to[first]
        candidate = plan_at(state)
        if candidate.nbytes <= target:
            plan = candidate
        else:  # a row mark more than the step itself takes
            state[unit[first]] = before
            refused[first] = True
    return plan


def make_units(
    plan: Plan,
    costs: Mapping[str, Tensor],
    options: Sequence[Option],
    granularity: str,
    groups: Sequence[Sequence[str]],
) -> list[Units]:
    """The units of the planned linears that have costs."""

    def sizes(name: str) -> Tensor:
        weight = plan.weights[name]
        return torch.tensor([row_nbytes(weight, option) for option in options], dtype=torch.float64)

    costed = [name for name in plan.weights if name in costs]
    if granularity == "row":
        return [Units.of((name,), costs[name].double(), sizes(name)) for name in costed]
    result = []
    for names in fused(costed, groups if granularity == "group" else ()):
        cost = torch.stack([costs[name].double().sum(dim=1) for name in names]).sum(dim=0)
        nbytes = torch.stack([sizes(name) * plan.weights[name].shape[0] for name in names]).sum(dim=0)
        result.append(Units.of(names, cost[:, None], nbytes))
    return result


def row_nbytes(weight: WeightPlan, option: Option) -> float:
    """Bytes that one row takes, and its share of what rows share."""
    rows, cols = weight.shape
    specs = [parts.grid_spec(option.grid, weight.dtype)]
    if option.kept(cols):
        specs.append(parts.sparse_spec(rows * option.kept(cols), weight.dtype))
    return parts.layout_nbytes(weight.shape, specs) / rows - weight.saved_of_row(option.grid)


def row_counts(weight: WeightPlan, chosen: Tensor, options: Sequence[Option]) -> tuple[Rows, ...]:
    """How many rows have which option, those with the most bytes first; `chosen` [rows], or [1] for all rows."""
    counts = torch.bincount(chosen, minlength=len(options)) * (weight.shape[0] // len(chosen))
    used = [i for i in range(len(options)) if counts[i]]
    used.sort(key=lambda i: -row_nbytes(weight, options[i]))
    return tuple(Rows(options[i].grid, int(counts[i]), options[i].kept(weight.shape[1])) for i in used)


def hull_upgrades(cost: Tensor, nbytes: Tensor) -> Upgrades:
    """Upgrades along the lower hull of every unit, from the smallest option; cost [options, units], nbytes sorted."""
    options = len(cost)
    # of options with the same fewest bytes the cheapest
    lowest = cost[: int((nbytes == nbytes[0]).sum())].argmin(dim=0)
    current = lowest.clone()
    upgrades: list[tuple[Tensor, ...]] = []
    for _ in range(options - 1):
        here = cost.gather(0, current[None])
        width = nbytes[:, None] - nbytes[current][None]
        slope = torch.where(width > 0, (here - cost) / width.clamp(min=1e-12), -torch.inf)
        best, to = slope.max(dim=0)
        going = (best > 0).nonzero()[:, 0]
        if not len(going):
            break
        upgrades.append((going, current[going], to[going], best[going], width.gather(0, to[None])[0, going]))
        current[going] = to[going]
    if not upgrades:
        whole, real = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        return Upgrades(lowest, whole, whole, whole, real, real)
    return Upgrades(lowest, *(torch.cat(column) for column in zip(*upgrades, strict=True)))


def best_first(upgrades: Sequence[Upgrades], counts: Sequence[int]) -> Upgrades:
    """All steps with their units numbered through, sorted by what a byte buys; the steps of a unit stay in turn."""
    first = [sum(counts[:i]) for i in range(len(counts))]
    columns = [
        (one.unit + offset, one.start, one.to, one.slope, one.nbytes)
        for one, offset in zip(upgrades, first, strict=True)
    ]
    together = [torch.cat(column) for column in zip(*columns, strict=True)]
    order = torch.sort(together[3], descending=True, stable=True).indices
    return Upgrades(torch.cat([one.lowest for one in upgrades]), *(column[order] for column in together))


def ladder(
    plan: Plan,
    costs: Mapping[str, Tensor],
    options: Sequence[Option],
    granularity: str,
    groups: Sequence[Sequence[str]],
) -> list[tuple[float, float]]:
    """Bytes and predicted cost after every step of the greedy, from the smallest plan on; row marks are not counted."""
    units = make_units(plan, costs, options, granularity, groups)
    by_unit = [hull_upgrades(unit.cost, unit.nbytes) for unit in units]
    ordered = best_first(by_unit, [unit.cost.shape[1] for unit in units])
    nbytes = sum(float(unit.nbytes[0]) * unit.cost.shape[1] for unit in units)
    start = sum(float(unit.cost.gather(0, one.lowest[None]).sum()) for unit, one in zip(units, by_unit, strict=True))
    sizes = nbytes + torch.cat([torch.zeros(1, dtype=torch.float64), ordered.nbytes.cumsum(0)])
    falls = torch.cat([torch.zeros(1, dtype=torch.float64), (ordered.slope * ordered.nbytes).cumsum(0)])
    return list(zip(sizes.tolist(), (start - falls).tolist(), strict=True))


def uniform(plan: Plan, options: Sequence[Option], target: int) -> Plan:
    """The control: the same two neighbouring widths in every linear, the same share of its rows on the wider one.

    Raises RecipeError where the narrowest does not fit.
    """
    first = next(iter(plan.weights.values()))
    smallest: dict[int, Option] = {}
    for option in sorted(options, key=lambda option: row_nbytes(first, option)):
        smallest.setdefault(option.grid.bits, option)
    by_width = [smallest[bits] for bits in sorted(smallest)]

    def mixed(lower: Option, upper: Option, share: float) -> Plan:
        def split(weight: WeightPlan) -> tuple[Rows, ...]:
            rows, cols = weight.shape
            count = int(share * rows + 1e-9)
            return Rows(upper.grid, count, upper.kept(cols)), Rows(lower.grid, rows - count, lower.kept(cols))

        return plan.on({name: split(weight) for name, weight in plan.weights.items()})

    best = mixed(by_width[0], by_width[0], 0.0)
    if best.nbytes > target:
        raise RecipeError(
            f"the budget is {8 * target / plan.numel:.3f} bits per weight; with every row at {by_width[0].grid.bits} "
            f"bits it takes {best.bits_per_weight:.3f}, everything counted"
        )
    for lower, upper in itertools.pairwise(by_width):
        shares = [i / 4096 for i in range(4097)]
        fitting = bisect.bisect_right(shares, target, key=lambda share: mixed(lower, upper, share).nbytes)
        if fitting:
            best = mixed(lower, upper, shares[fitting - 1])
        if fitting < len(shares):
            break
    return best
