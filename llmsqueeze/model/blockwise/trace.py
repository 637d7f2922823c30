"""A decoder block's forward as a list of tensor operations, which can stop before any linear and go on from there.

torch traces the block's own forward once, on tensors without data; its linears are marks in the list. A value that a
later operation uses is live; the live values of a sample at a stop are all that is needed to go on. Only norms run
twice: behind a stop again, which costs less than to keep their results.

A block whose path depends on the data (a router that picks experts), or that uses a linear's weight without calling the
linear, has no such list: `trace_block` returns None. The list is compared with the block's own forward once for every
kind of block.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from llmsqueeze.model.blockwise.recorder import BlockCall, hidden_of, replaced
from llmsqueeze.model.blockwise.segment import MARK, Linear, Segment, input_of, number_of
from llmsqueeze.model.linears import as_rows

# the operations of norms: to compute them again costs less than to keep their results
CHEAP = {
    torch.ops.aten.pow.Tensor_Scalar,
    torch.ops.aten.mean.dim,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add.Scalar,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.rsqrt.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.native_layer_norm.default,
    operator.getitem,
}
MOST_AGAIN = 12  # operations


@dataclass(frozen=True)
class BlockTrace:
    """The operations of a block for hidden states of one shape.

    nodes: in order; names: the linears by the number of their marks; hidden, given: the inputs of the list, the block's
    first argument and the tensors among the others; result: the value that is the block's output.
    """

    graph: fx.GraphModule
    nodes: tuple[fx.Node, ...]
    names: tuple[str, ...]
    hidden: fx.Node
    given: tuple[fx.Node, ...]
    result: fx.Node

    @property
    def calls(self) -> list[tuple[str, fx.Node]]:
        """Every call of a linear in order: its name, and the value that it gets."""
        return [(self.names[number_of(node)], input_of(node)) for node in self.nodes if node.target is MARK]

    def added_to(self, name: str) -> tuple[list[fx.Node], float]:
        """The values that stand before a linear is called, and to which its output times the factor is added: the
        residual stream, and in a block whose branches run side by side the outputs of earlier branches. None if the
        linear is called twice, or if another operation lies between, such as a norm."""
        marks = [at for at, node in enumerate(self.nodes) if node.target is MARK]
        (at, *again) = [at for at in marks if self.names[number_of(self.nodes[at])] == name]
        node, factor, values = self.nodes[at], 1.0, list[fx.Node]()
        while len(node.users) == 1 and not again:
            (user,) = node.users
            others = [value for value in user.all_input_nodes if value is not node]
            if user.kwargs or any(_shape(value) != _shape(user) for value in (node, *others)):
                break
            if user.target is torch.ops.aten.add.Tensor and others:
                values += [value for value in others if self._position(value) < at]
            elif user.target is torch.ops.aten.mul.Tensor and isinstance(user.args[1], int | float) and not values:
                factor *= user.args[1]
            else:
                break
            node = user
        return values, factor

    def cut(self, before: Sequence[str]) -> list[Segment]:
        """The list in pieces that end before the first call of each of these linears, in the order of these calls; the
        last piece ends with the block."""
        marks = [at for at, node in enumerate(self.nodes) if node.target is MARK]
        ends = [next(at for at in marks if self.names[number_of(self.nodes[at])] == name) for name in before]
        results = [input_of(self.nodes[end]) for end in ends] + [self.result]
        segments: list[Segment] = []
        later: frozenset[fx.Node] = frozenset()
        for start, end, result in reversed(list(zip([0, *ends], [*ends, len(self.nodes)], results, strict=True))):
            nodes = self.nodes[start:end]
            used = {value for node in nodes for value in node.all_input_nodes} | {result} | later
            needs = {value for value in used - set(nodes) - set(self.given) if value.op != "get_attr"}
            for value in sorted(needs, key=self._position, reverse=True):  # rather a norm again than its result kept
                if again := self._again(value, needs - {value}):
                    nodes, needs = (*again, *nodes), needs - {value}
            segments.insert(0, Segment(self.graph, self.names, self.given, nodes, frozenset(needs), later, result))
            later = frozenset(needs)
        return segments

    def _again(self, value: fx.Node, kept: set[fx.Node]) -> list[fx.Node]:
        """The operations that compute a value again from those kept, in order; none if they are many or slow."""
        again: set[fx.Node] = set()
        open_ = [value]
        while open_:
            node = open_.pop()
            if node in kept or node in again or node in self.given or node.op == "get_attr":
                continue
            again.add(node)
            if node.op == "placeholder" or node.target not in CHEAP or len(again) > MOST_AGAIN:
                return []
            open_ += node.all_input_nodes
        return sorted(again, key=self._position)

    def _position(self, node: fx.Node) -> int:
        return self.nodes.index(node) if node in self.nodes else -1

    def run(self, hidden: Tensor, given: Sequence[Tensor], linear: Linear) -> Tensor:
        """The block's output for `hidden`; arguments as of `Segment.run`."""
        return self.cut([])[0].run({self.hidden: hidden}, given, linear)


def trace_block(
    module: nn.Module,
    linears: Mapping[str, nn.Linear],
    call: BlockCall,
    hidden: Tensor,
    compute: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
) -> BlockTrace | None:
    """The operations of a block for `hidden` [1, length, width]; None if they depend on the data.

    `linears`: the linears inside the block by name. The arguments of other calls may hold other values, but must have
    the structure of `call` (see `given_tensors`). compute: computes the block for hidden states and other arguments, in
    the place of the module alone.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def forward(hidden: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], structure)
        return hidden_of(module(hidden, *args, **kwargs)) if compute is None else compute(hidden, args, kwargs)

    names = tuple(linears)
    with ExitStack() as stack:
        for number, name in enumerate(names):
            stack.enter_context(replaced(linears[name], _mark(number, linears[name])))
        stack.enter_context(unchanged(module))
        stack.enter_context(torch.no_grad())
        weights = {id(linears[name].weight) for name in names}
        for function in (forward, torch.func.functionalize(forward)):  # the second changes nothing in place
            try:
                graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(hidden, *tensors)
            except Exception:  # torch has many errors for a path that depends on data, and the models add their own
                return None
            trace = _checked(graph, names, weights)
            if trace is not None:
                return trace
    return None


def given_tensors(call: BlockCall) -> list[Tensor]:
    """The tensors among the arguments of a block, in the order of a trace's `given`."""
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def structure_of(call: BlockCall) -> list[Any]:
    """What two calls must share if one trace is to serve both: shapes and dtypes, and all that is no tensor."""
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    return [*((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves), structure]


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """After the context the module's attributes are what they were: a traced forward may keep tensors without data."""
    before = [(one, dict(vars(one)), dict(one._buffers)) for one in module.modules()]
    try:
        yield
    finally:
        for one, attributes, buffers in before:
            vars(one).clear()
            vars(one).update(attributes)
            one._buffers.clear()
            one._buffers.update(buffers)


def _shape(node: fx.Node) -> torch.Size | None:
    """Of what a node gives; None for several tensors, and for a parameter of the block."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _mark(number: int, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    rows = as_rows(linear, linear.weight).shape[0]
    return lambda x: torch.ops.llmsqueeze.linear(x, number, rows)


def _checked(graph: fx.GraphModule, names: tuple[str, ...], weights: set[int]) -> BlockTrace | None:
    """The trace, unless it changes a value in place, uses a weight outside its linear, or has a value whose size
    depends on the data."""
    *nodes, output = graph.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    nodes = [node for node in nodes if node.op != "placeholder"]
    result = output.args[0]
    for node in nodes:
        changes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        foreign = node.op == "get_attr" and id(getattr(graph, str(node.target))) in weights
        if changes or foreign or (node.op == "call_function" and not _known(node.target)) or _size_by_data(node):
            return None
    if not isinstance(result, fx.Node) or not inputs:
        return None
    return BlockTrace(graph, tuple(nodes), names, inputs[0], tuple(inputs[1:]), result)


def _size_by_data(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(not isinstance(size, int) for x in values if isinstance(x, Tensor) for size in x.shape)


def _known(target: Any) -> bool:
    return target is operator.getitem or isinstance(target, torch._ops.OpOverload)
