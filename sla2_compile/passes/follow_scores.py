"""Follow the product of q and k through a graph, to its softmax and on to the product with v.

    %s = matmul(%q, %kT) -> mul(%s, 0.125) -> masked_fill(., %m, -inf) -> softmax(., -1) -> dropout(.) -> matmul(., %v)
    ->  ScoreChain(first, last, scale=0.125, masks=[...], keys="right", obstacle=None)

What is met on the way is either understood (scale, mask, cast, dropout, split or merge of batch and heads), or an
obstacle that is remembered: the chain is attention all the same, and a user wants to know why it stays dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.contractions import Contraction, as_contraction
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.in_place import changes_in_place
from sla2_compile.passes.read_node import PERMUTATIONS, argument, hides, op_name, permutation
from sla2_compile.passes.scores import LEFT, MERGED, RIGHT, Mask, ScoreChain
from sla2_compile.passes.shapes import same_product, same_shape

# Longer chains than any attention has.
_MAX_STEPS = 40

_MUL = {"mul", "imul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__"}
_DIV = {"truediv", "itruediv", "div", "div_", "divide", "divide_", "true_divide", "__truediv__"}
_ADD = {"add", "iadd", "add_", "__add__", "__radd__"}
_SUB = {"sub", "isub", "sub_", "subtract", "__sub__"}
_FILL = {"masked_fill", "masked_fill_"}
_CASTS = {"float", "half", "bfloat16", "double", "to", "type", "type_as"}
_COPIES = {"contiguous", "clone"}
_RESHAPES = {"view", "reshape", "unflatten", "flatten"}
_MAXIMA = {"amax", "max"}
_SIZES = {"size", "dim", "stride", "numel", "is_contiguous"}


def follow_scores(first: Contraction, live: set[Node]) -> ScoreChain | None:
    """The attention whose scores `first` computes; None where it computes no scores.

    Args:
        first: a product.
        live: the nodes of the graph that matter.
    """
    start = _start(first)
    if start is None:
        return None
    pending = [start]
    for _ in range(_MAX_STEPS):
        if not pending:
            return None
        chain = pending.pop()
        if chain.last is not None:
            return chain
        # A chain that several nodes read continues along the first of them that leads to attention.
        pending += reversed(list(_continue(chain, live)))
    return None


def _start(first: Contraction) -> ScoreChain | None:
    """The first product as scores: one axis of tokens from each side, one summed axis."""
    left, right, out = first.left_labels, first.right_labels, first.out_labels
    summed = [label for label in left if label in right and label not in out]
    own_left = [label for label in out if label not in right]
    own_right = [label for label in out if label not in left]
    # A side with more axes of its own has heads that the other side lacks: multi-query attention.
    if len(summed) != 1 or not own_left or not own_right or min(len(own_left), len(own_right)) > 1:
        return None
    if set(left) - {*summed, *out} or set(right) - {*summed, *out}:
        return None
    names = {own_left[-1]: LEFT, own_right[-1]: RIGHT}
    axes = tuple(names.get(label, label) for label in out)
    batch = tuple(label for label in axes if label not in (LEFT, RIGHT))
    tokens = {axis: label for label, axis in names.items()}
    chain = ScoreChain(first, first.node, axes, batch, tokens)
    if isinstance(first.scale, Node):
        chain = dataclasses.replace(chain, factors=((first.scale, False),))
    else:
        chain = dataclasses.replace(chain, scale=float(first.scale))
    if first.bias is not None:
        chain = dataclasses.replace(chain, masks=(Mask(first.bias, "added", axes),))
    return chain


def _continue(chain: ScoreChain, live: set[Node]) -> Iterator[ScoreChain]:
    """The chain one node further, once for each way it goes on."""
    users = [user for user in chain.node.users if user in live and not _reads_only_size(user)]
    order = {node: i for i, node in enumerate(chain.node.graph.nodes)} if len(users) > 1 else {}
    users.sort(key=lambda user: order.get(user, 0))
    # A change in place whose result nobody takes: the next reader sees what it left.
    while len(users) > 1 and changes_in_place(users[0]) and not users[0].users:
        if users[0].args[0] is not chain.node:
            return
        changed = _advance(chain, users[0])
        if changed is None:
            return
        chain = dataclasses.replace(changed, node=chain.node, nodes=(*chain.nodes, users[0]))
        users = users[1:]
    if (shifted := _skip_shift(chain, users)) is not None:
        yield shifted
        return
    if len(users) > 1:
        what = "scores" if chain.keys is None else "probabilities"
        chain = chain.blocked(f"its {what} are used elsewhere")
    for user in users:
        if user.op == "output" and chain.keys is None:
            continue
        if (further := _advance(chain, user)) is not None:
            yield further


def _reads_only_size(node: Node) -> bool:
    is_size = node.op == "call_method" and node.target in _SIZES
    return is_size or (node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim"))


def _advance(chain: ScoreChain, user: Node) -> ScoreChain | None:
    """The chain after `user` has read it; None where it is no attention."""
    if (product := as_contraction(user)) is not None:
        return _finish(chain, product)
    name, others = op_name(user), [x for x in user.args if x is not chain.node]
    value = example_value(user)
    if not isinstance(value, Tensor) or chain.node not in user.all_input_nodes:
        return None
    further = chain.step(user)
    if name == "softmax":
        return _softmax(further, chain, user)
    if name in _MUL or name in _DIV:
        return _scale(further, chain, name in _DIV, user, others)
    if name in _ADD or (name in _SUB and user.args[0] is chain.node):
        return _add(further, chain, name in _SUB, others)
    if name in _FILL or name == "where":
        return _mask(further, chain, name, user)
    if name in _CASTS or name in _COPIES:
        return further
    if name == "dropout":
        return _dropout(further, user)
    if name in _RESHAPES:
        return _reshape(further, chain, value)
    if name in PERMUTATIONS:
        return _swap(further, chain, user)
    if not same_shape(value.shape, example_value(chain.node).shape):
        return None
    return further.blocked(f"its {_what(chain)} pass through {name}")


def _what(chain: ScoreChain) -> str:
    return "scores" if chain.keys is None else "probabilities"


def _softmax(further: ScoreChain, chain: ScoreChain, user: Node) -> ScoreChain | None:
    dim = argument(user, 1, "dim", None)
    if chain.keys is not None or not isinstance(dim, int):
        return None
    axis = chain.axes[dim]
    return dataclasses.replace(further, keys=axis) if axis in (LEFT, RIGHT) else None


def _scale(further: ScoreChain, chain: ScoreChain, divides: bool, user: Node, others: list[Any]) -> ScoreChain | None:
    if len(others) != 1 or (divides and user.args[0] is not chain.node):
        return None
    factor = others[0]
    if _is_scalar(factor) and chain.keys is None and not chain.masks:
        return dataclasses.replace(further, factors=(*further.factors, (factor, divides)))
    if not isinstance(factor, (int, float)):
        return further.blocked(f"its {_what(chain)} are multiplied by a value that is computed at run time")
    if chain.keys is not None or factor <= 0:
        return further.blocked(f"its {_what(chain)} are multiplied by {factor}")
    return dataclasses.replace(further, scale=further.scale / factor if divides else further.scale * factor)


def _is_scalar(x: Any) -> bool:
    """Whether a node is a number: symbolic, or a tensor without dimensions."""
    value = example_value(x) if isinstance(x, Node) else None
    return isinstance(value, (torch.SymFloat, torch.SymInt)) or (isinstance(value, Tensor) and value.dim() == 0)


def _add(further: ScoreChain, chain: ScoreChain, subtracts: bool, others: list[Any]) -> ScoreChain | None:
    if len(others) == 1 and isinstance(others[0], (int, float)) and chain.keys is None:
        # A softmax is the same when all scores shift.
        return further
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    if subtracts or further.node.kwargs or chain.keys is not None:
        return further.blocked(f"another tensor is added to its {_what(chain)}")
    return dataclasses.replace(further, masks=(*further.masks, Mask(others[0], "added", chain.axes)))


def _mask(further: ScoreChain, chain: ScoreChain, name: str, user: Node) -> ScoreChain | None:
    """masked_fill(scores, hidden, value), where(kept, scores, value) or where(hidden, value, scores)."""
    args = [argument(user, i, key, None) for i, key in enumerate(("input", "mask", "value"))]
    if name == "where":
        condition, yes, no = args[0] or user.kwargs.get("condition"), args[1], args[2]
        form: Literal["hidden", "kept"] = "kept" if yes is chain.node else "hidden"
        mask, fill = condition, no if yes is chain.node else yes
    else:
        mask, fill, form = args[1], args[2], "hidden"
    if not isinstance(mask, Node) or mask is chain.node:
        return None
    if chain.keys is not None:
        return further.blocked("its probabilities are masked")
    if not hides(fill, example_value(chain.node).dtype):
        return further.blocked(f"its hidden scores are filled with {fill}, which may show")
    return dataclasses.replace(further, masks=(*further.masks, Mask(mask, form, chain.axes)))


def _dropout(further: ScoreChain, user: Node) -> ScoreChain | None:
    p, training = argument(user, 1, "p", 0.5), argument(user, 2, "training", True)
    if isinstance(p, Node) or isinstance(training, Node):
        return further.blocked("dropout in training")
    if further.keys is None and training and p:
        return further.blocked("dropout of its scores")
    return dataclasses.replace(further, dropout_p=float(p) if training else further.dropout_p)


def _reshape(further: ScoreChain, chain: ScoreChain, value: Tensor) -> ScoreChain | None:
    """Only batch and heads may be merged or split; the token axes stay as they are."""
    shape = example_value(chain.node).shape
    if same_shape(shape, value.shape):
        return further
    leading = chain.axes[:-2]
    if set(chain.axes[-2:]) != {LEFT, RIGHT} or not same_shape(shape[-2:], value.shape[-2:]):
        return None
    if not same_product(shape[:-2], value.shape[:-2]):
        return None
    tokens = chain.axes[-2:]
    if len(leading) == 2 and value.dim() == 3:
        merged = chain.batch if len(chain.batch) == 1 else (MERGED,)
        return dataclasses.replace(further, axes=(*merged, *tokens))
    if len(leading) == 1 and value.dim() == 4 and isinstance(value.shape[1], int):
        if len(chain.batch) == 2:
            # It was merged on the way, so it must come apart as it was.
            original = example_value(chain.first.node).shape[1]
            return dataclasses.replace(further, axes=(*chain.batch, *tokens)) if value.shape[1] == original else None
        if chain.num_heads not in (None, value.shape[1]):
            return None
        split = (f"{chain.batch[0]}.0", f"{chain.batch[0]}.1")
        return dataclasses.replace(further, axes=(*split, *tokens), num_heads=value.shape[1])
    return None


def _swap(further: ScoreChain, chain: ScoreChain, user: Node) -> ScoreChain | None:
    order = permutation(user, len(chain.axes))
    return None if order is None else dataclasses.replace(further, axes=tuple(chain.axes[i] for i in order))


def _skip_shift(chain: ScoreChain, users: list[Node]) -> ScoreChain | None:
    """scores - scores.amax(keys): the softmax is the same without it."""
    if len(users) != 2 or chain.keys is not None or op_name(users[0]) not in _MAXIMA:
        return None
    maximum, shift = users
    last = maximum
    nodes = [maximum]
    while list(last.users) != [shift]:
        if len(last.users) != 1:
            return None
        (last,) = last.users
        if op_name(last) not in ("detach", "getitem", "clone") or len(nodes) > 3:
            return None
        nodes.append(last)
    dim = argument(maximum, 1, "dim", None)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    keepdim = argument(maximum, 2, "keepdim", False)
    if op_name(shift) not in _SUB or list(shift.args) != [chain.node, last] or not isinstance(dim, int) or not keepdim:
        return None
    further = chain.step(shift)
    # The softmax must run over the same axis; `_softmax` checks the axis, this one that there is no other.
    if dim % len(chain.axes) != len(chain.axes) - 1:
        return None
    return dataclasses.replace(further, nodes=(*further.nodes, *nodes))


def _finish(chain: ScoreChain, product: Contraction) -> ScoreChain | None:
    """The chain with its product with v, where the keys are what is summed over."""
    if chain.keys is None or (product.left is chain.node) == (product.right is chain.node):
        return None
    is_left = product.left is chain.node
    labels, v_labels = (
        (product.left_labels, product.right_labels) if is_left else (product.right_labels, product.left_labels)
    )
    names = dict(zip(labels, chain.axes, strict=True))
    queries = LEFT if chain.keys == RIGHT else RIGHT
    by_axis = {axis: label for label, axis in names.items()}
    summed = [label for label in labels if label not in product.out_labels]
    features = [label for label in v_labels if label not in labels]
    fits = (
        summed == [by_axis[chain.keys]]
        and by_axis[chain.keys] in v_labels
        and by_axis[queries] not in v_labels
        and len(features) == 1
        and set(product.out_labels) == {*labels, *features} - set(summed)
        and product.bias is None
    )
    if not fits:
        return None
    if product.scale != 1:
        chain = chain.blocked(f"its output is multiplied by {product.scale}")
    return chain.step(product.node, last=product)
