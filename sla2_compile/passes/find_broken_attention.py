"""Report attention that a graph break cut in two, so that nobody wonders why it is no site.

graph 1: %p = softmax(%q @ %kT);  return %p          graph 2: %out = %p @ %v
graph 1: %s = %q @ %kT;           return %s          graph 2: %out = softmax(%s) @ %v
->  a dense site for the softmax, with that reason
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from sla2_compile.passes.contractions import as_contraction
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.read_node import op_name
from sla2_compile.passes.shapes import same_shape
from sla2_compile.passes.whole_model import is_whole_model

# Longer ways between a product and its softmax than any attention has.
_MAX_STEPS = 12


def find_broken_attention(gm: GraphModule, proposals: list[Proposal]) -> list[Proposal]:
    """A proposal without attention node for every softmax of `gm` with one product here and the other in another graph.

    Args:
        gm: the graph.
        proposals: what was found whole.
    """
    if is_whole_model(gm):
        return []
    known = {node for proposal in proposals for node in proposal.chain}
    return [
        Proposal(gm, node, None, None, [], "a graph break between its two products")
        for node in gm.graph.nodes
        if op_name(node) == "softmax" and node not in known and _is_cut(node)
    ]


def _is_cut(softmax: Node) -> bool:
    value = example_value(softmax)
    if not isinstance(value, Tensor) or value.dim() < 3:
        return False
    first, last = _origin(softmax), _end(softmax)
    has_first, has_last = as_contraction(first) is not None, as_contraction(last) is not None
    return (has_first and last.op == "output") or (first.op == "placeholder" and has_last)


def _origin(node: Node) -> Node:
    """Where the scores of a softmax come from."""
    for _ in range(_MAX_STEPS):
        inputs = [x for x in node.all_input_nodes if _same_tokens(x, node)]
        if not inputs or as_contraction(node) is not None:
            break
        node = inputs[0]
    return node


def _end(node: Node) -> Node:
    """Where the probabilities of a softmax go."""
    for _ in range(_MAX_STEPS):
        users = [user for user in node.users if user.op == "output" or _same_tokens(user, node)]
        products = [user for user in node.users if as_contraction(user) is not None]
        if products or not users:
            return products[0] if products else node
        node = users[0]
        if node.op == "output":
            break
    return node


def _same_tokens(first: Node, second: Node) -> bool:
    shapes = [x.shape[-2:] for x in map(example_value, (first, second)) if isinstance(x, Tensor) and x.dim() > 2]
    return len(shapes) == 2 and same_shape(*shapes)
