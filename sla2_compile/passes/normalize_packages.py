"""Propose an SDPA node for calls into the attention kernels of other packages: flash_attn and xformers.

    %out = call_function[memory_efficient_attention](%q, %k, %v)                      tensors (B, N, H, D)
    %y = call_function[flash_attn._flash_attn_forward](%q, %k, %v, 0.0, 0.125, False, ...);  %out = getitem(%y, 0)
    ->  beside it, without users:  transpose(1, 2) of each, scaled_dot_product_attention, transpose(1, 2)

A call is known by the name of its function or operator, so neither package is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import Builder, example_value, live_nodes
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.shapes import same_size

# Positional arguments after q, k and v, by function, for those that matter or would stand in the way.
_FLASH = ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes")
_SIGNATURES = {
    "flash_attn_func": _FLASH,
    "_flash_attn_forward": (
        "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes",
    ),
    "memory_efficient_attention": ("attn_bias", "dropout_p", "scale"),
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "window_size": ((-1, -1), [-1, -1]), "window_size_left": (-1,), "window_size_right": (-1,), "softcap": (0, 0.0),
    "alibi_slopes": (None,), "attn_bias": (None,),
}  # fmt: skip


def normalize_packages(gm: GraphModule) -> list[Proposal]:
    """Propose for one graph, not for those nested in it."""
    proposals = []
    for node in list(gm.graph.nodes):
        name = _kernel_name(node)
        if name is None or len(node.args) < 3:
            continue
        if isinstance(example_value(node), torch.Tensor):
            proposals.append(_propose(gm, name, node, node, []))
            continue
        outputs = {user.args[1]: user for user in node.users}
        if 0 in outputs:
            others = [outputs[i] for i in sorted(outputs) if i != 0]
            proposals.append(_propose(gm, name, node, outputs[0], others))
    return proposals


def _kernel_name(node: Node) -> str | None:
    if node.op != "call_function":
        return None
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        package, _, name = str(node.target).replace("::", ".").partition(".")
        name = name.partition(".")[0]
    else:
        package, name = getattr(node.target, "__module__", "") or "", getattr(node.target, "__name__", "")
    is_known = package.startswith(("flash_attn", "xformers")) and name in _SIGNATURES
    return name if is_known else None


def _propose(gm: GraphModule, name: str, call: Node, out: Node, others: list[Node]) -> Proposal:
    arguments = dict(zip(_SIGNATURES[name], call.args[3:], strict=False)) | dict(call.kwargs)
    q, k, v = call.args[:3]
    assert isinstance(q, Node)
    proposal = Proposal(gm, out, None, None, [call, *others] if call is not out else [])
    if example_value(q).dim() != 4:
        proposal.obstacle = f"q has {example_value(q).dim()} dimensions, expected 4 (batch, tokens, heads, head dim)"
        return proposal
    for argument, neutral in _NEUTRAL.items():
        if arguments.get(argument, neutral[0]) not in neutral:
            proposal.obstacle = f"{argument} of {name}"
    if others and set(others) & live_nodes(gm.graph):
        proposal.obstacle = "its log-sum-exp is used elsewhere"
    build = Builder(out)
    q, k, v = (build.method("transpose", x, 1, 2) for x in (q, k, v))  # type: ignore[arg-type]
    q_value, k_value = example_value(q), example_value(k)
    proposal.attention = build.function(
        F.scaled_dot_product_attention, q, k, v,
        dropout_p=arguments.get("dropout_p", arguments.get("p", 0.0)), is_causal=bool(arguments.get("causal", False)),
        scale=arguments.get("softmax_scale", arguments.get("scale")),
        enable_gqa=not same_size(q_value.shape[1], k_value.shape[1]), value=q_value.new_empty(q_value.shape),
    )  # fmt: skip
    proposal.result = build.method("transpose", proposal.attention, 1, 2)
    return proposal
