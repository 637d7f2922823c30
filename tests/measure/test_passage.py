"""The streams' passage through a block: pausing gives what running from the beginning for every group gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import configs, kept_of_drift
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmsqueeze.measure.moments import FusionGroup, Moments, Pulls, SecondMoments, fusion_groups, grouped
from llmsqueeze.measure.shrinkage import Chance
from llmsqueeze.measure.streams.passage import Paused, passage
from llmsqueeze.measure.streams.residual import ResidualStreams
from llmsqueeze.measure.streams.restarted import Restarted
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.trace import BlockTrace
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import as_rows
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


@pytest.fixture
def without_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that runs from its beginning cannot tell what a linear's output will be added to."""
    monkeypatch.setattr(BlockTrace, "added_to", lambda _trace, _name: ([], 1.0))


@pytest.mark.usefixtures("without_additions")
@pytest.mark.parametrize("architecture", list(configs()))
@pytest.mark.parametrize("streams", ["both", "shared"])
def test_pausing_equals_restarting(
    architecture: str, streams: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    folder = random_model(architecture)
    paused, restarted = (passed(folder, rows, kind, streams) for kind in ("paused", "restarted"))
    assert same(paused, restarted)


class Additions(TorchFunctionMode):
    """Follows the output of a linear through a block's forward: what it is added to, of what there was before it, and
    the factor before that."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.before: list[Tensor] = []
        self.added_to: list[Tensor] = []
        self.factor, self.input = 1.0, torch.empty(0)
        self._now: Tensor | None = None
        linear.register_forward_hook(self._called)

    def _called(self, _module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.input, self._now = args[0], output

    def __torch_function__(self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, now = getattr(func, "__name__", ""), self._now
        if now is None:
            self.before.extend(value for value in (*args, result) if isinstance(value, Tensor))
        elif any(value is now for value in args):
            others = [value for value in args if value is not now]
            if name in ("add", "__add__", "__radd__"):
                self.added_to += [value for value in others if any(value is known for known in self.before)]
                self._now = result
            elif name in ("mul", "__mul__", "__rmul__") and isinstance(others[0], float):
                self.factor, self._now = self.factor * others[0], result
        return result


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "opt", "neox", "granite"])
def test_what_is_added_makes_good_what_its_sum_has_lost(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """Against the block's own forward, in which the additions are followed as they happen."""
    folder, checked = random_model(architecture), 0
    with Spill() as spill:
        walk = Walk(build_skeleton(open_checkpoint(folder)), rows, spill, torch.float32, CPU)
        start, other = walk.embed(), Activations(spill)
        for hidden in start.each(CPU):
            other.append(hidden * 1.1 + 0.1 * hidden.flip(-1))
        given = [list(start.each(CPU)), list(other.each(CPU))]
        with walk.resident_block(0):
            original = {name: walk.skeleton.linear(name).weight.data for name in walk.skeleton.linears[0]}
            current = dict(original)
            for group, moments in passage(walk, 0, ResidualStreams(start, other), original, current).groups():
                for name in group:
                    seen = [
                        [followed(walk, name, weights, stream, sample) for sample, stream in enumerate(inputs)]
                        for weights, inputs in zip((original, current), given, strict=True)
                    ]
                    if seen[0][0].added_to:
                        expected = without_chance(as_rows(walk.skeleton.module(name), original[name]), seen)
                        assert torch.allclose(moments.pulls[name], expected, rtol=1e-3, atol=1e-4)
                        checked += 1
                for name in group:
                    current[name] = current[name] * 0.9
    assert checked == 2


def followed(walk: Walk, name: str, weights: dict[str, Tensor], hidden: Tensor, sample: int) -> Additions:
    """The additions behind a linear of the first block."""
    with walk.skeleton.using(weights), torch.no_grad(), Additions(walk.skeleton.module(name)) as additions:
        walk.run(0, sample, hidden)
    walk.skeleton.module(name)._forward_hooks.clear()
    return additions


def without_chance(weight: Tensor, seen: list[list[Additions]]) -> Tensor:
    """The mean of e y^T with e = W (x - y) + r - s, less its share that is chance; one term for each sample."""
    total, tokens, chance = torch.zeros_like(weight), 0, Chance(len(weight), weight.dtype, CPU, diagonal=True)
    for of_original, of_compressed in zip(*seen, strict=True):
        x, y = (one.input.reshape(-1, weight.shape[1]) for one in (of_original, of_compressed))
        apart = sum(r - s for r, s in zip(of_original.added_to, of_compressed.added_to, strict=True))
        lost = (x - y) @ weight.T + apart.reshape(len(y), -1) / of_original.factor
        total, tokens = total + lost.T @ y, tokens + len(y)
        chance.add(lost, y)
    return total / tokens * (1 - chance.share(torch.ones(len(weight)), tokens))


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
    pairs = [(a, b, 1e-5, 1e-5) for a, b in zip(one[1], other[1], strict=True)]
    for (_, a), (_, b) in zip(one[0], other[0], strict=True):
        if a.pulls.keys() != b.pulls.keys():
            return False
        pairs += [(a.xtx, b.xtx, 1e-4, 1e-6), *((a.pulls[name], b.pulls[name], 1e-3, 1e-5) for name in a.pulls)]
    return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b, rtol, atol in pairs)


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
