"""Measuring the original model: which weights matter, by one forward and one backward sweep of the block walk.

Per block, each linear's weight gradients are reduced sample by sample while the block is resident; what survives is
the order of the top candidates per matrix. No gradient of a whole model, or even of a whole block, ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmsqueeze.activations import Activations
from llmsqueeze.allocate import gwq
from llmsqueeze.blocks import Walk
from llmsqueeze.plan import Plan
from llmsqueeze.progress import Progress
from llmsqueeze.quantize.rtn import rtn
from llmsqueeze.recipe import Recipe
from llmsqueeze.skeleton import Skeleton, is_transposed


@dataclass(frozen=True)
class Profile:
    """Per linear its outlier candidates, best first; `loss`: mean next-token loss (nats) of the original model."""

    candidates: dict[str, gwq.Candidates]
    loss: float | None

    def trimmed(self, plan: Plan) -> Profile:
        """Only what the plan takes, so that little is held while blocks are compressed."""
        taken = {name: gwq.first(found, plan.weights[name].outliers) for name, found in self.candidates.items()}
        return Profile(taken, self.loss)


def measure(walk: Walk, first_inputs: Activations, plan: Plan, recipe: Recipe, progress: Progress) -> Profile:
    """Ranks the weights of every planned linear by the recipe's gradient ranking; labels are the text itself."""
    inputs = forward_sweep(walk, first_inputs, progress)
    loss, gradients = head_sweep(walk, inputs.pop(), progress)
    blocks = walk.skeleton.blocks
    candidates: dict[str, gwq.Candidates] = {}
    progress.stage("gradients", len(blocks))
    for index in reversed(range(len(blocks))):
        statistics: dict[str, Tensor] = {}

        def reduce(name: str, gradient: Tensor, statistics: dict[str, Tensor] = statistics) -> None:
            if name in plan.weights:
                statistics[name] = gwq.accumulate(statistics.get(name), gradient, recipe.outlier_ranking)

        with walk.resident_block(index):
            for sample in range(len(walk.samples)):
                hidden = inputs[index].get(sample, walk.device)
                upstream = gradients.get(sample, walk.device)
                gradients.replace(sample, walk.block_gradient(index, sample, hidden, upstream, reduce))
            candidates |= rank_block(walk.skeleton, index, statistics, plan, recipe)
        if index:  # the first block's inputs belong to the caller
            inputs[index].clear()
        progress.advance()
    gradients.clear()
    return Profile(candidates, loss)


def rank_without_data(skeleton: Skeleton, plan: Plan, recipe: Recipe, device: torch.device) -> Profile:
    """The profile for rankings that need no gradient: magnitude and random."""
    candidates: dict[str, gwq.Candidates] = {}
    for index, block in enumerate(skeleton.blocks):
        with skeleton.resident(skeleton.names_in(block), torch.float32, device):
            candidates |= rank_block(skeleton, index, {}, plan, recipe)
    return Profile(candidates, None)


def forward_sweep(walk: Walk, first_inputs: Activations, progress: Progress) -> list[Activations]:
    """The input of every block, and the output of the last, for every sample."""
    inputs = [first_inputs]
    for index in progress.over(range(len(walk.modules)), "forward", len(walk.modules)):
        outputs = Activations(walk.spill)
        with walk.resident_block(index), torch.no_grad():
            for sample, hidden in enumerate(inputs[-1].each(walk.device)):
                outputs.append(walk.run(index, sample, hidden))
        inputs.append(outputs)
    return inputs


def head_sweep(walk: Walk, outputs: Activations, progress: Progress) -> tuple[float, Activations]:
    """Mean loss over the samples, and per sample the gradient of its loss at the last block's output."""
    gradients = Activations(walk.spill)
    losses = []
    with walk.resident_head():
        pairs = zip(outputs.each(walk.device), walk.samples, strict=True)
        for hidden, tokens in progress.over(pairs, "loss", len(walk.samples)):
            loss, gradient = walk.head_gradient(hidden, tokens)
            losses.append(loss)
            gradients.append(gradient)
    outputs.clear()
    return sum(losses) / len(losses), gradients


def rank_block(
    skeleton: Skeleton, index: int, statistics: dict[str, Tensor], plan: Plan, recipe: Recipe
) -> dict[str, gwq.Candidates]:
    """The outlier candidates of the planned linears of a resident block; uses up `statistics`."""
    result = {}
    for position, name in enumerate(skeleton.linears[index]):
        if name not in plan.weights:
            continue
        planned = plan.weights[name]
        module = skeleton.linear(name)
        weight, statistic = module.weight.detach(), statistics.pop(name, None)
        if is_transposed(module):
            weight, statistic = weight.T, None if statistic is None else statistic.T
        if statistic is None and recipe.needs_gradients:
            continue  # a linear that no sample reached
        error = None
        if recipe.outlier_ranking == "gradient-error":
            error = weight - rtn(weight, planned.grid, planned.dtype).dense()
        generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + index * 1009 + position) % (1 << 63))
        scores = gwq.score(weight, statistic, error, recipe.outlier_ranking, generator)
        count = gwq.candidate_count(planned.numel, recipe.outlier_fraction, recipe.outlier_scope)
        result[name] = gwq.best(scores, count)
    return result
