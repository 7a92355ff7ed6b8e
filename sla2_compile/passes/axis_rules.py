"""What one call does to the axes of its inputs; `trace_axes` asks for every node of a graph.

An operation that is not known simply keeps the dimensions whose sizes it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.axes import Axes, AxesOf, Axis, fresh_axes, listed
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.read_node import PERMUTATIONS, argument, op_name, permutation
from sla2_compile.passes.shapes import same_product, same_size

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_REGROUPINGS = {"view", "reshape", "flatten", "unflatten"}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "norm"}
_PRODUCTS = {"linear", "matmul", "__matmul__"}


def axes_of_call(node: Node, known: AxesOf) -> Any:
    """The axes of what a call gives: a list for a tensor, a tuple of lists for several."""
    value, name = example_value(node), op_name(node)
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    before = known.get(first) if first is not None else None
    if name == "getitem" and isinstance(before, tuple):
        index = node.args[1]
        own = before[index] if isinstance(index, int) and index < len(before) else None
        return own if own is not None else fresh_axes(node)
    if name in _SPLITS and isinstance(before, list):
        return _split(node, before)
    if name == "unbind" and isinstance(before, list) and isinstance(value, (tuple, list)):
        dim = argument(node, 1, "dim", 0) % len(before)
        return tuple([*before[:dim], *before[dim + 1 :]] for _ in value)
    if not isinstance(value, Tensor):
        return fresh_axes(node)
    if name in ("cat", "concat", "concatenate"):
        return _joined(node, known)
    if name == "stack":
        return _stacked(node, known)
    if name in _CONVOLUTIONS and isinstance(before, list) and value.dim() >= 3:
        fresh = fresh_axes(node)
        return [before[0], fresh[1], *(Axis(x.size, is_spatial=True, source=x.source) for x in fresh[2:])]
    if node.target is F.scaled_dot_product_attention:
        query = known.get(argument(node, 0, "query", None))
        return [*query[:-1], fresh_axes(node)[-1]] if isinstance(query, list) else fresh_axes(node)
    if name == "einsum":
        return _by_label(node, known)
    if not isinstance(before, list):
        return _aligned(node, value, known)
    if name in _REGROUPINGS:
        return _regrouped(node, before, value)
    if name in PERMUTATIONS:
        return _permuted(node, before)
    if name in ("unsqueeze", "squeeze", "getitem"):
        return _indexed(node, name, before, value)
    if name == "view_as_complex":
        return before[:-1]
    if name == "view_as_real":
        return [*before, fresh_axes(node)[-1]]
    if name in _REDUCTIONS:
        return _reduced(node, before, value)
    if name in _PRODUCTS:
        return [*before[:-1], fresh_axes(node)[-1]] if value.dim() == len(before) else fresh_axes(node)
    return _aligned(node, value, known)


def _aligned(node: Node, value: Tensor, known: AxesOf) -> Axes:
    """Dimensions of the size that an operand has at the same place, counted from the last."""
    axes = list(fresh_axes(node))
    for operand in node.all_input_nodes:
        theirs = known.get(operand)
        if not isinstance(theirs, list) or len(theirs) > value.dim():
            continue
        for i in range(1, len(theirs) + 1):
            if same_size(theirs[-i].size, value.shape[-i]) and theirs[-i].knowledge > axes[-i].knowledge:
                axes[-i] = theirs[-i]
    return axes


def _by_label(node: Node, known: AxesOf) -> Axes:
    """Through an einsum: each of its letters is one axis."""
    axes = fresh_axes(node)
    equation, *operands = node.args
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow or "." in inputs or len(labels) != len(operands):
        return axes
    best: dict[str, Axis] = dict(zip(out, axes, strict=True))
    for text, operand in zip(labels, operands, strict=True):
        theirs = known.get(operand) if isinstance(operand, Node) else None
        for label, axis in zip(text, theirs or (), strict=False):
            if label in best and axis.knowledge > best[label].knowledge:
                best[label] = axis
    return [best[label] for label in out]


def _joined(node: Node, known: AxesOf) -> Axes:
    parts = [x for x in listed(argument(node, 0, "tensors", ())) if isinstance(x, Node)]
    theirs = [known.get(x) for x in parts]
    axes = fresh_axes(node)
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(dim, int) or not all(isinstance(x, list) and len(x) == len(axes) for x in theirs):
        return axes
    dim %= len(axes)
    along: Axes = []
    for part, own in zip(parts, theirs, strict=True):
        axis = own[dim]  # type: ignore[index]
        along += axis.joined or [Axis(axis.size, axis.merged, (), axis.is_spatial, (part, dim))]
    best = [max((own[i] for own in theirs), key=lambda x: x.knowledge) for i in range(len(axes))]  # type: ignore[index]
    best[dim] = Axis(axes[dim].size, joined=tuple(along), source=(node, dim))
    return best


def _stacked(node: Node, known: AxesOf) -> Axes:
    """As two halves of a rotated vector are put side by side."""
    axes = fresh_axes(node)
    theirs = [known.get(x) for x in listed(argument(node, 0, "tensors", ())) if isinstance(x, Node)]
    at = argument(node, 1, "dim", 0) % len(axes)
    if not theirs or not all(isinstance(x, list) and len(x) == len(axes) - 1 for x in theirs):
        return axes
    best = [max(own, key=lambda x: x.knowledge) for own in zip(*theirs, strict=True)]
    return [*best[:at], axes[at], *best[at:]]


def _reduced(node: Node, before: Axes, value: Tensor) -> Axes:
    """What is left after a sum over some dimensions."""
    axes = fresh_axes(node)
    dims = argument(node, 1, "dim", None)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return axes
    reduced = {dim % len(before) for dim in dims}
    if value.dim() == len(before):
        return [axes[i] if i in reduced else axis for i, axis in enumerate(before)]
    kept = [axis for i, axis in enumerate(before) if i not in reduced]
    return kept if len(kept) == len(axes) else axes


def _split(node: Node, before: Axes) -> Any:
    outs = fresh_axes(node)
    dim = argument(node, 2, "dim", 0)
    if not isinstance(outs, tuple) or not isinstance(dim, int):
        return outs
    dim %= len(before)
    parts = before[dim].joined
    fits = len(parts) == len(outs) and all(same_size(p.size, o[dim].size) for p, o in zip(parts, outs, strict=True))
    return tuple(
        [*before[:dim], parts[i] if fits else out[dim], *before[dim + 1 :]] for i, out in enumerate(outs) if out
    )


def _permuted(node: Node, before: Axes) -> Axes:
    order = permutation(node, len(before))
    return fresh_axes(node) if order is None else [before[i] for i in order]


def _indexed(node: Node, name: str, before: Axes, value: Tensor) -> Any:
    fresh = fresh_axes(node)
    if name == "unsqueeze":
        at = argument(node, 1, "dim", 0) % value.dim()
        return [*before[:at], fresh[at], *before[at:]]
    if name == "squeeze":
        dim = argument(node, 1, "dim", None)
        dims = range(len(before)) if dim is None else [dim % len(before)]
        kept = [axis for i, axis in enumerate(before) if i not in dims or not same_size(axis.size, 1)]
        return kept if len(kept) == value.dim() else fresh
    index = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    is_plain = all(item is None or item is Ellipsis or isinstance(item, (slice, int)) for item in index)
    used = sum(isinstance(item, (slice, int)) for item in index)
    if not is_plain or used - index.count(None) > len(before):
        return fresh
    if Ellipsis not in index:
        index.append(Ellipsis)
    at = index.index(Ellipsis)
    index[at : at + 1] = [slice(None)] * (len(before) - used)
    axes: Axes = []
    source = 0
    for item in index:
        if item is None:
            axes.append(fresh[len(axes)])
            continue
        if isinstance(item, slice):
            axes.append(_sliced(before[source], item, fresh[len(axes)]))
        source += 1
    return axes


def _sliced(axis: Axis, item: slice, own: Axis) -> Axis:
    """A dimension after `x[a:b]`: the same, one of the parts that were joined along it, or a new one."""
    if same_size(axis.size, own.size):
        return axis
    if axis.joined and item.start in (None, 0) and same_size(axis.joined[0].size, own.size):
        return axis.joined[0]
    if axis.joined and item.start is not None and item.stop is None and same_size(axis.joined[-1].size, own.size):
        return axis.joined[-1]
    return own


def _regrouped(node: Node, before: Axes, value: Tensor) -> Axes:
    """Match runs of old and of new dimensions that hold equally many elements."""
    fresh: Axes = fresh_axes(node)
    sizes = [axis.size for axis in before]
    axes: Axes = []
    split_at: list[int] = []
    i = j = 0
    while i < len(before) and j < value.dim():
        if same_size(value.shape[j], 1) and not same_size(sizes[i], 1):
            axes.append(fresh[j])
            j += 1
            continue
        old, new = _next_run(sizes[i:], list(value.shape[j:]))
        if old == 0:
            return [*axes, *fresh[len(axes) :]]
        run = before[i : i + old]
        if old == new == 1:
            axes.append(run[0])
        elif new == 1:
            axes.append(Axis(fresh[j].size, merged=tuple(run), source=fresh[j].source))
        elif old == 1 and len(run[0].factors) == new and _same_sizes(run[0].factors, fresh[j : j + new]):
            axes += run[0].factors
        else:
            split_at += [len(axes)] if (old, new) == (1, 2) else []
            axes += fresh[j : j + new]
        i, j = i + old, j + new
    # Two dimensions that are cut into pieces at once are height and width of a picture in patches.
    for at in split_at if len(split_at) > 1 else ():
        axes[at] = dataclasses.replace(axes[at], is_spatial=True)
    return [*axes, *fresh[len(axes) :]]


def _same_sizes(first: Sequence[Axis], second: Sequence[Axis]) -> bool:
    return all(same_size(a.size, b.size) for a, b in zip(first, second, strict=True))


def _next_run(old: list[Any], new: list[Any]) -> tuple[int, int]:
    """The fewest leading dimensions of both with the same number of elements; (0, 0) where there are none."""
    for total in range(2, len(old) + len(new) + 1):
        for num_old in range(1, min(total - 1, len(old)) + 1):
            num_new = total - num_old
            if num_new <= len(new) and same_product(old[:num_old], new[:num_new]):
                return num_old, num_new
    return 0, 0
