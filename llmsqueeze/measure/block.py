"""One resident block in the backward sweep: its gradients are reduced, sample by sample, to what a request needs.

Mean squared output gradients and input second moments price every row at every option (costs.py); weight gradients make
the salience of rows and the statistic of outliers. No gradient of a whole block ever exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from llmsqueeze.measure import importance, outliers
from llmsqueeze.measure.costs import Rounding, average_trace, coded_points, low_rank_gains, packed_rates, price
from llmsqueeze.measure.moments import FusionGroup, SecondMoments, fusion_groups, pool_probes
from llmsqueeze.measure.outer import OuterInputs
from llmsqueeze.measure.profile import Profile, joined
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.salience import rounding_error, sample_salience
from llmsqueeze.measure.streams.pooled import drawn, drawn_gradient, of_pool
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.measure.streams.restarted import Restarted
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.linear import chunk_nbytes
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.parallel import processes
from llmsqueeze.parallel.shares import Sums
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.quantizers.curvature import Curvature, factorize

Measured = tuple[tuple[str, ...], Tensor, Mapping[str, Tensor]]  # linears, moments, summed squared gradients [rows]
Linears = Mapping[str, torch.dtype]  # the linears to measure: name -> the dtype of their scales and outliers


def reduce_block(
    walk: Walk,
    index: int,
    inputs: Activations,
    gradients: Activations,
    linears: Linears,
    request: Request,
    outer: OuterInputs | None = None,
) -> Profile:
    """A resident block's backward pass over all samples; `gradients` go from its output to its input. `outer` sees the
    linears that it shares with other blocks."""
    seen: dict[str, Tensor] = {}
    groups, labels = fusion_groups(walk, index, inputs.get(0, walk.device), seen), label_counts(walk)
    probes = pool_probes(walk, groups, seen) if request.prices else {}
    seen.clear()
    moments = _InputMoments(walk, index, groups, probes, linears) if request.prices else None
    measured = [Profile(groups=tuple(group.names for group in groups))]
    passes = in_passes(walk, index, linears, request)
    if labels:  # tried before anybody sees the calls of linears
        walk.mode_of_backward(index, 0, inputs.get(0, walk.device), gradients.get(0, walk.device))
    for number, names in enumerate(passes):
        sums = _GradientSums(walk.skeleton, index, names, request) if request.weight_gradients else None
        on_gradient = sums.add if sums is not None else None
        for sample, count in enumerate(labels):
            hidden, upstream = inputs.get(sample, walk.device), gradients.get(sample, walk.device)
            on_linear = partial(moments.add, count) if moments is not None and number == 0 else None
            with outer.priced(sample) if outer is not None and number == 0 else nullcontext():
                gradient = walk.block_gradient(index, sample, hidden, upstream, on_gradient, on_linear, names)
            if number == len(passes) - 1:
                gradients.replace(sample, gradient)
            walk.on_sample(sample + 1, len(walk.samples))
            if (senders := walk.shares.ends.get(sample)) is not None:
                if sums is not None:
                    sums.sums.fold(senders)
                if moments is not None and number == 0:
                    moments.sums.fold(senders)
                if outer is not None and number == 0:
                    outer.sums.fold(senders)
        statistics = {}
        if sums is not None:
            measured.append(Profile(salience=sums.salience(walk.count)))
            statistics = sums.statistics()
            del sums, on_gradient
        candidates = rank_block(walk.skeleton, index, statistics, names, request.outliers)
        measured.append(Profile(candidates=candidates))
    measured.append(Profile(zd=block_zd(walk.skeleton, index, linears, request)))
    if moments is not None:
        measured.append(moments.priced(inputs, request, walk.labels))
    return joined(measured)


def in_passes(walk: Walk, index: int, linears: Linears, request: Request) -> Sequence[Linears]:
    """The linears of a resident block, as many at a time as what is made of their weights' gradients may take; all
    together, if the weights are in memory too."""
    names = [name for name in walk.skeleton.linears[index] if name in linears]
    at_use = walk.read_at_use(index)
    each = len(request.salience) / 2 + (request.outliers is not None)  # in numbers of four bytes for a weight
    if not request.weight_gradients or not at_use:
        return [{name: linears[name] for name in names}]
    room, taken = chunk_nbytes(walk.experts_nbytes(index)), 0.0
    passes: list[dict[str, torch.dtype]] = [{}]
    for name in names:
        rows, cols = walk.skeleton.shape(name)
        nbytes = rows * cols * 4 * each if name in at_use else 0
        if taken and taken + nbytes > room:
            passes.append({})
            taken = 0
        passes[-1][name] = linears[name]
        taken += nbytes
    return passes


def label_counts(walk: Walk) -> list[int]:
    """How many labels the loss of each sample is over."""
    return [tokens.shape[1] - 1 for tokens in walk.samples]


def reduce_weights(skeleton: Skeleton, index: int, linears: Linears, request: Request) -> Profile:
    """The measurements of a resident block's weights alone."""
    zd = block_zd(skeleton, index, linears, request)
    return Profile(zd=zd, candidates=rank_block(skeleton, index, {}, linears, request.outliers))


def block_zd(skeleton: Skeleton, index: int, linears: Linears, request: Request) -> tuple[float, ...]:
    """The ZD of a resident block, if it is requested."""
    names = [name for name in skeleton.linears[index] if name in linears]
    return (importance.zd([skeleton.weight(name) for name in names]),) if request.zd else ()


@timed("round")
def rank_block(
    skeleton: Skeleton,
    index: int,
    statistics: dict[str, Tensor],
    linears: Linears,
    ranking: outliers.Ranking | None,
) -> dict[str, outliers.Candidates]:
    """The outlier candidates of a resident block's linears; none for a linear that no sample reached, if its ranking
    needs gradients. Uses up the statistics."""
    candidates: dict[str, outliers.Candidates] = {}
    if ranking is None:
        return candidates
    for position, name in enumerate(skeleton.linears[index]):
        if name not in linears or (ranking.needs_gradients and name not in statistics):
            continue
        module = skeleton.linear(name)
        statistic = as_rows(module, statistics.pop(name)) if name in statistics else None
        weight = as_rows(module, module.weight.detach())
        candidates[name] = ranking.candidates(weight, statistic, linears[name], index, position)
    return candidates


class _GradientSums:
    """Sums over a block's weight gradients: the statistic of outliers and the salience of rows."""

    def __init__(self, skeleton: Skeleton, index: int, linears: Linears, request: Request) -> None:
        self.skeleton, self.linears = skeleton, linears
        ranking = request.outliers
        self.ranking = ranking if ranking is not None and ranking.needs_gradients else None
        self.sums = Sums()
        self.errors: dict[str, list[Tensor]] = {}
        for name in skeleton.linears[index]:
            if name in linears and request.salience:
                module = skeleton.linear(name)
                weight = as_rows(module, module.weight.detach())
                self.errors[name] = [
                    rounding_error(weight, grid, linears[name]).to(torch.bfloat16) for grid in request.salience
                ]

    def salience(self, samples: int) -> dict[str, Tensor]:
        """[grids, rows] of each linear, the mean over so many samples; nothing can be added afterwards."""
        totals = self.sums.total()
        return {name: totals.pop(f"salience {name}") / samples for name in self.errors if f"salience {name}" in totals}

    def statistics(self) -> dict[str, Tensor]:
        """[rows, cols] of each linear, as its module stores it; nothing can be added afterwards."""
        totals = self.sums.total()
        return {name: totals.pop(name) for name in self.linears if name in totals}

    @timed("moments")
    def add(self, name: str, gradient: Tensor) -> None:
        """Takes one sample's gradient, as the module stores its weight."""
        if name not in self.linears:
            return
        if self.ranking is not None:
            self.sums.add(name, outliers.of_sample(gradient, self.ranking.name))
        if errors := self.errors.get(name):
            rows = as_rows(self.skeleton.module(name), gradient)
            self.sums.add(f"salience {name}", torch.stack([sample_salience(rows, error).cpu() for error in errors]))


class _InputMoments:
    """Input second moments per fusion group and squared output gradients per row of block `index`, summed over the
    samples. probes: of the groups of each pool.

    The moments of linears that read their weights at every use are not summed up here, but some at a time when they are
    priced.
    """

    def __init__(
        self,
        walk: Walk,
        index: int,
        groups: Sequence[FusionGroup],
        probes: Mapping[tuple[str, ...], Tensor],
        linears: Linears,
    ) -> None:
        self.walk, self.index, self.groups, self.probes, self.linears = walk, index, groups, probes, linears
        self.sums, self.xtx = Sums(), dict[int, SecondMoments]()
        self.leaders = {group.names[0]: i for i, group in enumerate(groups)}
        at_use = walk.read_at_use(index)
        for i, group in enumerate(groups):
            if group.names[0] not in at_use:
                cols = walk.skeleton.shape(group.names[0])[1]
                self.xtx[i] = SecondMoments(cols, walk.dtype, walk.device, self.sums, f"xtx {i}")
                if group.pool:
                    self.xtx[i].chance.probe_with(probes[group.pool])

    @timed("moments")
    def add(self, labels: int, name: str, x: Tensor, gradient: Tensor) -> None:
        """Takes a linear's input and output gradient, of a sample whose mean loss is over this many labels."""
        group = self.leaders.get(name)
        if group is not None and x.numel():
            x = x.reshape(-1, x.shape[-1])
            self.sums.add(f"tokens {group}", torch.tensor(len(x)))
            if group in self.xtx:
                self.xtx[group].add(x)
        if name in self.linears:
            # of the summed loss, not of the mean one
            square = (gradient.reshape(-1, gradient.shape[-1]) * labels).square_().sum(dim=0)
            self.sums.add(f"squares {name}", square)

    @timed("round")
    def priced(self, inputs: Activations, request: Request, labels: int) -> Profile:
        """The prices of the linears, group by group, from the gradients of so many labels; uses up the moments. A
        linear that no sample reached has none, but an expert has those of its pool. Every process prices some."""
        numbers, profiles, total = list[int](), list[Profile](), 0
        for number, (names, moments, gradients) in enumerate(self._measured(inputs)):
            total = number + 1
            if number % processes.count() != processes.rank():
                continue
            curvature, of_group = factorize(moments), list[Profile]()
            for name in names:
                if name in gradients and name in self.linears:
                    module = self.walk.skeleton.linear(name)
                    weight = as_rows(module, module.weight.detach())
                    about = labels, curvature, self.linears[name], request
                    of_group.append(priced(name, weight, gradients[name] / labels, *about))
            numbers.append(number)
            profiles.append(joined(of_group))
        return joined(processes.all_of(numbers, profiles, total))

    def _measured(self, inputs: Activations) -> Iterator[Measured]:
        before: list[str] = []
        for pool, numbers in groupby(range(len(self.groups)), lambda i: self.groups[i].pool):
            inside = list(numbers)
            if not pool:
                yield from self._alone(inside)
            elif inside[0] in self.xtx:
                yield from self._with_gradients(inside, self._drawn(inside))
            else:
                yield from self._with_gradients(inside, self._observed(inputs, inside, before))
            before += pool

    def _tokens(self, number: int) -> int:
        """How many tokens a group got; nothing can be added afterwards."""
        return int(self.sums.total().get(f"tokens {number}", 0))

    def _squares(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The summed squared gradients of those of the linears that a sample reached."""
        total = self.sums.total()
        return {name: total[f"squares {name}"].to(self.walk.device) for name in names if f"squares {name}" in total}

    def _alone(self, numbers: list[int]) -> Iterator[Measured]:
        for i in numbers:
            if self._tokens(i):
                names, moments = self.groups[i].names, self.xtx[i]
                yield names, moments.shrunk(moments.mean())[0], self._squares(names)

    def _with_gradients(
        self, numbers: list[int], moments: Iterable[tuple[tuple[str, ...], Tensor]]
    ) -> Iterator[Measured]:
        """Groups of a pool and their moments, with gradients drawn towards those of all (streams/pooled.py)."""
        counts = {self.groups[i].names: self._tokens(i) for i in numbers}
        squares = self._squares([name for names, count in counts.items() if count for name in names])
        by_stack = [
            sum(squares[names[at]] for names, count in counts.items() if count and names[at] in squares)
            for at in range(len(self.groups[numbers[0]].names))
        ]
        tokens = sum(counts.values())
        for names, drawn_moments in moments:
            gradients = {
                name: drawn_gradient(squares.get(name), counts[names], total / tokens)
                for name, total in zip(names, by_stack, strict=True)
                if isinstance(total, Tensor)
            }
            yield names, drawn_moments, gradients

    def _drawn(self, numbers: list[int]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The moments of a pool's groups: what each saw is drawn towards what all saw together."""
        own = {i: self.xtx[i] for i in numbers if self._tokens(i)}
        if (pool := of_pool(own.values())) is not None:
            for i in numbers:
                mine = own[i].shrunk(own[i].mean())[0] if i in own else torch.zeros_like(pool[0])
                yield self.groups[i].names, drawn(mine, self._tokens(i), pool[0])

    def _observed(
        self, inputs: Activations, numbers: list[int], before: Sequence[str]
    ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The same, by runs with some experts at a time."""
        skeleton, groups = self.walk.skeleton, [self.groups[i] for i in numbers]
        weights = {name: skeleton.weight(name) for name in skeleton.linears[self.index]}
        through = Restarted(self.walk, self.index, ResidualStreams(inputs), weights, weights)
        for names, moments in through.observe_pool(groups, before, self.probes[groups[0].pool]):
            yield tuple(names), moments.xtx


def priced(
    name: str,
    weight: Tensor,
    gradient: Tensor,
    labels: int,
    curvature: Curvature,
    dtype: torch.dtype,
    request: Request,
) -> Profile:
    """The prices of `weight` [rows, cols] that are requested, from the mean squared `gradient` [rows] of its outputs
    over so many labels."""
    curves = {name: coded_points(weight, shrunk_gradient(gradient, labels), curvature)} if request.coded else {}
    row_gradient = {name: gradient.cpu()}
    if request.trace:
        gradient, curvature = average_trace(gradient, curvature)
    about = curvature, request.options, Rounding(request.quantizer, dtype, request.search)
    return Profile(
        row_gradient=row_gradient,
        curves=curves,
        costs={name: price(weight, gradient, *about)} if request.options else {},
        rates={name: packed_rates(weight, *about)} if request.rates else {},
        gains={name: low_rank_gains(weight, gradient, *about)} if request.gains else {},
    )
