"""Which calls of a graph write to a tensor that is there already, and whether a tensor's storage is ever written to.

%m = expand(%kept, ...);  setitem(%m, 0, True);  scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
->  is_overwritten(%m): what made %m does not say what attention reads
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

_IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior", "ixor", "setitem", "delitem",
}  # fmt: skip

# Calls whose result may share the storage of their first argument.
_ALIASING = {
    "getitem", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "swapaxes", "swapdims", "movedim",
    "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "narrow", "select", "diagonal", "chunk", "split",
    "unbind", "unfold", "detach", "contiguous", "to", "type", "type_as", "float", "bool", "half", "bfloat16", "double",
    "t", "view_as", "as_strided", "getattr",
}  # fmt: skip


def changes_in_place(node: Node) -> bool:
    """Whether a call may write to one of its arguments."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    in_place_operator = getattr(operator, name, None) is node.target and name in _IN_PLACE_OPERATORS
    # operator.and_, or_ and not_ end like that because their names are keywords; they change nothing.
    is_operator = getattr(node.target, "__module__", None) == "_operator"
    named_in_place = name.endswith("_") and not name.endswith("__") and not is_operator
    return in_place_operator or named_in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def is_overwritten(x: Node, reader: Node | None = None) -> bool:
    """Whether the storage of `x`, or of what `x` may be a view of, is written to by a call that did not make `x`.

    Args:
        x: the tensor.
        reader: a call that reads `x` and may write to it itself.
    """
    base, made_by = x, {x, reader}
    while _may_alias(base) and base.args and isinstance(base.args[0], Node):
        base = base.args[0]
        made_by.add(base)
    return any(writer not in made_by for writer in _writers(base))


def _writers(base: Node) -> Iterator[Node]:
    """The calls that write to a tensor or to what may be a view of it."""
    pending, seen = [base], {base}
    while pending:
        x = pending.pop()
        for user in x.users:
            if changes_in_place(user) and _writes_to(user, x):
                yield user
            if user not in seen and _may_alias(user) and user.args and user.args[0] is x:
                seen.add(user)
                pending.append(user)


def _writes_to(call: Node, x: Node) -> bool:
    if isinstance(call.target, torch._ops.OpOverload):
        return True
    return (bool(call.args) and call.args[0] is x) or call.kwargs.get("out") is x


def _may_alias(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _ALIASING or changes_in_place(node)
