"""A block's forward as a list of operations: it computes what the block computes, whole or in pieces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import ARCHITECTURES
from torch import Tensor, nn

from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.recorder import BlockCall
from llmsqueeze.model.blockwise.trace import BlockTrace, given_tensors, trace_block
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.skeleton import build_skeleton

NO_ARGUMENTS = BlockCall((), {})


@contextmanager
def walking(folder: Path, rows: list[Tensor]) -> Iterator[tuple[Walk, Activations]]:
    """A walk before its first block, which is resident."""
    with Spill() as spill:
        walk = Walk(build_skeleton(open_checkpoint(folder)), rows, spill, torch.float32, torch.device("cpu"))
        inputs = walk.embed()
        with walk.resident_block(0):
            yield walk, inputs


def trace_of(block: nn.Module, hidden: Tensor) -> BlockTrace | None:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return trace_block(block, linears, NO_ARGUMENTS, hidden)


class Block(nn.Module):
    """Two linears, and what a subclass does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        middle: Tensor = self.second(self.between(self.first(hidden)))
        return middle

    def between(self, x: Tensor) -> Tensor:
        return x


class InPlace(Block):
    def between(self, x: Tensor) -> Tensor:
        return x.add_(1.0).relu_()


class ByTheData(Block):
    def between(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class SizeByTheData(Block):
    def between(self, x: Tensor) -> Tensor:
        some = (x[0, :, 0] > 0).nonzero()[:, 0]
        return x.index_add(1, some, x[:, some])


class OtherUse(Block):
    def between(self, x: Tensor) -> Tensor:
        return x @ self.second.weight


class Remembers(Block):
    cached: Tensor | None = None

    def between(self, x: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = x * 2
            self.register_buffer("scale", x + 1)
        return x + self.cached


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_traced(architecture: str, random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    with walking(random_model(architecture), rows) as (walk, inputs):
        trace = walk.trace(0, inputs)
        assert trace is not None
        assert {name for name, _ in trace.calls} == set(walk.skeleton.linears[0])
        with torch.no_grad():
            for sample, hidden in enumerate(inputs.each(walk.device)):
                given = given_tensors(walk.call(0, sample))
                computed = trace.run(hidden, given, lambda name, x: walk.skeleton.module(name)(x))
                assert torch.allclose(computed, walk.run(0, sample, hidden), atol=1e-6)


ADDED_TO = {"llama": [1, 1], "opt": [1, 1], "gpt2": [1, 1], "neox": [1, 2], "gemma2": [], "granite": [1, 1]}


@pytest.mark.parametrize("architecture", list(ADDED_TO))
def test_what_a_linears_output_is_added_to(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """The stream, in the order of the calls; where branches run side by side the second is added to the first too, and
    behind a norm there is nothing. All of it stands when the linear's turn comes."""
    with walking(random_model(architecture), rows) as (walk, inputs):
        trace = walk.trace(0, inputs)
        assert trace is not None
        order = list(dict(trace.calls))
        found = {name: trace.added_to(name) for name in order}
        assert [len(values) for values, _ in found.values() if values] == ADDED_TO[architecture]
        factors = {factor for values, factor in found.values() if values}
        assert factors <= ({0.5} if architecture == "granite" else {1.0})
        for name, (values, _) in found.items():
            assert trace.cut([name])[0].leaves.issuperset(values)


@pytest.mark.parametrize("stops", [[0], [3], [0, 3, 4, 6], [1, 2], [0, 1, 2, 3, 4, 5, 6]])
def test_pieces_compute_what_the_whole_computes(
    stops: list[int], random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    with walking(random_model("llama"), rows) as (walk, inputs), torch.no_grad():
        trace = walk.trace(0, inputs)
        assert trace is not None
        order = [name for name, _ in trace.calls]
        hidden, given = inputs.get(0, walk.device), given_tensors(walk.call(0, 0))
        called: list[str] = []

        def linear(name: str, x: Tensor) -> Tensor:
            called.append(name)
            result: Tensor = walk.skeleton.module(name)(x)
            return result

        values = {trace.hidden: hidden}
        segments = trace.cut([order[stop] for stop in stops])
        for segment, stop in zip(segments, [*stops, len(order)], strict=True):
            assert set(values) == segment.needs
            result = segment.run(values, given, linear)
            assert called == order[:stop], "no linear runs early, late or twice"
        assert values == {}
        assert torch.equal(result, walk.run(0, 0, hidden))


def test_a_norm_is_computed_again_rather_than_kept(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    """Before the attention's and the feed-forward's first linear only the stream itself has to be kept."""
    with walking(random_model("llama"), rows) as (walk, inputs):
        trace = walk.trace(0, inputs)
        assert trace is not None
        order = [name for name, _ in trace.calls]
        first, attention, middle, feed_forward, down = trace.cut([order[stop] for stop in (0, 3, 4, 6)])
        assert first.needs == attention.needs == {trace.hidden}
        assert len(feed_forward.needs) == 1, "the stream behind the attention"
        assert feed_forward.result not in feed_forward.needs
        assert len(middle.needs) == len(down.needs) == 2, "the stream, and what the linear gets"


def test_pieces_are_code_that_computes_faster_what_the_block_computes(
    random_model: Callable[..., Path], generator: torch.Generator
) -> None:
    """Attention some queries at a time, and results in the memory of values that nothing else uses."""
    rows = [torch.randint(60, (1, 100), generator=generator)]
    with walking(random_model("llama"), rows) as (walk, inputs), torch.no_grad():
        trace = walk.trace(0, inputs)
        assert trace is not None
        (piece,) = trace.cut([])
        code = inspect.getsource(piece._function)
        assert "traced_attention(" in code
        assert code.count("mul.out(") >= 4
        hidden, given = inputs.get(0, walk.device), given_tensors(walk.call(0, 0))
        computed = piece.run({trace.hidden: hidden}, given, walk.linear)
        assert torch.equal(computed, walk.run(0, 0, hidden))
        assert torch.equal(hidden, inputs.get(0, walk.device)), "an input keeps its value"


class Reuses(Block):
    """Nothing here may be written over: each is used again, is a view, or is an input."""

    def between(self, x: Tensor) -> Tensor:
        twice = torch.neg(x)
        view = torch.neg(x)[..., :2]
        wide = torch.neg(x[..., :1])
        base = torch.neg(x)
        seen = base[..., :2]
        tripled = base * 3.0
        return twice * x + twice + torch.cat([view * 2.0, seen], dim=-1) + wide * x + tripled


def test_a_value_that_is_used_again_is_not_written_over() -> None:
    block, hidden = Reuses(), torch.randn(1, 3, 4)
    trace = trace_of(block, hidden)
    assert trace is not None
    with torch.no_grad():
        assert torch.equal(trace.run(hidden, [], lambda name, x: block.get_submodule(name)(x)), block(hidden))


class Residual(Block):
    """What the second linear gets is used again behind it."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = torch.neg(self.first(hidden))
        output: Tensor = x + self.second(x)
        return output


def test_what_a_linear_got_is_not_written_over() -> None:
    """It may still be wanted when a later piece has run: for the moments of a sample that goes on at once."""
    block, hidden = Residual(), torch.randn(1, 3, 4)
    trace = trace_of(block, hidden)
    assert trace is not None
    values = {trace.hidden: hidden}
    first, last = trace.cut(["second"])
    with torch.no_grad():
        got = first.run(values, [], lambda name, x: block.get_submodule(name)(x))
        before = got.clone()
        assert torch.equal(last.run(values, [], lambda name, x: block.get_submodule(name)(x)), block(hidden))
    assert torch.equal(got, before)


class Twice(Block):
    """The first linear's output is added to two things, the second is called two times."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.first(hidden)
        one, other = hidden + x, hidden * 2.0 + x
        output: Tensor = one + self.second(one) + self.second(other)
        return output


class Broadcast(Block):
    """The first linear's output is added to a column, the second's to itself."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.second(self.first(hidden) + hidden[..., :1])
        return x + x


@pytest.mark.parametrize("kind", [Twice, Broadcast])
def test_what_is_no_plain_addition_is_none(kind: type[Block]) -> None:
    trace = trace_of(kind(), torch.randn(1, 3, 4))
    assert trace is not None
    assert [trace.added_to(name)[0] for name in ("first", "second")] == [[], []]


def test_a_block_that_changes_values_in_place_is_traced() -> None:
    block, hidden = InPlace(), torch.randn(1, 3, 4)
    trace = trace_of(block, hidden)
    assert trace is not None
    with torch.no_grad():
        assert torch.equal(trace.run(hidden, [], lambda name, x: block.get_submodule(name)(x)), block(hidden))


@pytest.mark.parametrize("kind", [ByTheData, SizeByTheData, OtherUse])
def test_a_block_that_no_list_can_stand_for_has_none(kind: type[Block]) -> None:
    assert trace_of(kind(), torch.randn(1, 3, 4)) is None


def test_tracing_leaves_the_block_as_it_was() -> None:
    """A forward that keeps a tensor for the next call must not keep one without data."""
    block, hidden = Remembers(), torch.randn(1, 3, 4)
    assert trace_of(block, hidden) is not None
    assert block.cached is None
    assert dict(block.named_buffers()) == {}
    assert "forward" not in vars(block.first)
    assert block(hidden).isfinite().all()


def test_samples_of_several_lengths_have_no_common_list(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    with walking(random_model("llama"), [*rows, rows[0][:, :5]]) as (walk, inputs):
        assert walk.trace(0, inputs) is None


def test_a_trace_that_computes_something_else_is_not_used(
    random_model: Callable[..., Path], rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with walking(random_model("llama"), rows) as (walk, inputs):
        run = Walk.run
        monkeypatch.setattr(Walk, "run", lambda *arguments: run(*arguments) * 1.001)
        assert walk.trace(0, inputs) is None


def test_values_between_stops_may_come_back_in_another_order_of_memory() -> None:
    """What is kept between two stops is contiguous when it comes back, whatever it was."""

    class Turned(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            turned = self.first(hidden).transpose(1, 2)
            gate = self.second(hidden)
            return turned.transpose(1, 2).view(-1).view_as(gate) + gate

    block, hidden = Turned(), torch.randn(1, 3, 4)
    trace = trace_of(block, hidden)
    assert trace is not None
    values = {trace.hidden: hidden}
    for segment in trace.cut(["first", "second"]):
        values |= {node: value.contiguous() for node, value in values.items()}
        result = segment.run(values, [], lambda name, x: block.get_submodule(name)(x))
    assert torch.equal(result, block(hidden))
