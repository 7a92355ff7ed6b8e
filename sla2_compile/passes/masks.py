"""What a mask says, read from the nodes that made it: which keys it hides from all queries, and which queries it hides.

A key-padding mask is often expanded over heads and queries, joined with the same mask of the queries, or turned into
numbers to add, before attention gets it. Where the graph proves that it is nothing else, the op takes the mask of the
keys, (B, 1, 1, N_kv), and the queries that see nothing get the 0 that scaled dot product attention gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from sla2_compile.passes.constant_dims import constant_dims
from sla2_compile.passes.edit_graph import Builder, example_value
from sla2_compile.passes.in_place import is_overwritten
from sla2_compile.passes.read_node import CASTS, argument, constant, hides, op_name
from sla2_compile.passes.shapes import same_size

# Deeper than any mask is built.
_MAX_DEPTH = 32

_VIEWS = {"unsqueeze", "expand", "getitem", "view", "reshape", "expand_as", "repeat"}
_ANDS = {"and_", "__and__", "logical_and", "bitwise_and", "mul", "__mul__"}


@dataclass(frozen=True)
class SplitMask:
    """A mask that is True where both of these are.

    Args:
        keys: (B, 1, 1, N_kv) bool; None where no key is hidden.
        queries: (B, 1, N, 1) bool; None where no query is.
    """

    keys: Node | None
    queries: Node | None


def split_mask(mask: Node, build: Builder) -> SplitMask | None:
    """A mask as one of the keys and one of the queries; None where it is another kind.

    Args:
        mask: any shape that broadcasts to (B, H, N, N_kv).
        build: adds the views that pick the two.
    """
    is_added = example_value(mask).is_floating_point()
    kept = as_kept(mask, "added" if is_added else "kept", build)
    if kept is None:
        return None
    keys: Node | None = None
    queries: Node | None = None
    for part in _conjuncts(kept, build):
        if (of_keys := _narrow(part, build, (2, 3))) is not None:
            keys = of_keys if keys is None else build.function(torch.logical_and, keys, of_keys)
        # Where numbers are added, a query whose keys are all hidden may still see them all.
        elif not is_added and (of_queries := _narrow(part, build, (1, 3))) is not None:
            queries = of_queries if queries is None else build.function(torch.logical_and, queries, of_queries)
        else:
            return None
    return SplitMask(keys, queries)


def _conjuncts(kept: Node, build: Builder) -> list[Node]:
    """The masks whose conjunction a boolean mask is."""
    name, operands = op_name(kept), kept.all_input_nodes
    if is_overwritten(kept) or any(example_value(x).dtype != torch.bool for x in operands if _is_tensor(x)):
        return [kept]
    if name in _ANDS and len(kept.args) == 2 and all(map(_is_tensor, kept.args)) and not kept.kwargs:
        if not any(is_overwritten(x) for x in operands):
            return [part for x in kept.args for part in _conjuncts(x, build)]  # type: ignore[arg-type]
    elif name in CASTS and len(operands) == 1:
        return _conjuncts(operands[0], build)
    elif name in ("unsqueeze", "getitem") and len(operands) == 1 and _only_adds_dims(kept):
        parts = _conjuncts(operands[0], build)
        rank = example_value(operands[0]).dim()
        if len(parts) > 1 and all(example_value(part).dim() == rank for part in parts):
            if name == "getitem":
                return [build.item(part, kept.args[1]) for part in parts]
            return [build.method("unsqueeze", part, argument(kept, 1, "dim", 0)) for part in parts]
    return [kept]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(example_value(x), torch.Tensor)


def _only_adds_dims(view: Node) -> bool:
    if op_name(view) == "unsqueeze":
        return True
    index = view.args[1] if isinstance(view.args[1], tuple) else (view.args[1],)
    return all(item is None or item is Ellipsis or item == slice(None) for item in index)


def _narrow(kept: Node, build: Builder, fixed_offsets: tuple[int, int]) -> Node | None:
    """A 4-D view of a mask with size 1 at `fixed_offsets`, counted from the last; None where it varies there."""
    rank = example_value(kept).dim()
    fixed = constant_dims(kept)
    if rank > 4 or any(rank >= offset and rank - offset not in fixed for offset in fixed_offsets):
        return None
    shape = example_value(kept).shape
    index = [slice(None)] * rank
    for offset in fixed_offsets:
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
        return _kept_of_added(mask, build, None, 0)
    if example_value(mask).dtype != torch.bool:
        return None
    return mask if form == "kept" else build.function(torch.logical_not, mask)


def _kept_of_added(mask: Node, build: Builder, reader: Node | None, depth: int) -> Node | None:
    """The boolean mask behind one that holds 0 where a key is kept and a number that hides where it is not."""
    name = op_name(mask)
    if depth > _MAX_DEPTH or is_overwritten(mask, reader):
        return None
    dtype = example_value(mask).dtype
    if name in ("masked_fill", "masked_fill_") and hides(argument(mask, 2, "value", None), dtype):
        zeros, hidden = mask.args[:2]
        if constant(zeros) == 0 and not _changed(zeros, mask) and not _changed(hidden, mask):
            return as_kept(hidden, "hidden", build)  # type: ignore[arg-type]
    elif name == "where" and len(mask.args) == 3:
        condition, yes, no = mask.args
        assert isinstance(condition, Node)
        if any(_changed(x, mask) for x in mask.args):
            return None
        if constant(yes) == 0 and hides(no, dtype):
            return as_kept(condition, "kept", build)
        if hides(yes, dtype) and constant(no) == 0:
            return as_kept(condition, "hidden", build)
    elif name == "mul" and len(mask.args) == 2 and hides(mask.args[1], dtype):
        return _kept_of_complement(mask.args[0])
    elif name in _VIEWS | CASTS and mask.all_input_nodes == [mask.args[0]]:
        (source,) = mask.all_input_nodes
        inner = _kept_of_added(source, build, mask, depth + 1)
        if inner is None or name in CASTS:
            return inner
        if name == "getitem":
            return build.item(inner, mask.args[1])
        return build.method(name, inner, *mask.args[1:], **mask.kwargs)
    return None


def _changed(x: Any, reader: Node) -> bool:
    return isinstance(x, Node) and is_overwritten(x, reader)


def _kept_of_complement(x: Any) -> Node | None:
    """`kept` of `1 - kept.to(dtype)`."""
    if not isinstance(x, Node) or op_name(x) not in ("sub", "rsub") or len(x.args) != 2 or is_overwritten(x):
        return None
    one, kept = x.args if op_name(x) == "sub" else reversed(x.args)
    while one == 1 and isinstance(kept, Node) and not is_overwritten(kept):
        if example_value(kept).dtype == torch.bool:
            return kept
        kept = kept.args[0] if op_name(kept) in CASTS else None
    return None
