"""Along which dimensions a mask provably never varies, read from the nodes that made it.

%m = expand(unsqueeze(unsqueeze(%kept, 1), 1), -1, 8, 4096, -1)      constant_dims(%m) = {1, 2}
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.in_place import is_overwritten
from sla2_compile.passes.read_node import CASTS, PERMUTATIONS, argument, op_name, permutation
from sla2_compile.passes.shapes import same_size

# Deeper than any mask is built.
_MAX_DEPTH = 32

_POINTWISE = {
    *CASTS, "and_", "or_", "xor", "invert", "not_", "neg", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul",
    "rsub", "truediv", "div", "where", "masked_fill", "masked_fill_", "logical_not", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__", "__invert__", "mod", "floordiv",
}  # fmt: skip
_FILLS = {"ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"}
_POSITIONS = {"unsqueeze", "expand", "getitem", "view", "reshape", "expand_as", "repeat", "to", "long", "int"}


def constant_dims(node: Node, reader: Node | None = None, depth: int = 0) -> set[int]:
    """The dimensions along which a tensor provably has the same values everywhere.

    Args:
        node: the tensor.
        reader: the call that reads it, which may itself write to it; None where nothing that writes to it is known.
        depth: how deep the question is nested.
    """
    value = example_value(node)
    if not isinstance(value, Tensor):
        return set()
    rank = value.dim()
    single = {i for i in range(rank) if same_size(value.shape[i], 1)}
    if depth > _MAX_DEPTH or is_overwritten(node, reader):
        return single
    name = op_name(node)
    if name in _FILLS:
        return set(range(rank))
    if name == "ge" and node.args[1] == 0 and _counts_up(node.args[0]):
        return set(range(rank))
    if name in _POINTWISE or name in ("expand", "expand_as"):
        operands = node.all_input_nodes[:1] if name.startswith("expand") else node.all_input_nodes
        return single | _common(node, operands, rank, depth)
    base = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if base is None or not isinstance(example_value(base), Tensor):
        return single
    source = example_value(base)
    inner = constant_dims(base, node, depth + 1)
    if name == "unsqueeze":
        at = argument(node, 1, "dim", 0) % rank
        return {at} | {i + (i >= at) for i in inner}
    if name == "getitem":
        return single | _after_index(node.args[1], inner, source.dim(), rank)
    if name == "repeat" and len(node.args) == rank + 1 == source.dim() + 1:
        return inner
    if name in PERMUTATIONS:
        order = permutation(node, rank)
        return single if order is None else {i for i in range(rank) if order[i] in inner}
    if name in ("view", "reshape"):
        return single | _after_view(inner, source.shape, value.shape)
    return single


def _counts_up(x: Any) -> bool:
    """Whether a node holds positions 0, 1, 2 ..., moved forward or viewed: none is negative."""
    while isinstance(x, Node) and not is_overwritten(x):
        name = op_name(x)
        if name == "arange":
            return len(x.args) == 1 and "start" not in x.kwargs
        is_moved = name == "add" and isinstance(x.args[1], int) and x.args[1] >= 0
        if not is_moved and not (name in _POSITIONS and x.all_input_nodes == [x.args[0]]):
            return False
        x = x.args[0]
    return False


def _common(reader: Node, operands: list[Node], rank: int, depth: int) -> set[int]:
    """Dimensions of a broadcast result along which no operand varies."""
    fixed = set(range(rank))
    for operand in operands:
        value = example_value(operand)
        if isinstance(value, Tensor):
            missing = rank - value.dim()
            fixed &= set(range(missing)) | {i + missing for i in constant_dims(operand, reader, depth + 1)}
    return fixed


def _after_index(index: Any, inner: set[int], source_rank: int, rank: int) -> set[int]:
    """Where `x[index]` puts the dimensions of x: plain slices, None, integers and `...` only."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(isinstance(item, (slice, int)) for item in items)
    if any(not (item is None or item is Ellipsis or isinstance(item, (slice, int))) for item in items):
        return set()
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (source_rank - used)
    fixed, source, out = set(), 0, 0
    for item in items:
        if item is None:
            fixed.add(out)
            out += 1
            continue
        if isinstance(item, slice):
            if source in inner:
                fixed.add(out)
            out += 1
        source += 1
    return fixed if out == rank else set()


def _after_view(inner: set[int], before: Any, after: Any) -> set[int]:
    """Where a view keeps dimensions from the left or from the right, they stay fixed."""
    fixed = set()
    for i in range(min(len(before), len(after))):
        if not same_size(before[i], after[i]):
            break
        if i in inner:
            fixed.add(i)
    for i in range(1, min(len(before), len(after)) + 1):
        if not same_size(before[-i], after[-i]):
            break
        if len(before) - i in inner:
            fixed.add(len(after) - i)
    return fixed
