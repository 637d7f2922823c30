"""The block loop: every block is compressed and written in turn.

Two residual streams run along, the original model's and the compressed model's. Inside a block the fusion groups are
compressed in the order they are called, and each sees the inputs behind the groups that were compressed before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.allocation.plan import Plan
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.weights.group import Compressed, compress_group, compressed_nbytes, final_plan
from llmsqueeze.compress.weights.kept import KeptParts
from llmsqueeze.compress.weights.pace import Pace
from llmsqueeze.compress.weights.resume import START, Resumed, note, numbers_of, step_of
from llmsqueeze.compress.weights.weight import WeightSettings, group_targets
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.folder import Output
from llmsqueeze.formats.verify import Witness
from llmsqueeze.measure.moments import Moments
from llmsqueeze.measure.streams.passage import Passage, passage
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.memory import give_back
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.experts.linear import Weight, real
from llmsqueeze.model.linears import as_rows
from llmsqueeze.model.skeleton import Skeleton
from llmsqueeze.model.tensors.shard import Stored
from llmsqueeze.parts import Part
from llmsqueeze.progress import Progress
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.recipe.recipe import Recipe

NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Run:
    """A decision that is carried out on a walk. pace: keeps coded weights within their bytes."""

    walk: Walk
    decision: Decision
    recipe: Recipe
    progress: Progress
    pace: Pace | None

    @classmethod
    def of(cls, walk: Walk, decision: Decision, recipe: Recipe, progress: Progress) -> Run:
        coding = decision.coding
        walk.on_sample = progress.sample
        pace = Pace(decision.plan, coding.curves, coding.target) if coding is not None else None
        return cls(walk, decision, recipe, progress, pace)

    def compress(
        self, group: Mapping[str, Tensor], targets: Mapping[str, Tensor], curvature: Curvature | None
    ) -> dict[str, Compressed]:
        """The linears of a fusion group, weights and targets [rows, cols], at the run's pace."""
        settings = WeightSettings.of(self.recipe)
        compress_at = partial(compress_group, group, targets, curvature, self.decision, settings)
        if self.pace is None:
            compressed = compress_at(0.0)
        else:
            compressed = self.pace.within_budget(list(targets), compress_at, compressed_nbytes)
        for name, one in compressed.items():
            bits = parts.nbytes(one.parts) * 8 / self.decision.plan.weights[name].numel
            self.progress.weight(name, bits, one.error)
        return compressed


@dataclass(frozen=True)
class Result:
    """The plan after compression, and by kind the numbers of each weight: its relative output error; of coded ones the
    sensitivity; the share of the moments of its inputs that was chance, where they were measured; of experts, how many
    tokens were sent to them."""

    plan: Plan
    numbers: Mapping[str, Mapping[str, float]]

    @property
    def by_weight(self) -> dict[str, Mapping[str, float]]:
        """For the record: kind of number -> weight -> number."""
        kinds = {"errors": "error", "sensitivities": "sensitivity", "chances": "chance", "tokens": "tokens"}
        return {
            plural: self.numbers[kind] for plural, kind in kinds.items() if self.numbers[kind] or plural == "errors"
        }


def needed_streams(
    walk: Walk, inputs: Activations | None, recipe: Recipe, new_embeddings: bool = False
) -> ResidualStreams:
    """The residual streams that the recipe's moments come from; a stream that nobody needs is released.

    `new_embeddings`: the compressed model's stream begins with embeddings of its own. If what is compressed before the
    blocks cuts the text otherwise than the original, nothing can be compared, and the compressed model's is left.
    """
    if inputs is not None and not recipe.needs_moments:
        inputs.clear()
        inputs = None
    original = inputs if recipe.inputs in ("original", "corrected") else None
    compressed = inputs if recipe.inputs in ("sequential", "corrected") else None
    if new_embeddings and compressed is not None:
        if original is None:
            compressed.clear()
        compressed = walk.embed()
        if original is not None and not same_shapes(walk, original, compressed):
            original.clear()
            original = None
    return ResidualStreams(original, compressed)


def same_shapes(walk: Walk, one: Activations, other: Activations) -> bool:
    """Whether the activations of every sample have one shape in both."""
    pairs = zip(one.each(walk.device), other.each(walk.device), strict=True)
    return all(walk.of_all([first.shape == second.shape for first, second in pairs]))


def compress_blocks(
    run: Run, output: Output, witness: Witness | None, before: Resumed, count: int | None = None
) -> Result:
    """Compresses and writes every block in turn, or the first `count`; `witness` sees each compressed block, and the
    journal of the output gets it. before: what was done before."""
    skeleton, plan = run.walk.skeleton, run.decision.plan
    streams, tally = before.streams, before.tally
    indices = range(len(skeleton.blocks))[before.blocks : count]
    for index in run.progress.over(indices, "compress", len(indices)):
        compressed, streams = compress_block(run, index, streams, witness)
        output.write_shard(block_shard(skeleton, index, plan, compressed))
        step, last = step_of(index), step_of(index - 1) if index else START
        note(output, run.walk, step, last, [output.last_shard], plan, compressed, run.pace, witness, streams)
        for name, one in compressed.items():
            tally.add(plan.weights[name], final_plan(plan.weights[name], one.parts), numbers_of(one))
    return Result(plan.having(tally.plans), tally.numbers)


def compress_block(
    run: Run, index: int, streams: ResidualStreams, witness: Witness | None
) -> tuple[dict[str, Compressed], ResidualStreams]:
    """One block's linears, and the streams behind it; the streams before it are released."""
    skeleton, ahead = run.walk.skeleton, ResidualStreams()
    with run.walk.resident_block(index, then=index + 1):
        names = [name for name in skeleton.linears[index] if name in run.decision.plan.weights]
        original = {name: skeleton.weight(name) for name in names}
        current = dict(original)
        through = passage(run.walk, index, streams, original, current, run.recipe.all_experts)
        compressed = compress_groups(run, index, through, original, current)
        if witness is not None:
            witness.see(index, current)
        give_back()
        if index + 1 < len(skeleton.blocks):
            ahead = through.ahead()
    streams.clear()
    return compressed, ahead


def block_shard(skeleton: Skeleton, index: int, plan: Plan, compressed: Mapping[str, Compressed]) -> dict[str, Stored]:
    """A block's tensors as the file has them."""
    shard: dict[str, Stored] = {}
    for name, one in compressed.items():
        weight_parts = one.parts.later if isinstance(one.parts, KeptParts) else one.parts
        shard |= (compressed_tensors if plan.portable else native).stored_tensors(name, weight_parts)
    kept = set(skeleton.names_in(skeleton.blocks[index])) - {f"{name}.weight" for name in compressed}
    return shard | {name: skeleton.read_stored(name) for name in sorted(kept)}


def compress_groups(
    run: Run, index: int, through: Passage, original: Mapping[str, Weight], current: dict[str, Weight]
) -> dict[str, Compressed]:
    """The parts of a resident block's linears, fusion group by fusion group; `current` becomes their weights: of
    linears that read their weight at every use, what puts it together from its parts.

    `original` and `current` hold the weights as the modules store them.
    """
    skeleton = run.walk.skeleton
    result: dict[str, Compressed] = {}
    experts = skeleton.experts_in(index)
    for names, moments in group_moments(run, index, through):
        group = {name: as_rows(skeleton.module(name), real(original[name])) for name in names if name in original}
        give_back()
        chance = None if moments is None else moments.chance
        sent = moments.tokens if moments is not None else 0 if run.recipe.needs_moments else None
        targets, curvature = group_targets(group, moments)
        for name, one in run.compress(group, targets, curvature).items():
            if isinstance(original[name], Tensor):
                current[name] = as_rows(skeleton.module(name), one.dense).contiguous()
            else:
                one = one._replace(parts=KeptParts((one.dense.shape[0], one.dense.shape[1]), one.parts, run.walk.spill))
                current[name] = partial(dense_of, one.parts, run.walk.device)
            tokens = sent if name in experts and not skeleton.of_heads(name) else None
            result[name] = one._replace(dense=NOTHING, chance=chance, tokens=tokens)
        give_back()
    return result


def dense_of(weight_parts: Sequence[Part], device: torch.device) -> Tensor:
    """The weight [rows, cols] of these parts, in float32."""
    return parts.sum_of_parts([parts.decoded(part) for part in weight_parts]).to(device)


def group_moments(run: Run, index: int, through: Passage) -> Iterator[tuple[Sequence[str], Moments | None]]:
    """The resident block's fusion groups with the moments of their inputs, each observed when its turn comes.

    Linears that no sample reaches come last, with no moments; those of experts one by one, for they can be many.
    """
    reached: set[str] = set()
    if run.recipe.needs_moments:
        for names, moments in through.groups():
            reached |= set(names)
            yield names, moments
    experts = run.walk.skeleton.experts_in(index)
    left = [name for name in run.walk.skeleton.linears[index] if name not in reached]
    yield [name for name in left if name not in experts], None
    for name in left:
        if name in experts:
            yield [name], None
