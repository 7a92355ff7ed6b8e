"""`Contraction`: a product of two tensors in any of its spellings, written with one label per dimension.

torch.matmul(a, b), a @ b, torch.bmm(a, b), a.bmm(b)      left (0, 1, n, c)  right (0, 1, c, m)  out (0, 1, n, m)
torch.baddbmm(x, a, b, beta=0, alpha=s)                   the same, with scale s
torch.einsum("bhid,bhjd->bhij", a, b)                     left (b, h, i, d)  right (b, h, j, d)  out (b, h, i, j)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sla2_compile.passes.edit_graph import example_value

Labels = tuple[str, ...]

_MATMULS = {torch.matmul, operator.matmul, torch.bmm}
_MATMUL_METHODS = {"matmul", "__matmul__", "bmm"}
_ELLIPSIS_LABELS = "0123456789"


@dataclass(frozen=True)
class Contraction:
    """Sum of left * right over the labels not in `out`, times `scale` (a number or a scalar node), plus `bias`."""

    node: Node
    left: Node
    right: Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    scale: float | Node = 1.0
    bias: Node | None = None


def as_contraction(node: Node) -> Contraction | None:
    """The contraction that `node` computes; None where it is something else."""
    if node.op == "call_function" and node.target is torch.functional.einsum:
        return _from_einsum(node)
    is_function, is_method = node.op == "call_function", node.op == "call_method"
    if (is_function and node.target in _MATMULS) or (is_method and node.target in _MATMUL_METHODS):
        return _from_matmul(node, *_two(node), scale=1.0, bias=None)
    if (is_function and node.target is torch.baddbmm) or (is_method and node.target == "baddbmm"):
        return _from_baddbmm(node)
    return None


def _two(node: Node) -> tuple[Any, Any]:
    args = [*node.args, *node.kwargs.values()]
    return (args[0], args[1]) if len(args) == 2 else (None, None)


def _from_baddbmm(node: Node) -> Contraction | None:
    arguments = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | dict(node.kwargs)
    beta, alpha = arguments.get("beta", 1), arguments.get("alpha", 1)
    if len(node.args) > 3 or not isinstance(beta, (int, float)):
        return None
    bias = arguments["input"] if beta != 0 else None
    return _from_matmul(node, arguments["batch1"], arguments["batch2"], scale=alpha, bias=bias)


def _from_matmul(node: Node, left: Any, right: Any, *, scale: Any, bias: Any) -> Contraction | None:
    rank = _rank(left)
    if rank is None or rank < 3 or _rank(right) != rank:
        return None
    batch = tuple(_ELLIPSIS_LABELS[: rank - 2])
    return Contraction(node, left, right, (*batch, "n", "c"), (*batch, "c", "m"), (*batch, "n", "m"), scale, bias)


def _from_einsum(node: Node) -> Contraction | None:
    if node.kwargs or not isinstance(node.args[0], str):
        return None
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    if not arrow or len(operands) != 2 or inputs.count(",") != 1:
        return None
    left, right = operands
    if _rank(left) is None or _rank(right) is None:
        return None
    ranks = [example_value(x).dim() for x in (left, right)]
    texts = inputs.split(",")
    widths = [rank - len(text.replace("...", "")) for text, rank in zip(texts, ranks, strict=True) if "..." in text]
    if len(set(widths)) > 1:
        return None
    filler = _ELLIPSIS_LABELS[: widths[0]] if widths else ""
    left_labels, right_labels, out_labels = (tuple(text.replace("...", filler)) for text in (*texts, out))
    if any(len(set(labels)) != len(labels) for labels in (left_labels, right_labels, out_labels)):
        return None
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    return Contraction(node, left, right, left_labels, right_labels, out_labels)


def _rank(x: Any) -> int | None:
    value = example_value(x) if isinstance(x, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None
