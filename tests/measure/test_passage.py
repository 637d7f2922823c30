"""The streams' passage through a block: pausing gives what running from the beginning for every group gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import ARCHITECTURES, kept_of_drift
from torch import Tensor, nn

from llmsqueeze.measure.moments import FusionGroup, Moments, Pulls, SecondMoments, fusion_groups, grouped
from llmsqueeze.measure.shrinkage import Chance
from llmsqueeze.measure.streams.additions import Additions
from llmsqueeze.measure.streams.passage import Paused, passage
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.measure.streams.restarted import Restarted
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton

CPU = torch.device("cpu")
Passed = tuple[list[tuple[tuple[str, ...], Moments]], list[Tensor]]


def passed(
    folder: Path,
    rows: list[Tensor],
    kind: str,
    streams: str,
    limit: int = 1 << 20,
    products: torch.dtype = torch.float32,
) -> Passed:
    """The groups and moments of the second block, whose weights change a little when their turn comes, and the streams
    behind it."""
    with Spill(limit) as spill:
        walk = Walk(build_skeleton(open_checkpoint(folder)), rows, spill, torch.float32, CPU, products)
        start = walk.embed()
        with walk.resident_block(0):
            inputs = walk.through(0, start)
            other = Activations(spill)
            for hidden in inputs.each(CPU):
                other.append(hidden * 1.01)
        given = {
            "both": ResidualStreams(inputs, other),
            "shared": ResidualStreams(inputs, inputs),
            "original": ResidualStreams(inputs, None),
            "compressed": ResidualStreams(None, other),
        }[streams]
        with walk.resident_block(1):
            names = walk.skeleton.linears[1][1:]  # one is not compressed
            original = {name: walk.skeleton.linear(name).weight.data for name in names}
            current = dict(original)
            through = passage(walk, 1, given, original, current)
            assert isinstance(through, Paused)
            if kind == "restarted":
                through = Restarted(walk, 1, given, original, current)
            groups = []
            for group, moments in through.groups():
                groups.append((tuple(group), moments))
                for name in group:
                    if name in current:
                        current[name] = current[name] * 0.9
            ahead = through.ahead()
            behind = [t for s in (ahead.original, ahead.compressed) if s is not None for t in s.each(CPU)]
        ahead.clear()
        given.clear()
        start.clear()
        inputs.clear()
        other.clear()
        assert spill.nbytes == 0, "all memory came back"
    return groups, behind


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("streams", ["both", "shared"])
def test_pausing_equals_restarting(
    architecture: str, streams: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    folder = random_model(architecture)
    paused, restarted = (passed(folder, rows, kind, streams) for kind in ("paused", "restarted"))
    assert same(paused, restarted)


@pytest.mark.parametrize(
    ("architecture", "of_stream"),
    [
        ("llama", {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}),
        ("granite", {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}),
        ("neox", {"attention.dense": "input_layernorm"}),
    ],
)
def test_what_adds_to_the_stream_makes_good_what_the_sum_has_lost(
    architecture: str, of_stream: dict[str, str], random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """Against hooks: a linear's output is added to what the norm before it gets; Granite halves it before."""
    factor, checked = 0.5 if architecture == "granite" else 1.0, 0
    with Spill() as spill:
        walk = Walk(build_skeleton(open_checkpoint(random_model(architecture))), rows, spill, torch.float32, CPU)
        start, other = walk.embed(), Activations(spill)
        for hidden in start.each(CPU):
            other.append(hidden * 1.1 + 0.1 * hidden.flip(-1))
        given = [list(start.each(CPU)), list(other.each(CPU))]
        block = walk.skeleton.blocks[0]
        with walk.resident_block(0):
            original = {name: walk.skeleton.linear(name).weight.data for name in walk.skeleton.linears[0]}
            current = dict(original)
            for group, moments in passage(walk, 0, ResidualStreams(start, other), original, current).groups():
                name = group[0].removeprefix(f"{block}.")
                if name in of_stream:
                    norm, weight = f"{block}.{of_stream[name]}", original[group[0]]
                    pairs = []
                    for of_original, of_compressed in zip(*given, strict=True):
                        x, r = inputs_of(walk, (group[0], norm), original, of_original)
                        y, s = inputs_of(walk, (group[0], norm), current, of_compressed)
                        pairs.append(((x - y) @ weight.T + (r - s) / factor, y))
                    expected = without_chance(pairs)
                    assert (moments.pulls[group[0]] - expected).norm() < 1e-3 * expected.norm()
                    checked += 1
                for changed in group:
                    current[changed] = current[changed] * 0.9
    assert checked == len(of_stream)


def test_one_of_several_results_behind_a_linear_did_not_stand_before_it() -> None:
    hidden, output = torch.randn(2, 4), torch.randn(2, 4)
    with Additions() as additions:
        additions.follow(output)
        later, _ = torch.randn(4, 4).chunk(2)
        _ = output + later + hidden
    assert additions.total is not None
    assert torch.equal(additions.total, hidden)


def inputs_of(walk: Walk, names: tuple[str, ...], weights: dict[str, Tensor], hidden: Tensor) -> list[Tensor]:
    """What modules of the first block get from the first sample's call [tokens, width]."""
    seen: dict[str, Tensor] = {}
    handles = [
        walk.skeleton.module(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0].flatten(0, -2)})
        )
        for name in names
    ]
    with walk.skeleton.using(weights), torch.no_grad():
        walk.run(0, 0, hidden)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def without_chance(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean of e y^T over tokens, less its share that is chance; one pair (e, y) for each sample."""
    chance = Chance(pairs[0][0].shape[1], torch.float32, CPU, diagonal=True)
    for lost, y in pairs:
        chance.add(lost, y)
    tokens = sum(len(y) for _, y in pairs)
    share = chance.share(torch.ones(pairs[0][0].shape[1]), tokens)
    return (1 - share) / tokens * sum((lost.T @ y for lost, y in pairs), torch.zeros(()))


@pytest.mark.parametrize("streams", ["original", "compressed"])
def test_pausing_with_one_stream(streams: str, random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    folder = random_model("llama")
    paused, restarted = (passed(folder, rows, kind, streams) for kind in ("paused", "restarted"))
    assert same(paused, restarted)
    assert all(moments.pulls == {} for _, moments in paused[0])


def test_both_passages_multiply_in_the_same_dtype(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    folder = random_model("llama")
    paused, restarted = (
        passed(folder, rows, kind, "both", products=torch.bfloat16) for kind in ("paused", "restarted")
    )
    exact = passed(folder, rows, "paused", "both")
    distance = [[float((a - b).norm()) for a, b in zip(one[1], paused[1], strict=True)] for one in (restarted, exact)]
    assert max(distance[0]) < 0.1 * min(distance[1]), "a norm that is computed again moves few roundings"


def test_what_lies_between_two_stops_may_lie_on_disk(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    folder = random_model("llama")
    assert same(passed(folder, rows, "paused", "both", limit=0), passed(folder, rows, "paused", "both"))


def test_samples_in_lanes_give_the_same(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    """Each lane has one thread, so everything is the same to the last digit."""
    folder, before, results = random_model("llama"), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(passed(folder, 3 * rows, "paused", "both", limit=20_000))
        finally:
            torch.set_num_threads(before)
    alone, lanes = results
    assert all(map(torch.equal, alone[1], lanes[1]))
    for (_, a), (_, b) in zip(alone[0], lanes[0], strict=True):
        assert torch.equal(a.xtx, b.xtx)
        assert all(torch.equal(a.pulls[name], b.pulls[name]) for name in a.pulls)


def same(one: Passed, other: Passed) -> bool:
    """Whether groups, moments and streams behind the block are the same within rounding."""
    names = [[group for group, _ in passed[0]] for passed in (one, other)]
    if names[0] != names[1] or len(one[1]) != len(other[1]):
        return False
    pairs = list(zip(one[1], other[1], strict=True))
    for (_, a), (_, b) in zip(one[0], other[0], strict=True):
        if a.pulls.keys() != b.pulls.keys():
            return False
        pairs += [(a.xtx, b.xtx), *((a.pulls[name], b.pulls[name]) for name in a.pulls)]
    return all((a - b).norm() <= 1e-4 * b.norm() for a, b in pairs)


def test_a_block_that_calls_a_linear_twice_is_run_from_its_beginning(
    random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """The second input of the linear lies behind the first."""
    with Spill() as spill:
        walk = Walk(build_skeleton(open_checkpoint(random_model("llama"))), rows, spill, torch.float32, CPU)
        inputs = walk.embed()
        mlp = walk.skeleton.module(walk.skeleton.blocks[0]).mlp
        assert isinstance(mlp, nn.Module)
        once = type(mlp).forward
        mlp.forward = lambda x: once(mlp, once(mlp, x))  # type: ignore[method-assign]
        with walk.resident_block(0):
            original = {name: walk.skeleton.linear(name).weight.data for name in walk.skeleton.linears[0]}
            through = passage(walk, 0, ResidualStreams(inputs, inputs), original, original)
            assert isinstance(through, Restarted)
            groups = fusion_groups(walk, 0, inputs.get(0, CPU))
            assert [group.calls for group in groups] == [1, 1, 2, 2]
            assert [names for names, _ in through.groups()] == [group.names for group in groups]


@pytest.mark.parametrize("cols", [1, 3, 4, 7, 64])
def test_second_moments_are_the_sum_of_products(cols: int, generator: torch.Generator) -> None:
    samples = [torch.randn(5, cols, generator=generator) for _ in range(3)]
    moments = SecondMoments(cols, torch.float32, CPU)
    for y in samples:
        moments.add(y)
    every = torch.cat(samples)
    mean = moments.mean()
    assert torch.allclose(mean, every.T @ every / 15, atol=1e-6)
    assert torch.equal(mean, mean.T)


@pytest.mark.parametrize("rows", [(3, 2), (9, 8), (40,)], ids=["few", "many", "more"])
def test_pulls_are_what_the_weights_make_of_the_drift(rows: tuple[int, ...], generator: torch.Generator) -> None:
    """Few rows are added up as they are, many by way of the drift; with outputs that are known, or not."""
    weights = {str(n): torch.randn(n, 16, generator=generator) for n in rows}
    pulls, samples = Pulls(weights), [torch.randn(2, 7, 16, generator=generator) for _ in range(3)]
    for x, y in samples:
        pulls.add(x, y, {"3": x @ weights["3"].T} if "3" in weights else {})
    xtx = sum(y.T @ y for _, y in samples) / 21
    drift = kept_of_drift([(x, y) for x, y in samples]) * sum((x - y).T @ y for x, y in samples) / 21
    for name, pull in pulls.mean(21, xtx).items():
        assert torch.allclose(pull, weights[name] @ drift, atol=1e-5)


def test_a_small_drift_of_inputs_with_a_spike_is_not_lost(generator: torch.Generator) -> None:
    """What is added up is the drift and the second moments; these are taken off, and leave nearly all its digits."""
    weight, tokens = torch.randn(8, 64, generator=generator) / 8, 512
    sizes = torch.ones(64)
    sizes[5] = 1000
    pulls, exact, pairs = Pulls({"down": weight}), torch.zeros(8, 64, dtype=torch.float64), []
    moments = SecondMoments(64, torch.float32, CPU)
    for _ in range(8):
        x, noise = torch.randn(2, tokens, 64, generator=generator) * sizes
        y = x + 0.01 * noise - 0.01 * x
        pulls.add(x, y)
        moments.add(y)
        pairs.append((x, y))
        exact += weight.double() @ (x - y).double().T @ y.double() / (8 * tokens)
    pull = pulls.mean(8 * tokens, moments.mean())["down"]
    exact *= kept_of_drift(pairs)
    others = [j for j in range(64) if j != 5]
    error, size = (pull - exact)[:, others].norm(), exact[:, others].norm()
    assert error < 1e-3 * size


def test_linears_with_one_input_are_a_group() -> None:
    x, y, z = object(), object(), object()
    calls = [("q", x), ("k", x), ("o", y), ("twice", y), ("twice", z), ("v", x)]
    assert grouped(calls) == [FusionGroup(("q", "k", "v"), 1), FusionGroup(("o",), 1), FusionGroup(("twice",), 2)]
