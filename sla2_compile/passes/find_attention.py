"""Find every attention of a traced graph.

    %out = call_function[scaled_dot_product_attention](%q, %k, %v, attn_mask=%mask)
    ->  Site(name="blocks.0.attn1", arguments={"query": %q, "key": %k, "value": %v, "attn_mask": %mask, ...})

Graphs nested in the graph (a checkpointed block is one) are searched where they are used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sla2_compile.passes.sites import Site

# The signature of F.scaled_dot_product_attention, a builtin that inspect cannot read.
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}

ROOT_NAME = "root"


def find_attention(gm: GraphModule) -> list[Site]:
    """Every scaled dot product attention in `gm`, in the order of execution."""
    num_calls: Counter[str] = Counter()
    sites = []
    for owner, node in attention_nodes(gm):
        name = module_path(node)
        ordinal = num_calls[name]
        num_calls[name] += 1
        arguments = _DEFAULTS | dict(zip(_POSITIONAL, node.args, strict=False)) | dict(node.kwargs)
        sites.append(
            Site(
                name=f"{name}#{ordinal}" if ordinal else name,
                owner=owner,
                node=node,
                arguments=arguments,
                q_shape=tuple(example_value(arguments["query"]).shape),
                kv_len=example_value(arguments["key"]).shape[-2],
            )
        )
    return sites


def attention_nodes(gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    """(graph that holds it, node) of every attention call in `gm` and the graphs nested in it."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            yield gm, node
        elif node.op == "get_attr":
            nested = gm
            for part in node.target.split("."):
                nested = getattr(nested, part)
            if isinstance(nested, GraphModule):
                yield from attention_nodes(nested)


def example_value(node: Any) -> Any:
    """The fake tensor that tracing left on a node."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta["val"]


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
