"""Where every dimension of every tensor of a graph comes from: what was merged into it, and what was joined along it.

    %p = conv3d(%x);  %t = flatten(%p, 2).transpose(1, 2);  %s = cat([%text, %t], 1)
    ->  dimension 1 of %s: joined from text's and from one that is merged from frames, height and width of %p

This guides how well attention is approximated, never what a graph computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sla2_compile.passes.axes import AxesOf, fresh_axes, listed
from sla2_compile.passes.axis_rules import axes_of_call
from sla2_compile.passes.edit_graph import example_value, nested_graph


def trace_axes(gm: GraphModule, known: AxesOf | None = None, inputs: Sequence[Any] = ()) -> AxesOf:
    """The axes of every tensor of `gm` and of the graphs nested in it.

    Args:
        gm: the graph.
        known: where to put them; a new dict where None.
        inputs: the axes of the graph's inputs, where it is nested in another.
    """
    known = {} if known is None else known
    given = list(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and given:
            known[node] = _fitting(node, given.pop(0))
        elif node.op == "output":
            known[node] = [known.get(x) if isinstance(x, Node) else None for x in listed(node.args[0])]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            known[node] = _nested(gm, node, known)
        else:
            known[node] = axes_of_call(node, known)
    return known


def _fitting(node: Node, axes: Any) -> Any:
    """The axes that came along, with sources that this graph can read."""
    own = fresh_axes(node)
    if not isinstance(axes, list) or not isinstance(own, list) or len(axes) != len(own):
        return own
    return axes


def _nested(gm: GraphModule, node: Node, known: AxesOf) -> Any:
    """Through a graph that is called, as a checkpointed block is."""
    first, *rest = node.args
    nested = nested_graph(gm, first) if isinstance(first, Node) else None
    if nested is None:
        return fresh_axes(node)
    placeholders = [each for each in nested.graph.nodes if each.op == "placeholder"]
    if len(placeholders) != len(rest):
        trace_axes(nested, known)
        return fresh_axes(node)
    trace_axes(nested, known, [known.get(x) if isinstance(x, Node) else None for x in rest])
    results = known[nested.graph.output_node()]
    value = example_value(node)
    if isinstance(value, (tuple, list)) and len(value) == len(results):
        return tuple(results)
    return fresh_axes(node)
