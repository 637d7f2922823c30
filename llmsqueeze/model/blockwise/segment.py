"""A piece of a block's list of operations (trace.py), as Python code.

The code drops every value after its last use, and writes a product or a sum over an argument that nothing uses any
more: fresh memory costs more than the arithmetic. Attention over few tokens is computed as attention.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from llmsqueeze.model.blockwise.attention import ATTENTION, traced_attention

MARKS = torch.library.Library("llmsqueeze", "DEF")
MARKS.define("linear(Tensor x, int number, int rows) -> Tensor")
MARKS.impl("linear", lambda x, _number, rows: x.new_empty(*x.shape[:-1], rows), "Meta")
MARK = torch.ops.llmsqueeze.linear.default

# operations that can write over an argument, and operations whose result is never the memory of an argument
IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.mul.Tensor: torch.ops.aten.mul.out,
    torch.ops.aten.add.Tensor: torch.ops.aten.add.out,
}
IN_NEW_MEMORY = {
    *IN_PLACE,
    torch.ops.aten.silu.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.neg.default,
    torch.ops.aten.pow.Tensor_Scalar,
    torch.ops.aten.rsqrt.default,
    torch.ops.aten.cat.default,
}
# results that are no views of their arguments; what a linear gets is left alone, for its moments may be taken later
COPIES = {*IN_NEW_MEMORY, torch.ops.aten.mean.dim}

Linear = Callable[[str, Tensor], Tensor]
Values = dict[fx.Node, Tensor]


@dataclass(frozen=True)
class Segment:
    """A piece of a trace, of which it has graph, names and given.

    nodes: its operations in order; needs: the values from before it that it or a later piece uses; leaves: those behind
    it that a later piece uses; result: what the linear behind it gets, or the block's output.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    given: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    needs: frozenset[fx.Node]
    leaves: frozenset[fx.Node]
    result: fx.Node

    def run(self, values: Values, given: Sequence[Tensor], linear: Linear) -> Tensor:
        """Computes the piece from `values`, which become those that later pieces use; returns its result.

        given: the tensors of the block's call; linear: computes a linear by its name.
        """
        inputs = [values.pop(node) for node in self._inputs]
        left, result = self._function(linear, *inputs, *given)
        values.update(zip(self._outputs, left, strict=True))
        computed: Tensor = result
        return computed

    def prepare(self) -> None:
        """Generates the code, which the first run does else. Then several threads may run the piece at once."""
        _ = self._function, self._inputs, self._outputs

    @cached_property
    def _inputs(self) -> list[fx.Node]:
        return sorted(self.needs, key=lambda node: node.name)

    @cached_property
    def _outputs(self) -> list[fx.Node]:
        return sorted(self.leaves, key=lambda node: node.name)

    @cached_property
    def _function(self) -> Callable[..., tuple[list[Tensor], Tensor]]:
        """The code. Its arguments: what computes a linear, the inputs, the tensors of the block's call."""
        graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
        linear = graph.placeholder("computing")  # no operation of torch has this name
        for value in (*self._inputs, *self.given):
            known[value] = graph.placeholder(value.name)

        def of(value: fx.Node) -> fx.Node:
            if value.op == "get_attr" and value not in known:
                known[value] = graph.node_copy(value)
            return known[value]

        for node in self.nodes:
            if node.target is MARK:
                name = self.names[number_of(node)]
                known[node] = graph.call_function(_call, (linear, name, of(input_of(node))))
            elif node.op != "get_attr":
                known[node] = graph.node_copy(node, of)
                known[node].target = _faster(node)
                if (spent := _spent(node)) is not None:
                    known[node].target, known[node].kwargs = IN_PLACE[node.target], {"out": of(spent)}
        graph.output(([of(node) for node in self._outputs], of(self.result)))
        graph.eliminate_dead_code()
        code: Any = fx.GraphModule(self.graph, graph).forward
        return code  # type: ignore[no-any-return]


def _call(linear: Linear, name: str, x: Tensor) -> Tensor:
    return linear(name, x)


def _faster(node: fx.Node) -> Any:
    """The operation of a node, or one that computes the same in less time, or in whatever order memory lies: what is
    kept between two stops comes back contiguous, and not all views are possible then."""
    if node.target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default
    if node.target is ATTENTION and all(user.args[1] == 0 for user in node.users if user.users):
        return traced_attention
    return node.target


def _spent(node: fx.Node) -> fx.Node | None:
    """An argument whose memory the result of a node may take: a tensor of the trace's own and of the same shape, which
    no later operation uses, nor a view of it."""
    if node.target not in IN_PLACE or node.kwargs:
        return None
    for value in node.all_input_nodes:
        last = list(value.users)[-1] is node and node.args.count(value) == 1
        own = value.target in IN_NEW_MEMORY and all(user.target in COPIES for user in value.users)
        if last and own and _kind(value) == _kind(node):
            return value
    return None


def _kind(node: fx.Node) -> tuple[Any, ...]:
    value: Tensor = node.meta["val"]
    return value.shape, value.stride(), value.dtype


def number_of(node: fx.Node) -> int:
    """The number of a marked linear."""
    number: Any = node.args[1]
    return int(number)


def input_of(node: fx.Node) -> fx.Node:
    """What a marked linear gets."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value
