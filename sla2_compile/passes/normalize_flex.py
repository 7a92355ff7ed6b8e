"""Propose an SDPA node for FlexAttention that changes no score and masks nothing.

%y = call_function[flex_attention](%q, %k, %v, %score_mod, (1, 1, ..., %mask_mod), 0.25, {...}, (), ());  getitem(%y, 0)
->  beside it, without users:  %a = scaled_dot_product_attention(%q, %k, %v, scale=0.25)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import Builder, example_value, live_nodes
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.read_node import constant, op_name
from sla2_compile.passes.shapes import same_size

# FlexAttention's block size where there is no block mask.
_ANY_LENGTH = 1 << 30


def normalize_flex(gm: GraphModule) -> list[Proposal]:
    """Propose for one graph, not for those nested in it."""
    proposals = []
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not flex_attention:
            continue
        outputs = {user.args[1]: user for user in node.users}
        if 0 in outputs:
            proposals.append(_propose(gm, node, outputs[0], [outputs[i] for i in sorted(outputs) if i != 0]))
    return proposals


def _propose(gm: GraphModule, node: Node, out: Node, others: list[Node]) -> Proposal:
    q, k, v, score_mod, block_mask, scale = node.args[:6]
    assert isinstance(q, Node)
    assert isinstance(block_mask, tuple)
    proposal = Proposal(gm, out, None, None, [node, *others])
    live = live_nodes(gm.graph)
    if not _gives_its_score(gm, score_mod):
        proposal.obstacle = "its scores are changed by a score_mod"
    elif not _is_absent(block_mask) or not _keeps_all(gm, block_mask[-1]):
        proposal.obstacle = "a block mask"
    elif any(other in live for other in others):
        proposal.obstacle = "its log-sum-exp is used elsewhere"
    q_value, k_value, v_value = (example_value(x) for x in (q, k, v))
    value = q_value.new_empty((*q_value.shape[:3], v_value.shape[3]))
    shares_heads = not same_size(q_value.shape[1], k_value.shape[1])
    proposal.attention = proposal.result = Builder(out).function(
        F.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=shares_heads, value=value
    )
    return proposal


def _subgraph(gm: GraphModule, node: object) -> tuple[list[Node], Node] | None:
    """The inputs and the single result of a graph that is an argument."""
    nested = getattr(gm, str(node.target), None) if isinstance(node, Node) and node.op == "get_attr" else None
    if not isinstance(nested, GraphModule):
        return None
    nodes = list(nested.graph.nodes)
    result = nodes[-1].args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return [each for each in nodes if each.op == "placeholder"], result


def _gives_its_score(gm: GraphModule, score_mod: object) -> bool:
    graph = _subgraph(gm, score_mod)
    return graph is not None and graph[1] is graph[0][0]


def _is_absent(block_mask: tuple[object, ...]) -> bool:
    """Whether it is what FlexAttention puts where no block mask is given: one block of everything, which is kept."""
    _, _, num_kept, *_, block_q, block_k, _ = block_mask
    sizes = [size for size in (block_q, block_k) if isinstance(size, int)]
    return isinstance(num_kept, Node) and op_name(num_kept) == "ones" and len(sizes) == 2 and min(sizes) >= _ANY_LENGTH


def _keeps_all(gm: GraphModule, mask_mod: object) -> bool:
    graph = _subgraph(gm, mask_mod)
    if graph is None:
        return False
    result = graph[1]
    return op_name(result) in ("ones", "new_ones", "ones_like") or constant(result) == 1
