"""Inputs of linears: which linears share an input tensor, and the second moments of that input.

Linears that receive the same tensor object form a fusion group (q/k/v, gate/up): they are found by the identity of
their input in a traced run, not by name, and share one second-moment matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from llmsqueeze.measure.shrinkage import Chance, probes_for, shrink
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import Sums

PANELS = 8  # of the columns of a second-moment matrix: of the products, 9/16 are computed


@dataclass(frozen=True)
class FusionGroup:
    """Linears with one input, and how often each is called in one forward pass. Of experts: `pool`, the stacks that
    they are in. The groups of a pool get what a router sends them, and none depends on another."""

    names: tuple[str, ...]
    calls: int
    pool: tuple[str, ...] = ()


@dataclass
class Moments:
    """Of the inputs of a fusion group: xtx = mean over the tokens of y y^T [cols, cols]; pulls: linear -> mean of e y^T
    [rows, cols] with e = W (x - y), empty where x is y; e has more to it if the output is added (`OutputPulls`).

    y: the inputs that the linears will see; x: the original model's for the same tokens. chance: the share of the
    entries off the diagonal that was chance, and is taken away. tokens: how many there were.
    """

    xtx: Tensor
    pulls: dict[str, Tensor]
    chance: float = 0.0
    tokens: int = 0


class SecondMoments:
    """The sum of y y^T over tokens. It is symmetric, so only panels on and above the diagonal are added up.

    sums, name: where it is kept. Who gives them folds their shares, else one process adds everything up in one.
    """

    def __init__(
        self, cols: int, dtype: torch.dtype, device: torch.device, sums: Sums | None = None, name: str = "xtx"
    ) -> None:
        self.sums, self.name, self.cols, self.dtype, self.device = sums or Sums(), name, cols, dtype, device
        self.chance = Chance(cols, dtype, device, self.sums, f"{name} chance")
        width = -(-cols // PANELS)
        self._panels = [slice(start, min(start + width, cols)) for start in range(0, cols, width)]

    def add(self, y: Tensor) -> None:
        """y [tokens, cols]: the inputs of one sample."""
        self.sums.add(f"{self.name} tokens", torch.tensor(len(y)))
        total = self.sums.of(self.name, self.cols, self.cols, dtype=self.dtype, device=self.device)
        for panel in self._panels:
            total[panel, panel.start :].addmm_(y[:, panel].T, y[:, panel.start :])
        self.chance.add(y, y)

    @property
    def tokens(self) -> int:
        """How many were added; nothing can be added afterwards."""
        return int(self.sums.total().get(f"{self.name} tokens", 0))

    def so_far(self) -> Tensor:
        """The sum [cols, cols], of which the upper panels count; nothing can be added afterwards."""
        return self.sums.total()[self.name].to(self.device)

    def mean(self) -> Tensor:
        """[cols, cols]: per token, in the memory of the sum; nothing can be added afterwards."""
        total = self.so_far()
        del self.sums.total()[self.name]
        return self.mean_of(total, self.tokens)

    def mean_of(self, total: Tensor, tokens: int) -> Tensor:
        """The mean that a sum is of so many tokens, in its memory."""
        for panel in self._panels:
            total[panel.stop :, panel] = total[panel, panel.stop :].T
        return total.div_(tokens)

    def shrunk(self, mean: Tensor) -> tuple[Tensor, float]:
        """The mean [cols, cols] without the share of it that is chance, in its memory, and that share."""
        share = self.chance.share(mean.diagonal(), self.tokens)
        return shrink(mean, share), share


class Pulls:
    """The mean of W (x - y) y^T over tokens, for the weights W of a group, without the share of it that is chance.

    Either D = mean of (x - y) y^T is added up and multiplied at the end, which takes cols^2 products for a token. Or,
    if the group has few rows, (W x) y^T for every W, which takes rows * cols, and as many for W x if it is not known; W
    times the second moments of y is taken off its mean at the end.
    """

    def __init__(self, weights: Mapping[str, Tensor], sums: Sums | None = None) -> None:
        """weights: [rows, cols] each; sums: as `SecondMoments` has them"""
        self._weights, self._sums = weights, sums or Sums()
        rows, cols = sum(len(weight) for weight in weights.values()), next(iter(weights.values())).shape[1]
        self._by_row = 2 * rows < cols
        self._like = next(iter(weights.values()))
        self._chance = Chance(cols, self._like.dtype, self._like.device, self._sums, "pulls chance", diagonal=True)

    def probe_with(self, probes: Tensor) -> None:
        """As `Chance` has it."""
        self._chance.probe_with(probes)

    def add(self, x: Tensor, y: Tensor, outputs: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """x, y [tokens, cols]; outputs: W x [tokens, rows] of weights for which it is known."""
        drift = x - y
        self._chance.add(drift, y)
        if not self._by_row:
            self._sum("drift", y.shape[1]).addmm_(drift.T, y)
            return
        for name, weight in self._weights.items():
            output = outputs[name] if name in outputs else x @ weight.T
            self._sum(f"pull {name}", len(weight)).addmm_(output.T, y)

    def mean(self, tokens: int, xtx: Tensor) -> dict[str, Tensor]:
        """Per token; xtx [cols, cols]: the mean of y y^T, as measured. Nothing can be added afterwards."""
        kept = 1 - self._chance.share(xtx.diagonal(), tokens)
        if not self._by_row:
            drift = self._total("drift", xtx.shape[1]).mul_(kept / tokens)
            return {name: product(weight, drift) for name, weight in self._weights.items()}
        return {
            name: self._total(f"pull {name}", len(weight)).div_(tokens).sub_(product(weight, xtx)).mul_(kept)
            for name, weight in self._weights.items()
        }

    def _sum(self, name: str, rows: int) -> Tensor:
        like = self._like
        return self._sums.of(name, rows, like.shape[1], dtype=like.dtype, device=like.device)

    def _total(self, name: str, rows: int) -> Tensor:
        total = self._sums.total().pop(name, None)
        return self._like.new_zeros(rows, self._like.shape[1]) if total is None else total.to(self._like.device)


class OutputPulls:
    """The mean of e y^T over tokens, without the share of it that is chance: e = W (x - y) + r - s, what the sum of a
    linear's output and the residual stream has lost, r and s being the stream of the original and the compressed model.

    In the place of `Pulls`, for a linear whose output is added to the stream: its weight can make both good.
    """

    def __init__(self, weight: Tensor, sums: Sums | None = None) -> None:
        """weight: [rows, cols]; sums: as `SecondMoments` has them"""
        self._weight, self._sums = weight, sums or Sums()
        self._chance = Chance(len(weight), weight.dtype, weight.device, self._sums, "output chance", diagonal=True)

    def add(self, x: Tensor, y: Tensor, apart: Tensor | None) -> None:
        """x, y [tokens, cols]; apart [tokens, rows]: r - s, None if nothing is added for these tokens"""
        lost = (x - y) @ self._weight.T
        if apart is not None:
            lost += apart
        self._chance.add(lost, y)
        weight = self._weight
        self._sums.of("output", *weight.shape, dtype=weight.dtype, device=weight.device).addmm_(lost.T, y)

    def mean(self, tokens: int) -> Tensor:
        """[rows, cols]: per token; nothing can be added afterwards."""
        alike = torch.ones(len(self._weight), dtype=self._weight.dtype, device=self._weight.device)
        total = self._sums.total().pop("output", None)
        total = torch.zeros_like(self._weight) if total is None else total.to(self._weight.device)
        return total.mul_((1 - self._chance.share(alike, tokens)) / tokens)


def product(weight: Tensor, matrix: Tensor) -> Tensor:
    """weight [rows, cols] @ matrix [cols, cols], the rows shared among the processes."""
    (result,) = processes.over_rows(len(weight), lambda rows: [weight[rows] @ matrix])
    return result


def fusion_groups(walk: Walk, index: int, hidden: Tensor, inputs: dict[str, Tensor] | None = None) -> list[FusionGroup]:
    """The linears of a resident block in the order they are first called with `hidden` [1, length, width]; `inputs`
    becomes what they got."""
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: seen.append((name, args[0]))

    names = walk.skeleton.linears[index]
    handles = [walk.skeleton.module(name).register_forward_pre_hook(noting(name)) for name in names]
    try:
        with torch.no_grad():
            walk.run(index, 0, hidden)
    finally:
        for handle in handles:
            handle.remove()
    if inputs is not None:
        inputs |= dict(seen)
    return with_all_experts(grouped(seen), walk.skeleton.stacks_in(index))


def pool_probes(
    walk: Walk, groups: Iterable[FusionGroup], inputs: Mapping[str, Tensor]
) -> dict[tuple[str, ...], Tensor]:
    """pool -> probes [PROBES, cols] of all its experts, from what some of them got of one sample, the same in all
    processes."""
    pools: dict[tuple[str, ...], list[Tensor]] = {}
    for group in groups:
        if group.pool:
            of_pool, cols = pools.setdefault(group.pool, []), walk.skeleton.shape(group.names[0])[1]
            if (given := inputs.get(group.names[0])) is not None:
                of_pool.append(given.reshape(-1, cols))
    for pool, of_pool in pools.items():
        if not of_pool:
            of_pool.append(torch.ones(1, walk.skeleton.shape(f"{pool[0]}.0")[1]))
    return processes.told({pool: probes_for(torch.cat(of_pool)) for pool, of_pool in pools.items()})


def with_all_experts(groups: Sequence[FusionGroup], stacks: Mapping[str, int]) -> list[FusionGroup]:
    """The fusion groups with those of experts that no token was sent to, all of a pool one after the other. stacks:
    stack -> number of its experts."""
    pools: dict[tuple[str, ...], None] = {}
    ordered: list[tuple[str, ...] | FusionGroup] = []
    for group in groups:
        pool = tuple(name.rpartition(".")[0] for name in group.names)
        if not stacks.keys() >= set(pool):
            ordered.append(group)
        elif pool not in pools:
            pools[pool] = None
            ordered.append(pool)
    reached = {stack for pool in pools for stack in pool}
    ordered += [(stack,) for stack in stacks if stack not in reached]
    complete: list[FusionGroup] = []
    for one in ordered:
        if isinstance(one, FusionGroup):
            complete.append(one)
        else:
            numbers = range(min(stacks[stack] for stack in one))
            complete += [FusionGroup(tuple(f"{stack}.{i}" for stack in one), 1, one) for i in numbers]
    return complete


def grouped(calls: Iterable[tuple[str, object]]) -> list[FusionGroup]:
    """The fusion groups of calls (linear, input), which are in order; an input is told by its identity."""
    inputs: dict[str, list[object]] = {}  # in the order of the first calls
    for name, value in calls:
        inputs.setdefault(name, []).append(value)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, values in inputs.items():
        # the inputs are still referenced, so equal ids mean one and the same
        groups.setdefault(tuple(map(id, values)), []).append(name)
    return [FusionGroup(tuple(names), len(key)) for key, names in groups.items()]
