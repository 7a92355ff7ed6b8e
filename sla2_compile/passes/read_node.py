"""What a single node says: the name of its operation, an argument, a number it stands for, how it permutes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

PERMUTATIONS = {"transpose", "permute", "swapaxes", "swapdims"}

# Calls that give the values of their first argument, in another dtype or place.
CASTS = {"to", "type", "type_as", "bool", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}

_COMPARISONS = {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def op_name(node: Node) -> str:
    """What a node of PyTorch's own operations is called; empty for other functions."""
    if node.op == "call_method":
        # torch 2.11 has `x == y` as a call of the method __eq__, later versions as one of the operator eq.
        return _COMPARISONS.get(str(node.target), str(node.target))
    module = getattr(node.target, "__module__", None) or "torch"
    if node.op != "call_function" or not module.startswith(("torch", "_operator")):
        return ""
    return str(getattr(node.target, "__name__", ""))


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def hides(fill: Any, dtype: torch.dtype) -> bool:
    """Whether a score of this value has no weight: minus infinity, or the lowest number that stands for it."""
    value = constant(fill)
    return value is not None and dtype.is_floating_point and value <= torch.finfo(dtype).min / 2


def constant(x: Any) -> float | None:
    """The number that an argument is: a number, or a tensor filled with one."""
    if isinstance(x, (int, float)):
        return float(x)
    if isinstance(x, Node) and op_name(x) in ("full", "full_like", "tensor", "new_full"):
        fill = argument(x, 0 if op_name(x) == "tensor" else 1, "fill_value", None)
        return float(fill) if isinstance(fill, (int, float)) else None
    if isinstance(x, Node) and op_name(x) in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    return None


def permutation(node: Node, rank: int) -> list[int] | None:
    """The order in which a permute or transpose takes the dimensions of its input; None where it is not plain."""
    name, args = op_name(node), list[Any]([*node.args[1:], *node.kwargs.values()])
    if name == "permute":
        args = list(args[0]) if args and isinstance(args[0], (tuple, list)) else args
        return [dim % rank for dim in args] if _are_dims(args, rank) else None
    order = list(range(rank))
    if _are_dims(args, 2):
        first, second = args
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _are_dims(args: list[Any], number: int) -> bool:
    return len(args) == number and all(isinstance(arg, int) for arg in args)
