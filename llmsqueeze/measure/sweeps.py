"""Measuring the original model by one forward and one backward sweep of the block walk.

While a block is resident in the backward sweep, its gradients are reduced sample by sample to what the plan needs:
mean squared output gradients and input second moments, which price every row at every option (price.py), MixLLM's
salience, GWQ's statistic. No gradient of a whole model, or even of a whole block, ever exists. What needs less than
gradients (LIM, ZD, rankings without data) is measured with less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsqueeze.allocation import gwq, layerwise, mixllm
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.measure.costs import Option, coded_points, low_rank_gains, packed_rates, price, rounding_error
from llmsqueeze.measure.ends import Ends
from llmsqueeze.measure.moments import FusionGroup, fusion_groups
from llmsqueeze.measure.profile import Profile
from llmsqueeze.model.activations import Activations
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.walk import Walk
from llmsqueeze.parts import Grid
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.quantizers.curvature import factorize
from llmsqueeze.quantizers.rtn import rtn
from llmsqueeze.recipe.recipe import Recipe


@dataclass(frozen=True)
class Wanted:
    """What to measure. options: to be priced, and with them `ranks` and
    `rates` (of entropy-coded codes); steps: what coded weights cost, and with them
    `embeddings` and head; salience: the
    widths that MixLLM's is taken at."""

    options: tuple[Option, ...] = ()
    rates: bool = False
    steps: bool = False
    embeddings: bool = False
    salience: tuple[int, ...] = ()
    outliers: bool = False
    ranks: bool = False
    lim: bool = False
    zd: bool = False

    def needs_gradients(self, recipe: Recipe) -> bool:
        return bool(self.options or self.steps or self.salience) or (self.outliers and recipe.needs_outlier_gradients)


@dataclass
class _Found:
    """What the sweeps fill in."""

    costs: dict[str, Tensor] = field(default_factory=dict)
    row_gradient: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    rates: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    labels: int = 0
    salience: dict[str, Tensor] = field(default_factory=dict)
    candidates: dict[str, gwq.Candidates] = field(default_factory=dict)
    groups: dict[int, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    zd: dict[int, float] = field(default_factory=dict)


def measure(
    walk: Walk, first_inputs: Activations | None, plan: Plan, recipe: Recipe, wanted: Wanted, progress: Progress
) -> Profile:
    """The profile of the planned linears. Without `first_inputs` only what needs no text can be wanted."""
    found, loss = _Found(), None
    lim: list[float] = []
    blocks = range(len(walk.skeleton.blocks))
    if wanted.needs_gradients(recipe):
        assert first_inputs is not None
        inputs, lim = forward_sweep(walk, first_inputs, progress)
        ends = Ends(walk) if wanted.embeddings else None
        loss, gradients = head_sweep(walk, inputs.pop(), recipe, progress, ends)
        progress.stage("gradients", len(blocks))
        for index in reversed(blocks):
            with walk.resident_block(index):
                reduce_block(walk, index, inputs[index], gradients, plan, recipe, wanted, found)
            if index:  # the first block's inputs belong to the caller
                inputs[index].clear()
            progress.advance()
        if ends is not None:
            price_ends(ends, first_inputs, gradients, found)
        gradients.clear()
    else:
        if wanted.lim:
            assert first_inputs is not None
            lim = similarities(walk, first_inputs, progress)
        if wanted.zd or wanted.outliers:
            for index in progress.over(blocks, "weights", len(blocks)):
                with walk.resident_block(index):
                    reduce_weights(walk.skeleton, index, {}, plan, recipe, wanted, found)
    return Profile(
        loss=loss,
        options=wanted.options,
        salience_widths=wanted.salience,
        costs=found.costs,
        row_gradient=found.row_gradient,
        gains=found.gains,
        rates=found.rates,
        steps=found.steps,
        moments=found.moments,
        labels=found.labels,
        salience=found.salience,
        candidates=found.candidates,
        lim=tuple(lim),
        zd=tuple(found.zd[index] for index in sorted(found.zd)),
        groups=tuple(names for index in sorted(found.groups) for names in found.groups[index]),
    )


def forward_sweep(walk: Walk, first_inputs: Activations, progress: Progress) -> tuple[list[Activations], list[float]]:
    """The input of every block, and the output of the last, for every sample; and every block's LIM."""
    inputs, lim = [first_inputs], []
    for index in progress.over(range(len(walk.modules)), "forward", len(walk.modules)):
        outputs, similar = forward_block(walk, index, inputs[-1])
        inputs.append(outputs)
        lim.append(-similar)
    return inputs, lim


def similarities(walk: Walk, first_inputs: Activations, progress: Progress) -> list[float]:
    """Every block's LIM, with the activations of one block at a time."""
    inputs, lim = first_inputs, []
    for index in progress.over(range(len(walk.modules)), "forward", len(walk.modules)):
        outputs, similar = forward_block(walk, index, inputs)
        lim.append(-similar)
        if inputs is not first_inputs:
            inputs.clear()
        inputs = outputs
    inputs.clear()
    return lim


def forward_block(walk: Walk, index: int, inputs: Activations) -> tuple[Activations, float]:
    """Block `index` on every sample: its outputs, and their mean cosine with the inputs."""
    outputs = Activations(walk.spill)
    similar = 0.0
    with walk.resident_block(index), torch.no_grad():
        for sample, hidden in enumerate(inputs.each(walk.device)):
            output = walk.run(index, sample, hidden)
            similar += layerwise.similarity(hidden, output)
            outputs.append(output)
    return outputs, similar / len(inputs)


def head_sweep(
    walk: Walk, outputs: Activations, recipe: Recipe, progress: Progress, ends: Ends | None = None
) -> tuple[float, Activations]:
    """Mean loss over the samples, and per sample the gradient of its loss at the last block's output; `ends` sees what
    the head does.

    The loss behind the gradient is that on the text, or on labels that the model draws by the recipe's seed.
    """
    gradients = Activations(walk.spill)
    losses = []
    generator = torch.Generator().manual_seed(recipe.seed)
    with walk.head.resident():
        pairs = zip(outputs.each(walk.device), walk.samples, strict=True)
        for hidden, tokens in progress.over(pairs, "loss", len(walk.samples)):
            draw = torch.rand(tokens.shape[1] - 1, generator=generator) if recipe.labels == "model" else None
            loss, gradient = walk.head.gradient(hidden, tokens, draw, None if ends is None else ends.see_head)
            losses.append(loss)
            gradients.append(gradient)
    outputs.clear()
    return sum(losses) / len(losses), gradients


def reduce_block(
    walk: Walk,
    index: int,
    inputs: Activations,
    gradients: Activations,
    plan: Plan,
    recipe: Recipe,
    wanted: Wanted,
    found: _Found,
) -> None:
    """A resident block's backward pass over all samples; `gradients` go from its output to its input."""
    groups = fusion_groups(walk, index, inputs.get(0, walk.device))
    found.groups[index] = tuple(group.names for group in groups)
    moments = _Moments(groups, plan) if wanted.options or wanted.steps else None
    gradient_wanted = bool(wanted.salience) or (wanted.outliers and recipe.needs_outlier_gradients)
    sums = _GradientSums(walk.skeleton, index, plan, recipe, wanted) if gradient_wanted else None
    for sample in range(len(walk.samples)):
        hidden, upstream = inputs.get(sample, walk.device), gradients.get(sample, walk.device)
        labels = walk.samples[sample].shape[1] - 1
        on_gradient = sums.add if sums is not None else None
        on_linear = moments.watching(labels) if moments is not None else None
        gradients.replace(sample, walk.block_gradient(index, sample, hidden, upstream, on_gradient, on_linear))
    if sums is not None:
        found.salience |= {name: total / len(walk.samples) for name, total in sums.salience.items()}
        sums.errors.clear()
    reduce_weights(walk.skeleton, index, sums.statistics if sums else {}, plan, recipe, wanted, found)
    if moments is not None:
        moments.price(walk.skeleton, plan, recipe, wanted, found)


def reduce_weights(
    skeleton: Skeleton,
    index: int,
    statistics: dict[str, Tensor],
    plan: Plan,
    recipe: Recipe,
    wanted: Wanted,
    found: _Found,
) -> None:
    """What a resident block's weights alone tell, or with GWQ's statistics, which are used up."""
    names = [name for name in skeleton.linears[index] if name in plan.weights]
    if wanted.zd:
        found.zd[index] = layerwise.zd([skeleton.linear(name).weight.detach() for name in names]) if names else 0.0
    if wanted.outliers:
        found.candidates |= rank_block(skeleton, index, statistics, plan, recipe)


def price_ends(ends: Ends, first_inputs: Activations, gradients: Activations, found: _Found) -> None:
    """Embeddings and head, from the gradients at the first block's input and what the head was seen to do."""
    for sample, hidden in enumerate(first_inputs.each(ends.device)):
        ends.see_embeddings(sample, hidden, gradients.get(sample, ends.device))
    for name, (xtx, row_gradient) in ends.moments().items():
        weight = ends.weight(name)
        found.moments[name], found.row_gradient[name] = xtx.cpu().clone(), row_gradient.cpu()
        found.steps[name] = coded_points(weight, shrunk_gradient(row_gradient, found.labels), factorize(xtx))


class _GradientSums:
    """What is summed up of a block's weight gradients: GWQ's statistics and MixLLM's salience."""

    def __init__(self, skeleton: Skeleton, index: int, plan: Plan, recipe: Recipe, wanted: Wanted) -> None:
        self.skeleton, self.plan, self.recipe = skeleton, plan, recipe
        self.outliers = wanted.outliers and recipe.needs_outlier_gradients
        self.statistics: dict[str, Tensor] = {}
        self.salience: dict[str, Tensor] = {}
        self.errors: dict[str, list[Tensor]] = {}
        for name in skeleton.linears[index]:
            if name in plan.weights and wanted.salience:
                module = skeleton.linear(name)
                weight = as_rows(module, module.weight.detach())
                grids = [Grid(width, recipe.group_size, symmetric=False) for width in wanted.salience]
                dtype = plan.weights[name].dtype
                self.errors[name] = [rounding_error(weight, grid, dtype).to(torch.bfloat16) for grid in grids]
                self.salience[name] = torch.zeros(len(grids), weight.shape[0])

    def add(self, name: str, gradient: Tensor) -> None:
        """Takes one sample's gradient, as the module stores its weight."""
        if name not in self.plan.weights:
            return
        if self.outliers:
            self.statistics[name] = gwq.accumulate(self.statistics.get(name), gradient, self.recipe.outlier_ranking)
        for i, error in enumerate(self.errors.get(name, ())):
            rows = as_rows(self.skeleton.module(name), gradient)
            self.salience[name][i] += mixllm.sample_salience(rows, error).cpu()


class _Moments:
    """Input second moments per fusion group and squared output gradients per row, summed over the samples."""

    def __init__(self, groups: list[FusionGroup], plan: Plan) -> None:
        self.groups, self.plan = groups, plan
        self.leaders = {group.names[0]: i for i, group in enumerate(groups)}
        self.xtx: dict[int, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.tokens: dict[int, int] = {}
        self.labels = 0

    def watching(self, labels: int) -> _Moments:
        """Prepares for a sample whose mean loss is over this many labels."""
        self.sample_labels = labels
        self.labels += labels
        return self

    def __call__(self, name: str, x: Tensor, gradient: Tensor) -> None:
        group = self.leaders.get(name)
        if group is not None:
            x = x.reshape(-1, x.shape[-1])
            if group not in self.xtx:
                self.xtx[group] = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
            self.xtx[group].addmm_(x.T, x)
            self.tokens[group] = self.tokens.get(group, 0) + len(x)
        if name in self.plan.weights:
            # of the summed loss, not of the mean one
            square = (gradient.reshape(-1, gradient.shape[-1]) * self.sample_labels).square_().sum(dim=0)
            self.squares[name] = self.squares[name].add_(square) if name in self.squares else square

    def price(self, skeleton: Skeleton, plan: Plan, recipe: Recipe, wanted: Wanted, found: _Found) -> None:
        """Prices the planned linears group by group; uses up the moments."""
        assert recipe.quantizer is not None
        found.labels = self.labels
        for i, group in enumerate(self.groups):
            if i not in self.xtx:
                continue  # no sample reached it
            curvature = factorize(self.xtx.pop(i).div_(self.tokens[i]))
            for name in group.names:
                if name not in plan.weights or name not in self.squares:
                    continue
                module = skeleton.linear(name)
                weight = as_rows(module, module.weight.detach())
                gradient, dtype = self.squares[name] / self.labels, plan.weights[name].dtype
                found.row_gradient[name] = gradient.cpu()
                if wanted.steps:
                    found.steps[name] = coded_points(weight, shrunk_gradient(gradient, self.labels), curvature)
                given = weight, gradient, curvature, wanted.options, recipe.quantizer, dtype, bool(recipe.search)
                if wanted.options:
                    found.costs[name] = price(*given)
                if wanted.rates:
                    found.rates[name] = packed_rates(weight, *given[2:])
                if wanted.ranks:
                    found.gains[name] = low_rank_gains(*given)


def rank_block(
    skeleton: Skeleton, index: int, statistics: Mapping[str, Tensor], plan: Plan, recipe: Recipe
) -> dict[str, gwq.Candidates]:
    """The outlier candidates of the planned linears of a resident block."""
    result = {}
    statistics = dict(statistics)
    for position, name in enumerate(skeleton.linears[index]):
        if name not in plan.weights:
            continue
        planned, module = plan.weights[name], skeleton.linear(name)
        weight, statistic = as_rows(module, module.weight.detach()), statistics.pop(name, None)
        if statistic is None and recipe.needs_outlier_gradients:
            continue  # a linear that no sample reached
        if statistic is not None:
            statistic = as_rows(module, statistic)
        error = None
        if recipe.outlier_ranking == "gradient-error":
            error = weight - rtn(weight, planned.grid, planned.dtype).dense()
        generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + index * 1009 + position) % (1 << 63))
        scores = gwq.score(weight, statistic, error, recipe.outlier_ranking, generator)
        count = gwq.candidate_count(planned.numel, recipe.outlier_fraction, recipe.outlier_scope)
        result[name] = gwq.best(scores, count)
    return result
