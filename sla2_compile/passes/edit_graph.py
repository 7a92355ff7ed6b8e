"""The two ways our passes change a graph: add a call with its fake value, and erase what a rewrite left without users.

Dead code that a rewrite did not cause stays: FX takes a call such as `%x.add_(1)` for dead where nobody reads its
result, and would drop the change of `%x` with it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from sla2_compile.passes.in_place import changes_in_place

# Marks a meta entry that does not exist yet.
_MISSING = object()


def example_value(node: Any) -> Any:
    """The fake tensor, or tuple of them, that tracing left on a node; None where it left none."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


@dataclass(frozen=True)
class Builder:
    """Adds calls to a graph before `node`, as if they had been traced where `node` was.

    Args:
        node: the node that the calls precede and share their place in the model with.
    """

    node: Node

    def function(self, target: Callable[..., Any], *args: Any, value: Any = _MISSING, **kwargs: Any) -> Node:
        """A call of a function; `value` is its fake result where the function should not be run for it."""
        if value is _MISSING:
            value = target(*map(_value_of, args), **{name: _value_of(x) for name, x in kwargs.items()})
        with self.node.graph.inserting_before(self.node):
            return self._traced(self.node.graph.call_function(target, args, kwargs), value)

    def method(self, name: str, x: Node, *args: Any, **kwargs: Any) -> Node:
        """A call of a method of `x`."""
        value = getattr(example_value(x), name)(*map(_value_of, args), **kwargs)
        with self.node.graph.inserting_before(self.node):
            return self._traced(self.node.graph.call_method(name, (x, *args), kwargs), value)

    def item(self, x: Node, index: Any) -> Node:
        """`x[index]`."""
        return self.function(operator.getitem, x, index)

    def _traced(self, new: Node, value: Any) -> Node:
        key = "example_value" if "example_value" in self.node.meta else "val"
        kept = ("nn_module_stack", "source_fn_stack", "stack_trace")
        new.meta = {name: self.node.meta[name] for name in kept if name in self.node.meta} | {key: value}
        return new


def erase_unused_after(last: Node, before: Node, *, keep: Iterable[Node | None] = ()) -> None:
    """Erase the nodes between two that nothing reads, what a pass added and then had no use for.

    Args:
        last: the node before the first that was added.
        before: the node that they were added before.
        keep: nodes that stay although they have no users.
    """
    kept, node = set(keep), before.prev
    while node is not last:
        node, candidate = node.prev, node
        if not candidate.users and candidate not in kept:
            candidate.graph.erase_node(candidate)


def _value_of(x: Any) -> Any:
    return example_value(x) if isinstance(x, Node) else x


def nested_graph(owner: GraphModule, node: Node) -> GraphModule | None:
    """The graph that a node of `owner` fetches, as a checkpointed block is one."""
    if node.op != "get_attr":
        return None
    nested: Any = owner
    for part in str(node.target).split("."):
        nested = getattr(nested, part, None)
    return nested if isinstance(nested, GraphModule) else None


def erase_dead(nodes: Iterable[Node], *, also: Iterable[Node] = ()) -> None:
    """Erase the nodes that have no users, and what only they read.

    Args:
        nodes: where to start.
        also: nodes that may go although they write in place: what they write to goes too.
    """
    allowed = set(also)
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op not in ("call_function", "call_method"):
            continue
        if node not in allowed and (changes_in_place(node) or node.is_impure()):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        pending += inputs


def live_nodes(graph: Graph) -> set[Node]:
    """The nodes whose value, or whose change of another, the graph's result depends on."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or changes_in_place(node) or any(user in live for user in node.users):
            live.add(node)
    return live
