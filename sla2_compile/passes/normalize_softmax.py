"""Propose an SDPA node for every attention that is spelled out as products and a softmax.

    %s = matmul(%q, %kT);  %p = softmax(%s * 0.125, -1);  %out = matmul(%p, %v)
    ->  beside it, without users:  %a = scaled_dot_product_attention(%q, transpose(%kT, -1, -2), %v, scale=0.125)

bmm, baddbmm and einsum count as products. Scales on q or k, before or after, are gathered into `scale`; casts to a
higher precision on the way are left out, since the op computes in it anyway; (B*H, N, D) becomes (B, H, N, D) again
where the graph shows the heads; masks become boolean masks of the keys where they are that. No copy is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from sla2_compile.passes.contractions import Labels, as_contraction
from sla2_compile.passes.edit_graph import Builder, erase_unused_after, example_value, live_nodes
from sla2_compile.passes.follow_scores import follow_scores
from sla2_compile.passes.in_place import changes_in_place
from sla2_compile.passes.masks import as_kept
from sla2_compile.passes.proposals import Proposal
from sla2_compile.passes.read_node import PERMUTATIONS, op_name, permutation
from sla2_compile.passes.scores import LEFT, RIGHT, ScoreChain
from sla2_compile.passes.shapes import same_product, same_shape, same_size

_VIEWS = {"transpose", "permute", "swapaxes", "swapdims", "view", "reshape", "unflatten", "flatten"}
_MERGES = {"view", "reshape", "flatten"}
_MUL, _DIV = {"mul", "multiply", "__mul__", "__rmul__"}, {"truediv", "div", "divide", "__truediv__"}
_CASTS = {"float", "to", "double", "type", "type_as"}


def normalize_softmax(gm: GraphModule) -> list[Proposal]:
    """Propose for one graph, not for those nested in it."""
    live: set[Node] | None = None
    proposals: list[Proposal] = []
    taken: set[Node] = set()
    for node in list(gm.graph.nodes):
        first = as_contraction(node)
        if first is None or node in taken:
            continue
        live = live_nodes(gm.graph) if live is None else live
        chain = follow_scores(first, live) if node in live else None
        if chain is not None:
            taken |= {*chain.nodes, chain.node}
            proposals.append(_propose(gm, chain))
    return proposals


def _propose(gm: GraphModule, chain: ScoreChain) -> Proposal:
    assert chain.last is not None
    assert chain.keys is not None
    first, last, original = chain.first, chain.last, chain.node
    obstacle = chain.obstacle or _change_between(chain)
    proposal = Proposal(gm, original, None, None, list(chain.nodes), obstacle)
    end_batch = tuple(axis for axis in chain.axes if axis not in (LEFT, RIGHT))
    if not {len(chain.batch), len(end_batch)} <= {1, 2}:
        dims = len(chain.batch) + 2
        proposal.obstacle = f"its scores have {dims} dimensions, expected (batch, heads, queries, keys)"
        return proposal

    build, before = Builder(original), original.prev
    p_is_left = last.left is chain.nodes[-1]
    v, v_labels, p_labels = (
        (last.right, last.right_labels, last.left_labels)
        if p_is_left
        else (last.left, last.left_labels, last.right_labels)
    )
    names = dict(zip(p_labels, chain.axes, strict=True))
    queries = LEFT if chain.keys == RIGHT else RIGHT
    sides = {LEFT: (first.left, first.left_labels), RIGHT: (first.right, first.right_labels)}
    (q, q_labels), (k, k_labels) = sides[queries], sides[chain.keys]
    (summed,) = (label for label in q_labels if label in k_labels and label not in first.out_labels)
    (features,) = (label for label in v_labels if label not in names)
    q, q_scale = _peel(q, v, build)
    k, k_scale = _peel(k, v, build)
    for factor, divides in chain.factors:
        q = build.method("div" if divides else "mul", q, factor)
    layout = _Layout(build, _num_heads(chain, end_batch, q))
    q = layout.arrange(q, q_labels, chain.batch, chain.tokens[queries], summed)
    k = layout.arrange(k, k_labels, chain.batch, chain.tokens[chain.keys], summed)
    v = layout.arrange(v, tuple(names.get(x, x) for x in v_labels), end_batch, chain.keys, features)
    mask, reason = _mask(chain, layout, queries)
    proposal.obstacle = obstacle or reason or _dtype_obstacle(chain, q, v)
    proposal.attention = _attention(build, original, q, k, v, mask, chain, chain.scale * q_scale * k_scale)
    out_axes = tuple(names.get(label, label) for label in last.out_labels)
    proposal.result = layout.restore(proposal.attention, end_batch, queries, features, out_axes, original)
    erase_unused_after(before, original, keep=(proposal.result,))
    return proposal


def _attention(
    build: Builder, original: Node, q: Node, k: Node, v: Node, mask: Node | None, chain: ScoreChain, scale: float
) -> Node:
    q_value, k_value, v_value = (example_value(x) for x in (q, k, v))
    dtype = torch.promote_types(v_value.dtype, v_value.dtype)
    value = q_value.new_empty((*q_value.shape[:3], v_value.shape[3]), dtype=dtype)
    shares_heads = same_size(k_value.shape[1], 1) and not same_size(q_value.shape[1], 1)
    return build.function(
        F.scaled_dot_product_attention, q, k, v,
        attn_mask=mask, dropout_p=chain.dropout_p, is_causal=False, scale=scale, enable_gqa=shares_heads, value=value,
    )  # fmt: skip


def _peel(x: Node, v: Node, build: Builder) -> tuple[Node, float]:
    """`x` without the constants it was multiplied by and without a cast up from the dtype of `v`; and the constant."""
    factor, wanted = 1.0, example_value(v).dtype
    views: list[Node] = []
    node, base, num_views = x, x, 0
    while node.op in ("call_function", "call_method"):
        name, inner = op_name(node), next((arg for arg in node.args if isinstance(arg, Node)), None)
        if inner is None or any(changes_in_place(user) for user in inner.users):
            break
        if (number := _constant_factor(node, name, inner)) is not None:
            factor, base, num_views = factor * number, inner, len(views)
        elif name in _CASTS and example_value(node).dtype != wanted and example_value(inner).dtype == wanted:
            base, num_views = inner, len(views)
        elif name in _VIEWS and node.all_input_nodes == [inner]:
            views.append(node)
        else:
            break
        node = inner
    for view in reversed(views[:num_views]):
        if view.op == "call_method":
            base = build.method(str(view.target), base, *view.args[1:], **view.kwargs)
        else:
            base = build.function(view.target, base, *view.args[1:], **view.kwargs)  # type: ignore[arg-type]
    return base, factor


def _constant_factor(node: Node, name: str, inner: Node) -> float | None:
    """What a multiplication or division of `inner` by a positive number multiplies it by."""
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    if len(node.args) != 2 or len(numbers) != 1 or node.kwargs or numbers[0] <= 0:
        return None
    if name in _MUL:
        return float(numbers[0])
    return 1 / numbers[0] if name in _DIV and node.args[0] is inner else None


@dataclass(frozen=True)
class _Layout:
    """Views between the layouts of a chain and (B, H, N, D).

    Args:
        build: adds them.
        num_heads: how many heads a merged batch holds; None where it is taken as a batch of one head each.
    """

    build: Builder
    num_heads: int | None

    def arrange(self, x: Node, labels: Labels, batch: Labels, tokens: str, features: str) -> Node:
        """An operand as (B, H, N, D); a batch label that it lacks becomes a dimension of size 1."""
        wanted = [*(label for label in batch if label in labels), tokens, features]
        x = self._permute(x, [labels.index(label) for label in wanted])
        for i, label in enumerate(batch):
            if label not in labels:
                x = self.build.method("unsqueeze", x, i)
        return self.split(x) if len(batch) == 1 else x

    def split(self, x: Node) -> Node:
        """(B*H, ...) as (B, H, ...)."""
        if self.num_heads is None:
            return self.build.method("unsqueeze", x, 1)
        before = x.args[0] if op_name(x) in _MERGES else None
        if isinstance(before, Node) and _is_merge(before, x) and example_value(before).shape[1] == self.num_heads:
            return before
        return self.build.method("unflatten", x, 0, (-1, self.num_heads))

    def restore(self, out: Node, batch: Labels, tokens: str, features: str, axes: Labels, original: Node) -> Node:
        """(B, H, N, D) in the layout and dtype of the original."""
        if len(batch) == 1:
            out = self.build.method("squeeze", out, 1) if self.num_heads is None else self._merge(out)
        given = [*batch, tokens, features]
        out = self._permute(out, [given.index(axis) for axis in axes])
        dtype = example_value(original).dtype
        return out if example_value(out).dtype == dtype else self.build.method("to", out, dtype)

    def _merge(self, out: Node) -> Node:
        return self.build.method("flatten", out, 0, 1)

    def _permute(self, x: Node, order: list[int]) -> Node:
        if order == sorted(order):
            return x
        rank = len(order)
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            # The transpose of a transpose, as q @ k.mT has it, is what was there before.
            if op_name(x) in PERMUTATIONS and permutation(x, rank) == order:
                return x.all_input_nodes[0]
            return self.build.method("transpose", x, -2, -1)
        return self.build.method("permute", x, *order)


def _is_merge(before: Node, after: Node) -> bool:
    """Whether `after` is `before` with its first two dimensions merged."""
    shape, merged = example_value(before).shape, example_value(after).shape
    return len(shape) == 4 and len(merged) == 3 and same_shape(shape[2:], merged[1:])


def _num_heads(chain: ScoreChain, end_batch: Labels, q: Node) -> int | None:
    """How many heads are in a merged batch, from wherever the graph shows it."""
    if len(chain.batch) == 2:
        heads = example_value(chain.first.node).shape[chain.first.out_labels.index(chain.batch[1])]
        return heads if isinstance(heads, int) else None
    if chain.num_heads is not None:
        return chain.num_heads
    before = q.args[0] if op_name(q) in _MERGES else None
    candidates = [before] if isinstance(before, Node) and _is_merge(before, q) else []
    out = example_value(chain.node).shape
    for user in chain.node.users:
        value = example_value(user)
        splits = op_name(user) in ("view", "reshape", "unflatten") and value.dim() == 4
        if splits and same_shape(value.shape[2:], out[1:]) and same_product(value.shape[:2], out[:1]):
            candidates.append(user)
    heads = [example_value(x).shape[1] for x in candidates]
    return next((number for number in heads if isinstance(number, int)), None)


def _mask(chain: ScoreChain, layout: _Layout, queries: str) -> tuple[Node | None, str | None]:
    """All masks of a chain as one boolean mask that broadcasts to (B, H, N, N_kv); or why there is none."""
    merged: Node | None = None
    for mask in chain.masks:
        shape = tuple(example_value(mask.node).shape) if isinstance(example_value(mask.node), torch.Tensor) else ()
        kept = as_kept(mask.node, mask.form, layout.build) if shape else None
        if kept is None:
            return None, f"an additive mask or bias of shape {shape}" if mask.form == "added" else "a mask of numbers"
        if mask.axes[-2:] != (queries, chain.keys):
            return None, "a mask of transposed scores"
        if len(mask.axes) == 3 and len(shape) == 3:
            one = same_size(shape[0], 1)
            kept = layout.build.method("unsqueeze", kept, 1) if one else layout.split(kept)
        merged = kept if merged is None else layout.build.function(torch.logical_and, merged, kept)
    return merged, None


def _dtype_obstacle(chain: ScoreChain, q: Node, v: Node) -> str | None:
    q_dtype, v_dtype = example_value(q).dtype, example_value(v).dtype
    # Under autocast, products are computed in a lower precision than their inputs have.
    if q_dtype == v_dtype or example_value(chain.first.node).dtype != example_value(chain.first.left).dtype:
        return None
    return f"its q is {q_dtype}, its v {v_dtype}"


def _change_between(chain: ScoreChain) -> str | None:
    """A write between the first and the last product might change what the proposal reads later."""
    node, own = chain.first.node, set(chain.nodes)
    while node is not chain.node:
        if changes_in_place(node) and node not in own:
            return "a tensor is changed in place between its products"
        node = node.next
    return None
