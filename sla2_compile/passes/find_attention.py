"""Find every attention of a traced graph.

    %out = call_function[scaled_dot_product_attention](%q, %k, %v, attn_mask=%mask)
    ->  Site(name="blocks.0.attn1", arguments={"query": %q, "key": %k, "value": %v, "attn_mask": %mask, ...})

Graphs nested in the graph (a checkpointed block is one) are searched where they are used. An attention that a
normalising pass proposed counts like a call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import example_value, nested_graph
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.sites import Site

# The signature of F.scaled_dot_product_attention, a builtin that inspect cannot read.
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}

ROOT_NAME = "root"


def find_attention(gm: GraphModule, proposals: Sequence[Proposal] = ()) -> list[Site]:
    """Every attention in `gm`, in the order of execution.

    Args:
        gm: the graph; graphs nested in it are searched too.
        proposals: what the normalising passes proposed in it.
    """
    by_attention = {proposal.attention or proposal.original: proposal for proposal in proposals}
    num_calls: Counter[str] = Counter()
    sites = []
    for owner, node in walk(gm):
        proposal = by_attention.get(node)
        if proposal is None and (node.op != "call_function" or node.target is not F.scaled_dot_product_attention):
            continue
        name = module_path(node)
        ordinal = num_calls[name]
        num_calls[name] += 1
        sites.append(_site(f"{name}#{ordinal}" if ordinal else name, owner, node, proposal))
    return sites


def _site(name: str, owner: GraphModule, node: Node, proposal: Proposal | None) -> Site:
    if proposal is not None and proposal.attention is None:
        return Site(name, owner, node, arguments={}, q_shape=(), kv_len=0, proposal=proposal)
    arguments = call_arguments(node)
    q_shape = tuple(example_value(arguments["query"]).shape)
    kv_len = example_value(arguments["key"]).shape[-2]
    return Site(name, owner, node, arguments, q_shape, kv_len, proposal)


def call_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an SDPA node by their names."""
    return _DEFAULTS | dict(zip(_POSITIONAL, node.args, strict=False)) | dict(node.kwargs)


def walk(gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """(graph that holds it, node) of every node of `gm` and, where they are first used, of the graphs nested in it."""
    seen: set[int] = set()

    def visit(owner: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
        seen.add(id(owner))
        for node in owner.graph.nodes:
            yield owner, node
            nested = nested_graph(owner, node)
            if nested is not None and id(nested) not in seen:
                yield from visit(nested)

    return visit(gm)


def module_path(node: Node) -> str:
    """Path of the innermost module that the call was traced in, as `named_modules` has it; `root` for the model."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ROOT_NAME
    path = list(stack.values())[-1][0]
    # Dynamo writes the way it reached the module: L['self'].blocks.0, or L['self'].__dict__['_modules']['blocks'].0.
    path = re.sub(r"^[LG]\['[^']*'\]", "", path)
    path = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path)
    parts = [part for part in path.split(".") if part not in ("", "_modules", "__dict__", "_orig_mod")]
    return ".".join(parts) or ROOT_NAME
