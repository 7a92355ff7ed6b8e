"""Hand values of a graph to the graphs nested in it, as a checkpointed block is one.

%block = get_attr[wrap_body_0];  %y = checkpoint(%block, %x)          ->  %y = checkpoint(%block, %x, %value)
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import nested_graph
from sla2_compile.passes.find_attention import walk


def carry_into(value: Node, source: GraphModule, target: GraphModule, gm: GraphModule) -> Node | None:
    """A placeholder of `target` for a node of `source`, in which `target` is nested; or the node, where they are one.

    Args:
        value: the node, which precedes the call of the nested graph.
        source: the graph that holds it.
        target: the graph to have it.
        gm: the graph that holds both.

    Returns:
        The placeholder; None where a graph on the way is not called once, with an argument for every placeholder.
    """
    if target is source:
        return value
    found = call_of(target, gm)
    if found is None:
        return None
    parent, call = found
    outer = carry_into(value, source, parent, gm)
    if outer is None:
        return None
    placeholders = target.graph.find_nodes(op="placeholder")
    with target.graph.inserting_after(placeholders[-1]):
        inner = target.graph.placeholder(f"sla2_input_{len(placeholders)}")
    inner.meta = {name: outer.meta[name] for name in ("example_value", "val") if name in outer.meta}
    call.args = (*call.args, outer)
    return inner


def call_of(target: GraphModule, gm: GraphModule) -> tuple[GraphModule, Node] | None:
    """(graph that holds it, node) of the one call of a nested graph that passes an argument for every placeholder."""
    for parent, node in walk(gm):
        if nested_graph(parent, node) is target:
            (call, *others), placeholders = list(node.users), target.graph.find_nodes(op="placeholder")
            is_plain = not others and call.args[0] is node and len(call.args) == 1 + len(placeholders)
            return (parent, call) if is_plain else None
    return None


def calls_around(target: GraphModule, gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """The calls, from within outwards, through which values can be carried into a nested graph."""
    found = call_of(target, gm)
    while found is not None:
        yield found
        found = call_of(found[0], gm)
