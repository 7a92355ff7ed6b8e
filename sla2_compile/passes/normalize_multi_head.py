"""Propose the parts of nn.MultiheadAttention and of nn.TransformerEncoderLayer's fast path, which are one node each.

%y = call_function[multi_head_attention_forward](%x, %x, %x, 64, 4, %w, %b, ...);  %out = getitem(%y, 0)
%out = call_function[_transformer_encoder_layer_fwd](%x, 64, 4, %w, %b, ...)
->  beside it, without users:  linear, chunk, unflatten, permute, scaled_dot_product_attention, permute, flatten, linear
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import Builder, erase_unused_after, example_value, live_nodes
from sla2_compile.passes.masks import as_kept
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.read_node import PERMUTATIONS, op_name, permutation

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_ENCODER_ARGUMENTS = (
    "src", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", "use_gelu",
    "norm_first", "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1",
    "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip


def normalize_multi_head(gm: GraphModule) -> list[Proposal]:
    """Propose for one graph, not for those nested in it."""
    return list(_proposals(gm))


def _proposals(gm: GraphModule) -> Iterator[Proposal]:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is F.multi_head_attention_forward:
            outputs = {user.args[1]: user for user in node.users}
            if 0 in outputs:
                yield _propose_multi_head(gm, node, outputs[0], outputs.get(1))
        elif node.op == "call_function" and node.target is torch._transformer_encoder_layer_fwd:
            yield _propose_encoder_layer(gm, node)


@dataclass(frozen=True)
class _Heads:
    """The attention inside, from projected tensors; `tokens_first` for (N, B, E), otherwise (B, N, E)."""

    build: Builder
    num_heads: int
    tokens_first: bool

    def split(self, x: Node) -> Node:
        """(N, B, E) or (B, N, E) as (B, H, N, D)."""
        width = example_value(x).shape[-1]
        x = self.build.method("unflatten", x, -1, (self.num_heads, width // self.num_heads))
        return self.build.method("permute", x, *((1, 2, 0, 3) if self.tokens_first else (0, 2, 1, 3)))

    def merge(self, x: Node) -> Node:
        """(B, H, N, D) as it came."""
        x = self.build.method("permute", x, *((2, 0, 1, 3) if self.tokens_first else (0, 2, 1, 3)))
        return self.build.method("flatten", x, 2)

    def attend(self, q: Node, k: Node, v: Node, mask: Node | None, dropout_p: Any, is_causal: bool) -> Node:
        q, k, v = (self.split(x) for x in (q, k, v))
        q_value = example_value(q)
        value = q_value.new_empty(q_value.shape)
        return self.build.function(
            F.scaled_dot_product_attention, q, k, v,
            attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, value=value,
        )  # fmt: skip


def _propose_multi_head(gm: GraphModule, node: Node, out: Node, weights: Node | None) -> Proposal:
    call = _SIGNATURE.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    arguments = call.arguments
    proposal = Proposal(gm, out, None, None, [node, *([weights] if weights is not None else [])])
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if example_value(query).dim() != 3:
        proposal.obstacle = "its inputs have no batch dimension"
        return proposal
    if arguments["bias_k"] is not None or arguments["add_zero_attn"] or arguments["static_k"] is not None:
        proposal.obstacle = "it adds keys of its own (bias_k, add_zero_attn or static_k)"
        return proposal
    if weights is not None and weights in live_nodes(gm.graph):
        proposal.obstacle = "its probabilities are used elsewhere"
    build, before = Builder(out), out.prev
    batch_first = all(map(_swaps_batch, (query, key, value, *out.users)))
    if batch_first:
        query, key, value = (x.args[0] for x in (query, key, value))
    heads = _Heads(build, arguments["num_heads"], tokens_first=not batch_first)
    q, k, v = _project(build, query, key, value, arguments)
    masks = [(arguments["key_padding_mask"], True), (arguments["attn_mask"], False)]
    only_causal = (
        bool(arguments["is_causal"]) and arguments["key_padding_mask"] is None and not arguments["need_weights"]
    )
    mask, reason = (None, None) if only_causal else _merge_masks(build, masks, arguments["num_heads"])
    dropout_p = arguments["dropout_p"] if arguments["training"] else 0.0
    proposal.obstacle = proposal.obstacle or reason
    proposal.attention = heads.attend(q, k, v, mask, dropout_p, only_causal)
    merged = heads.merge(proposal.attention)
    result = build.function(F.linear, merged, arguments["out_proj_weight"], arguments["out_proj_bias"])
    proposal.result = build.method("transpose", result, 0, 1) if batch_first else result
    erase_unused_after(before, out, keep=(proposal.result,))
    return proposal


def _swaps_batch(x: Node) -> bool:
    """Whether a node is the transpose between (B, N, E) and (N, B, E) of a module that takes the batch first."""
    return op_name(x) in PERMUTATIONS and permutation(x, 3) == [1, 0, 2]


def _project(build: Builder, query: Node, key: Node, value: Node, arguments: dict[str, Any]) -> list[Node]:
    """q, k, v, each of the shape of its input."""
    bias = arguments["in_proj_bias"]
    if arguments.get("use_separate_proj_weight"):
        weights = [arguments[f"{name}_proj_weight"] for name in "qkv"]
    elif query is key is value:
        packed = build.function(F.linear, query, arguments["in_proj_weight"], bias)
        return _thirds(build, packed, -1)
    else:
        weights = _thirds(build, arguments["in_proj_weight"], 0)
    biases = [None] * 3 if bias is None else _thirds(build, bias, 0)
    inputs = (query, key, value)
    return [build.function(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _thirds(build: Builder, x: Node, dim: int) -> list[Node]:
    parts = build.method("chunk", x, 3, dim)
    return [build.item(parts, i) for i in range(3)]


def _merge_masks(
    build: Builder, masks: list[tuple[Node | None, bool]], num_heads: int
) -> tuple[Node | None, str | None]:
    """All masks, each with whether it is one of the keys (B, N), as one that is True where a key is kept."""
    merged: Node | None = None
    for mask, of_keys in masks:
        if mask is None:
            continue
        shape = tuple(example_value(mask).shape)
        kept = as_kept(mask, "hidden" if example_value(mask).dtype == torch.bool else "added", build)
        if kept is None:
            return None, f"an additive mask or bias of shape {shape}"
        if len(shape) == 3:
            kept = build.method("unflatten", kept, 0, (-1, num_heads))
        elif len(shape) == 2:
            first, second = (1, 1) if of_keys else (0, 0)
            kept = build.method("unsqueeze", build.method("unsqueeze", kept, first), second)
        merged = kept if merged is None else build.function(torch.logical_and, merged, kept)
    return merged, None


def _propose_encoder_layer(gm: GraphModule, node: Node) -> Proposal:
    arguments: dict[str, Any] = dict(zip(_ENCODER_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    proposal = Proposal(gm, node, None, None)
    src, width, num_heads = arguments["src"], arguments["embed_dim"], arguments["num_heads"]
    if example_value(src).is_nested or example_value(src).dim() != 3:
        proposal.obstacle = "its input is nested or has no batch dimension"
        return proposal
    build, before = Builder(node), node.prev
    mask, proposal.obstacle = None, None
    if arguments.get("mask") is not None:
        mask, proposal.obstacle = _merge_masks(build, [(arguments["mask"], arguments["mask_type"] == 1)], num_heads)

    def norm(x: Node, which: int) -> Node:
        weight, bias = arguments[f"norm_weight_{which}"], arguments[f"norm_bias_{which}"]
        return build.function(F.layer_norm, x, (width,), weight, bias, arguments["eps"])

    def feed_forward(x: Node) -> Node:
        x = build.function(F.linear, x, arguments["ffn_weight_1"], arguments["ffn_bias_1"])
        x = build.function(F.gelu if arguments["use_gelu"] else F.relu, x)
        return build.function(F.linear, x, arguments["ffn_weight_2"], arguments["ffn_bias_2"])

    heads = _Heads(build, num_heads, tokens_first=False)
    x = norm(src, 1) if arguments["norm_first"] else src
    q, k, v = _project(build, x, x, x, arguments)
    proposal.attention = heads.attend(q, k, v, mask, 0.0, False)
    merged = heads.merge(proposal.attention)
    out = build.function(F.linear, merged, arguments["out_proj_weight"], arguments["out_proj_bias"])
    x = build.function(torch.add, src, out)
    if arguments["norm_first"]:
        proposal.result = build.function(torch.add, x, feed_forward(norm(x, 2)))
    else:
        x = norm(x, 1)
        proposal.result = norm(build.function(torch.add, x, feed_forward(x)), 2)
    erase_unused_after(before, node, keep=(proposal.result,))
    return proposal
