"""Replace the attention of every eligible site by SLA2.

%out = call_function[scaled_dot_product_attention](%q, %k, %v)
->  %out = call_function[sla2.attention](%q, %k, %v, None, ..., scale=None, sparsity_units=970000, ...)

and, where a mask hides queries too, 0 for those: masked_fill(%out, logical_not(%query_mask), 0.0).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from sla2_compile.functional import config_arguments
from sla2_compile.kernels.settings import empty_output
from sla2_compile.passes.edit_graph import Builder, erase_dead, example_value
from sla2_compile.passes.find_attention import call_arguments
from sla2_compile.passes.sites import Site

# Methods that give a view of their tensor, so that a `view` further down still depends on the attention's strides.
_VIEWS = {"transpose", "permute", "squeeze", "unsqueeze", "unflatten", "swapaxes", "swapdims", "movedim", "view"}


def rewrite_attention(sites: list[Site]) -> int:
    """Rewrite the sites whose verdict is "sla2"; how many."""
    chosen = [site for site in sites if site.verdict == "sla2"]
    for site in chosen:
        _rewrite(site)
    return len(chosen)


def _rewrite(site: Site) -> None:
    assert site.config is not None
    old = site.node
    # Read anew: where it attends to what an attention before it gave, that node has been replaced since.
    arguments = call_arguments(old) | {"attn_mask": site.arguments["attn_mask"]}
    q, k, v, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    with site.owner.graph.inserting_before(old):
        new = site.owner.graph.call_function(
            torch.ops.sla2.attention.default,
            (q, k, v, mask),
            {"scale": arguments["scale"], "enable_gqa": arguments["enable_gqa"], **config_arguments(site.config)},
        )
    new.meta = dict(old.meta)
    value = example_value(old)
    key = "example_value" if "example_value" in old.meta else "val"
    new.meta[key] = empty_output(value)
    if value.stride() != new.meta[key].stride():
        _allow_other_strides(old)
    result = new if site.query_mask is None else _hide_queries(Builder(old), new, site.query_mask)
    old.replace_all_uses_with(result)
    erase_dead([old])
    site.node = new


def _hide_queries(build: Builder, out: Node, query_mask: Node) -> Node:
    """0 for the queries that see no key, as scaled dot product attention has it."""
    return build.method("masked_fill", out, build.function(torch.logical_not, query_mask), 0.0)


def _allow_other_strides(node: Node) -> None:
    """Turn `view` of the output into `reshape`: the model may have relied on strides that the op does not give."""
    for user in node.users:
        if user.op == "call_method" and user.target in _VIEWS and user.args[0] is node:
            _allow_other_strides(user)
            if user.target == "view":
                user.target = "reshape"
