"""What a mask says, read from the nodes that made it: which keys it keeps, and along which dimensions it never varies.

A key-padding mask is often expanded over heads and queries, or turned into numbers to add, before attention gets it.
Where the graph proves that it is nothing else, the op takes the mask of the keys, (B, 1, 1, N).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.edit_graph import Builder, example_value
from sla2_compile.passes.read_node import PERMUTATIONS, argument, constant, hides, op_name, permutation
from sla2_compile.passes.shapes import same_size

# Deeper than any mask is built.
_MAX_DEPTH = 32

_CASTS = {"to", "type", "type_as", "bool", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"}
_POINTWISE = {
    *_CASTS, "and_", "or_", "xor", "invert", "not_", "neg", "eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul",
    "rsub", "truediv", "div", "where", "masked_fill", "masked_fill_", "logical_not", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__", "__invert__", "mod", "floordiv",
}  # fmt: skip
_FILLS = {"ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like"}
_VIEWS = {"unsqueeze", "expand", "getitem", "view", "reshape", "expand_as", "repeat"}


def narrow_mask(mask: Node, build: Builder) -> Node | None:
    """The mask of the keys alone, (B, 1, 1, N) bool, that a mask broadcasts; None where it is another kind.

    Args:
        mask: any shape that broadcasts to (B, H, N, N_kv).
        build: adds the views that pick the mask of the keys.
    """
    kept = as_kept(mask, "added" if example_value(mask).is_floating_point() else "kept", build)
    if kept is None:
        return None
    rank = example_value(kept).dim()
    fixed = constant_dims(mask)
    if rank > 4 or any(rank - offset >= 0 and rank - offset not in fixed for offset in (2, 3)):
        return None
    shape = example_value(kept).shape
    index = [slice(None)] * rank
    for offset in (2, 3):
        if rank >= offset and not same_size(shape[-offset], 1):
            index[rank - offset] = slice(0, 1)
    if slice(0, 1) in index:
        kept = build.item(kept, tuple(index))
    for _ in range(4 - rank):
        kept = build.method("unsqueeze", kept, 0)
    return kept


def as_kept(mask: Node, form: Literal["hidden", "kept", "added"], build: Builder) -> Node | None:
    """A boolean mask, True where a key is kept, of the shape of `mask`; None where there is none that says the same."""
    if form == "added":
        return _kept_of_added(mask, build, 0)
    if example_value(mask).dtype != torch.bool:
        return None
    return mask if form == "kept" else build.function(torch.logical_not, mask)


def _kept_of_added(mask: Node, build: Builder, depth: int) -> Node | None:
    """The boolean mask behind one that holds 0 where a key is kept and a number that hides where it is not."""
    name = op_name(mask)
    if depth > _MAX_DEPTH or not isinstance(mask, Node):
        return None
    dtype = example_value(mask).dtype
    if name in ("masked_fill", "masked_fill_") and constant(mask.args[0]) == 0 and hides(_fill(mask), dtype):
        return as_kept(mask.args[1], "hidden", build)  # type: ignore[arg-type]
    if name == "where" and len(mask.args) == 3:
        condition, yes, no = mask.args
        assert isinstance(condition, Node)
        if constant(yes) == 0 and hides(no, dtype):
            return as_kept(condition, "kept", build)
        if hides(yes, dtype) and constant(no) == 0:
            return as_kept(condition, "hidden", build)
        return None
    if name == "mul" and len(mask.args) == 2 and hides(mask.args[1], dtype):
        return _kept_of_complement(mask.args[0])
    if name in _VIEWS | _CASTS and mask.all_input_nodes == [mask.args[0]]:
        (source,) = mask.all_input_nodes
        inner = _kept_of_added(source, build, depth + 1)
        if inner is None or name in _CASTS:
            return inner
        if name == "getitem":
            return build.item(inner, mask.args[1])
        return build.method(name, inner, *mask.args[1:], **mask.kwargs)
    return None


def _fill(node: Node) -> Any:
    return argument(node, 2, "value", None)


def _kept_of_complement(x: Any) -> Node | None:
    """`kept` of `1 - kept.to(dtype)`."""
    if not isinstance(x, Node) or op_name(x) not in ("sub", "rsub") or len(x.args) != 2:
        return None
    one, kept = x.args if op_name(x) == "sub" else reversed(x.args)
    while isinstance(kept, Node) and op_name(kept) in _CASTS and example_value(kept).dtype != torch.bool:
        kept = kept.args[0]
    return kept if one == 1 and isinstance(kept, Node) and example_value(kept).dtype == torch.bool else None


def constant_dims(node: Node, depth: int = 0) -> set[int]:
    """The dimensions along which a tensor provably has the same values everywhere."""
    value = example_value(node)
    if not isinstance(value, Tensor):
        return set()
    rank = value.dim()
    single = {i for i in range(rank) if same_size(value.shape[i], 1)}
    if depth > _MAX_DEPTH:
        return single
    name = op_name(node)
    if name in _FILLS:
        return set(range(rank))
    if name == "ge" and node.args[1] == 0 and _counts_up(node.args[0]):
        return set(range(rank))
    if name in _POINTWISE or name in ("expand", "expand_as"):
        operands = node.all_input_nodes[:1] if name.startswith("expand") else node.all_input_nodes
        return single | _common(operands, rank, depth)
    base = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if base is None or not isinstance(example_value(base), Tensor):
        return single
    source = example_value(base)
    inner = constant_dims(base, depth + 1)
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
    while isinstance(x, Node):
        name = op_name(x)
        if name == "arange":
            return len(x.args) == 1 and "start" not in x.kwargs
        is_moved = name == "add" and isinstance(x.args[1], int) and x.args[1] >= 0
        if not is_moved and not (name in _VIEWS | {"to", "long", "int"} and x.all_input_nodes == [x.args[0]]):
            return False
        x = x.args[0]
    return False


def _common(operands: list[Node], rank: int, depth: int) -> set[int]:
    """Dimensions of a broadcast result along which no operand varies."""
    fixed = set(range(rank))
    for operand in operands:
        value = example_value(operand)
        if isinstance(value, Tensor):
            missing = rank - value.dim()
            fixed &= set(range(missing)) | {i + missing for i in constant_dims(operand, depth + 1)}
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
