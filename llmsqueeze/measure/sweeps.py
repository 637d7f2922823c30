"""Measuring the original model by one forward and one backward sweep of the block walk.

The backward sweep reduces the gradients of the block that is resident (block.py); no gradient of a whole model ever
exists. A request that needs no gradients (LIM, ZD, rankings without data) is measured with less. A journal has every
block's outputs until the backward sweep has used them, and the gradients and measurements of the blocks behind.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.journal import NO_JOURNAL, Journal, restoring
from llmsqueeze.measure.block import Linears, priced, reduce_block, reduce_weights
from llmsqueeze.measure.costs import coded_points
from llmsqueeze.measure.ends import Ends
from llmsqueeze.measure.importance import similarity
from llmsqueeze.measure.moments import fusion_groups
from llmsqueeze.measure.outer import OuterInputs
from llmsqueeze.measure.profile import Profile, joined, load, save
from llmsqueeze.measure.request import Request
from llmsqueeze.model.blockwise.activations import Activations
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.linears import as_rows
from llmsqueeze.progress import Progress
from llmsqueeze.progress.stopwatch import timed
from llmsqueeze.quantizers.coded import shrunk_gradient
from llmsqueeze.quantizers.curvature import factorize

TOKENS = 32  # of a sample that shows the fusion groups


def measure(
    walk: Walk,
    first_inputs: Activations,
    linears: Linears,
    request: Request,
    progress: Progress,
    journal: Journal = NO_JOURNAL,
) -> Profile:
    """The profile of `linears`. `first_inputs`: the first block's, for every sample; none if the request needs no
    text."""
    walk.on_sample = progress.sample
    if request.gradients:
        return gradient_sweeps(walk, first_inputs, linears, request, progress, journal)
    profiles = []
    if request.lim:
        profiles.append(forward_profile(walk, first_inputs, progress, journal))
    elif request.groups:
        profiles.append(groups_profile(walk, request.seed, progress))
    if request.zd or request.outliers is not None:
        blocks = range(len(walk.skeleton.blocks))
        for index in progress.over(blocks, "weights", len(blocks)):
            with walk.resident_block(index, then=index + 1):
                profiles.append(reduce_weights(walk.skeleton, index, linears, request))
    return joined(profiles)


def gradient_sweeps(
    walk: Walk,
    first_inputs: Activations,
    linears: Linears,
    request: Request,
    progress: Progress,
    journal: Journal = NO_JOURNAL,
) -> Profile:
    """The profile of a request that needs gradients."""
    inputs, lim = forward_sweep(walk, first_inputs, progress, journal)
    ends = Ends(walk) if request.ends else None
    outer = OuterInputs(walk, [name for name in walk.skeleton.outer if name in linears]) if request.prices else None
    if outer is not None and outer.names:
        journal = NO_JOURNAL  # of what they see in each block the journal has nothing
    loss, gradients = head_sweep(walk, inputs.pop(), request, progress, ends, outer, journal)
    blocks: list[Profile] = []
    progress.stage("gradients", len(walk.skeleton.blocks))
    for index in reversed(range(len(walk.skeleton.blocks))):
        if (measured := noted_block(walk, index, gradients, journal)) is None:
            with walk.resident_block(index, then=index - 1):
                measured = reduce_block(walk, index, inputs[index], gradients, linears, request, outer)
            if index:  # the first block's inputs belong to the caller
                inputs[index].clear()
            note_block(walk, index, measured, gradients, journal)
        blocks.append(measured)
        progress.advance()
    around = price_ends(ends, gradients) if ends is not None else Profile()
    if outer is not None and outer.names:
        around = joined([price_outer(outer, gradients, linears, request), around])
    profile = joined([*reversed(blocks), around])
    gradients.clear()
    return replace(
        profile,
        loss=loss,
        labels=walk.labels if request.prices else 0,
        options=request.options,
        salience_widths=request.salience_widths,
        lim=tuple(lim) if request.lim else (),
    )


def noted_block(walk: Walk, index: int, gradients: Activations, journal: Journal) -> Profile | None:
    """The measurements of a block that the journal has, with the gradients at its input in `gradients`, if they are
    the last; None if it does not have them."""
    step = f"backward-{index}"
    if journal.value(step) is None:
        return None
    with restoring(journal.folder):
        if journal.holds(step):
            gradients.take(stored(walk, step, journal))
        return load(journal.file(f"{step}.profile"))


def note_block(walk: Walk, index: int, measured: Profile, gradients: Activations, journal: Journal) -> None:
    """Notes the measurements of a block, and the gradients at its input."""
    if not journal.active:
        return
    step, last = f"backward-{index}", index == len(walk.skeleton.blocks) - 1
    gradients.move_to(journal.file(step))
    save(measured, journal.file(f"{step}.profile"))
    without = ["head" if last else f"backward-{index + 1}", *([f"forward-{index - 1}"] if index else [])]
    journal.note(step, {}, [step, f"{step}.profile"], without)


def forward_sweep(
    walk: Walk, first_inputs: Activations, progress: Progress, journal: Journal = NO_JOURNAL
) -> tuple[list[Activations], list[float]]:
    """The input of every block, and the output of the last, for every sample; and every block's LIM.

    The journal may have them, but for those that are of no use any more: these are empty."""
    inputs, lim = [first_inputs], []
    for index in progress.over(range(len(walk.modules)), "forward", len(walk.modules)):
        step = f"forward-{index}"
        if (noted := journal.value(step)) is not None:
            with restoring(journal.folder):
                outputs, similar = stored(walk, step, journal), float(noted["similar"])
                walk.restore_layouts(index + 1, noted["layouts"])
        else:
            outputs, similar = forward_block(walk, index, inputs[-1])
            if journal.active:
                outputs.move_to(journal.file(step))
                journal.note(step, {"similar": similar, "layouts": walk.layouts(index + 1)}, [step])
        inputs.append(outputs)
        lim.append(-similar)
    return inputs, lim


def stored(walk: Walk, name: str, journal: Journal) -> Activations:
    """The activations that the journal has in a file; none if they are of no use any more."""
    if not journal.holds(name):
        return Activations(walk.spill)
    return Activations.stored(walk.spill, journal.file(name), len(walk.samples))


def forward_profile(
    walk: Walk, first_inputs: Activations, progress: Progress, journal: Journal = NO_JOURNAL
) -> Profile:
    """Every block's LIM and fusion groups, with the activations of one block at a time."""
    inputs, lim = first_inputs, []
    groups: list[tuple[str, ...]] = []
    for index in progress.over(range(len(walk.modules)), "forward", len(walk.modules)):
        step, before = f"forward-{index}", len(groups)
        if (noted := journal.value(step)) is not None:
            with restoring(journal.folder):
                outputs, similar = stored(walk, step, journal), float(noted["similar"])
                walk.restore_layouts(index + 1, noted["layouts"])
                groups += [tuple(names) for names in noted["groups"]]
        else:
            outputs, similar = forward_block(walk, index, inputs, groups)
            if journal.active:
                outputs.move_to(journal.file(step))
                value = {"similar": similar, "groups": groups[before:], "layouts": walk.layouts(index + 1)}
                journal.note(step, value, [step], [f"forward-{index - 1}"] if index else [])
        lim.append(-similar)
        if inputs is not first_inputs:
            inputs.clear()
        inputs = outputs
    inputs.clear()
    return Profile(lim=tuple(lim), groups=tuple(groups))


def groups_profile(walk: Walk, seed: int, progress: Progress) -> Profile:
    """The fusion groups alone, from the first sample or, without text, from random tokens; none if the model cannot be
    walked."""
    vocabulary, _ = walk.skeleton.embedding_shape
    row = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    short = Walk(walk.skeleton, walk.samples[:1] or [row], walk.spill, walk.dtype, walk.device)
    try:
        return Profile(groups=forward_profile(short, short.embed(), progress).groups)
    except UnsupportedError:
        return Profile()


@timed("forward")
def forward_block(
    walk: Walk, index: int, inputs: Activations, groups: list[tuple[str, ...]] | None = None
) -> tuple[Activations, float]:
    """Block `index` on every sample: its outputs, and their mean cosine with the inputs. Adds its fusion groups to
    `groups`."""
    outputs = Activations(walk.spill)
    similar: list[float] = []
    with walk.resident_block(index, then=index + 1), torch.no_grad():
        if groups is not None:
            groups += [group.names for group in fusion_groups(walk, index, inputs.get(0, walk.device))]
        for sample, hidden in enumerate(inputs.each(walk.device)):
            output = walk.run(index, sample, hidden)
            before, behind = walk.hidden_in(index, sample, hidden), walk.hidden_in(index + 1, sample, output)
            similar.append(similarity(before, behind))
            outputs.append(output)
            walk.on_sample(sample + 1, len(walk.samples))
    return outputs, sum(walk.of_all(similar)) / walk.count


def head_sweep(
    walk: Walk,
    outputs: Activations,
    request: Request,
    progress: Progress,
    ends: Ends | None = None,
    outer: OuterInputs | None = None,
    journal: Journal = NO_JOURNAL,
) -> tuple[float, Activations]:
    """Mean loss over the samples, and per sample the gradient of its loss at the last block's output; `ends` sees the
    head's inputs and probabilities, for which the sweep is done again if the journal has its result, and `outer` the
    linears before it.

    The loss behind the gradient is that on the text, or on labels that the model draws by the request's seed.
    """
    if (noted := journal.value("head")) is not None and ends is None:
        with restoring(journal.folder):
            return float(noted["loss"]), stored(walk, "head", journal)
    gradients = Activations(walk.spill)
    losses = []
    draws = drawn_labels(walk, request)
    with walk.head.resident():
        pairs = zip(outputs.each(walk.device), walk.samples, strict=True)
        for sample, (hidden, tokens) in enumerate(progress.over(pairs, "loss", len(walk.samples))):
            with nullcontext() if outer is None else outer.priced(sample):
                on_head = None if ends is None else ends.see_head
                loss, gradient = walk.head.gradient(hidden, tokens, draws[sample], on_head)
            losses.append(loss)
            gradients.append(gradient)
            for sums in (ends, outer):
                if sums is not None:
                    sums.seen(sample)
    outputs.clear()
    loss = sum(walk.of_all(losses)) / walk.count
    if journal.active and noted is None:
        gradients.move_to(journal.file("head"))
        last = f"forward-{len(walk.modules) - 1}"
        journal.note("head", {"loss": loss}, ["head"], [last] if ends is None else [])
    return loss, gradients


def drawn_labels(walk: Walk, request: Request) -> list[Tensor | None]:
    """What labels are drawn with [labels], for each sample: a number between 0 and 1 each; None if they are the text's.
    They are those of all samples, drawn one after the other."""
    if request.labels != "model":
        return [None] * len(walk.samples)
    generator, lengths = torch.Generator().manual_seed(request.seed), walk.of_all([s.shape[1] for s in walk.samples])
    draws = [torch.rand(length - 1, generator=generator) for length in lengths]
    return [draws[number] for number in walk.shares.numbers]


def price_ends(ends: Ends, gradients: Activations) -> Profile:
    """Embeddings and head, from the gradients at the first block's input and what `ends` has seen of the head."""
    with ends.walk.resident_outside():
        for sample, gradient in enumerate(gradients.each(ends.device)):
            ends.see_embeddings(sample, gradient)
            ends.seen(sample)
    profiles = []
    for name, (xtx, row_gradient) in ends.moments().items():
        moments = xtx.cpu().clone()
        points = coded_points(ends.weight(name), shrunk_gradient(row_gradient, ends.labels), factorize(xtx))
        profiles.append(
            Profile(moments={name: moments}, row_gradient={name: row_gradient.cpu()}, curves={name: points})
        )
    return joined(profiles)


def price_outer(outer: OuterInputs, gradients: Activations, linears: Linears, request: Request) -> Profile:
    """The outer linears, from what `outer` has seen of the blocks and of what is behind them, and from the gradients at
    the first block's input."""
    walk = outer.walk
    with walk.resident_outside():
        for sample, gradient in enumerate(gradients.each(walk.device)):
            with outer.priced(sample):
                walk.embedding_gradient(sample, gradient)
            outer.seen(sample)
    profiles = []
    for name, moments in outer.moments().items():
        squares = outer.squares(name)
        if squares is not None:
            stored = walk.skeleton.read(f"{name}.weight").to(walk.device).float()
            weight = as_rows(walk.skeleton.module(name), stored)
            about = walk.labels, factorize(moments.xtx), linears[name], request
            profiles.append(priced(name, weight, squares / walk.labels, *about))
    return joined(profiles)
