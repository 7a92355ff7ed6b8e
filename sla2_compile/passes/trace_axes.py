"""Where every dimension of every tensor of a graph comes from: what was merged into it, and what was joined along it.

    %p = conv3d(%x);  %t = flatten(%p, 2).transpose(1, 2);  %s = cat([%text, %t], 1)
    ->  dimension 1 of %s: joined from text's and from one that is merged from frames, height and width of %p

This guides how well attention is approximated, never what a graph computes, so an operation that is not known simply
keeps the dimensions whose sizes it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import example_value, nested_graph
from sla2_compile.passes.follow_scores import PERMUTATIONS, argument, op_name, permutation
from sla2_compile.passes.shapes import same_product, same_size

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_REGROUPINGS = {"view", "reshape", "flatten", "unflatten"}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"}
_PRODUCTS = {"linear", "matmul", "__matmul__"}


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension.

    Args:
        size: plain or symbolic.
        merged: the axes that a reshape merged into it, slowest first.
        joined: the axes that a cat put one after the other along it.
        is_spatial: a dimension of a convolution's output other than batch and channels.
        source: (node, dimension) where its size can be read.
    """

    size: Any
    merged: tuple[Axis, ...] = ()
    joined: tuple[Axis, ...] = ()
    is_spatial: bool = False
    source: tuple[Node, int] | None = None

    @property
    def factors(self) -> tuple[Axis, ...]:
        """What it is a product of: itself where nothing was merged."""
        return tuple(leaf for part in self.merged for leaf in part.factors) if self.merged else (self,)

    @property
    def knowledge(self) -> int:
        """How much is known of it; the operand that knows most speaks for a sum."""
        return 100 * bool(self.joined) + 10 * len(self.merged) + self.is_spatial + sum(x.knowledge for x in self.joined)


Axes = list[Axis]
AxesOf = dict[Node, Any]  # a list of axes for a tensor, a tuple of lists for several


def trace_axes(gm: GraphModule, known: AxesOf | None = None, inputs: Sequence[Any] = ()) -> AxesOf:
    """The axes of every tensor of `gm` and of the graphs nested in it.

    Args:
        gm: the graph.
        known: where to put them; a new dict where None.
        inputs: the axes of the graph's inputs, where it is nested in another.
    """
    known = {} if known is None else known
    given = list(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and given:
            known[node] = _fitting(node, given.pop(0))
        elif node.op == "output":
            known[node] = [known.get(x) if isinstance(x, Node) else None for x in _listed(node.args[0])]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            known[node] = _nested(gm, node, known)
        else:
            known[node] = _axes_of_call(node, known)
    return known


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (tuple, list)) else [x]


def _fresh(node: Node) -> Any:
    value = example_value(node)
    if isinstance(value, Tensor):
        return [Axis(size, source=(node, i)) for i, size in enumerate(value.shape)]
    if isinstance(value, (tuple, list)):
        return tuple([Axis(size) for size in x.shape] if isinstance(x, Tensor) else None for x in value)
    return None


def _fitting(node: Node, axes: Any) -> Any:
    """The axes that came along, with sources that this graph can read."""
    own = _fresh(node)
    if not isinstance(axes, list) or not isinstance(own, list) or len(axes) != len(own):
        return own
    return axes


def _nested(gm: GraphModule, node: Node, known: AxesOf) -> Any:
    """Through a graph that is called, as a checkpointed block is."""
    first, *rest = node.args
    nested = nested_graph(gm, first) if isinstance(first, Node) else None
    if nested is None:
        return _fresh(node)
    placeholders = [each for each in nested.graph.nodes if each.op == "placeholder"]
    if len(placeholders) != len(rest):
        trace_axes(nested, known)
        return _fresh(node)
    trace_axes(nested, known, [known.get(x) if isinstance(x, Node) else None for x in rest])
    results = known[nested.graph.output_node()]
    value = example_value(node)
    if isinstance(value, (tuple, list)) and len(value) == len(results):
        return tuple(results)
    return _fresh(node)


def _axes_of_call(node: Node, known: AxesOf) -> Any:
    value, name = example_value(node), op_name(node)
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    before = known.get(first) if first is not None else None
    if name == "getitem" and isinstance(before, tuple):
        index = node.args[1]
        own = before[index] if isinstance(index, int) and index < len(before) else None
        return own if own is not None else _fresh(node)
    if name in _SPLITS and isinstance(before, list):
        return _split(node, before)
    if name == "unbind" and isinstance(before, list) and isinstance(value, (tuple, list)):
        dim = argument(node, 1, "dim", 0) % len(before)
        return tuple([*before[:dim], *before[dim + 1 :]] for _ in value)
    if not isinstance(value, Tensor):
        return _fresh(node)
    if name in ("cat", "concat", "concatenate"):
        return _joined(node, known)
    if name in _CONVOLUTIONS and isinstance(before, list) and value.dim() >= 3:
        fresh = _fresh(node)
        return [before[0], fresh[1], *(Axis(x.size, is_spatial=True, source=x.source) for x in fresh[2:])]
    if node.target is F.scaled_dot_product_attention:
        query = known.get(argument(node, 0, "query", None))
        return [*query[:-1], _fresh(node)[-1]] if isinstance(query, list) else _fresh(node)
    if not isinstance(before, list):
        return _aligned(node, value, known)
    if name in _REGROUPINGS:
        return _regrouped(node, before, value)
    if name in PERMUTATIONS:
        return _permuted(node, before)
    if name in ("unsqueeze", "squeeze", "getitem"):
        return _indexed(node, name, before, value)
    if name in _PRODUCTS:
        return [*before[:-1], _fresh(node)[-1]] if value.dim() == len(before) else _fresh(node)
    return _aligned(node, value, known)


def _aligned(node: Node, value: Tensor, known: AxesOf) -> Axes:
    """Dimensions of the size that an operand has at the same place, counted from the last."""
    axes = list(_fresh(node))
    for operand in node.all_input_nodes:
        theirs = known.get(operand)
        if not isinstance(theirs, list) or len(theirs) > value.dim():
            continue
        for i in range(1, len(theirs) + 1):
            if same_size(theirs[-i].size, value.shape[-i]) and theirs[-i].knowledge > axes[-i].knowledge:
                axes[-i] = theirs[-i]
    return axes


def _joined(node: Node, known: AxesOf) -> Axes:
    parts = [x for x in _listed(argument(node, 0, "tensors", ())) if isinstance(x, Node)]
    theirs = [known.get(x) for x in parts]
    axes = _fresh(node)
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


def _split(node: Node, before: Axes) -> Any:
    outs = _fresh(node)
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
    return _fresh(node) if order is None else [before[i] for i in order]


def _indexed(node: Node, name: str, before: Axes, value: Tensor) -> Any:
    fresh = _fresh(node)
    if name == "unsqueeze":
        at = argument(node, 1, "dim", 0) % value.dim()
        return [*before[:at], fresh[at], *before[at:]]
    if name == "squeeze":
        kept = [axis for axis in before if not same_size(axis.size, 1)]
        return kept if len(kept) == value.dim() else _fresh(node)
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
    fresh: Axes = _fresh(node)
    sizes = [axis.size for axis in before]
    axes: Axes = []
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
            axes += fresh[j : j + new]
        i, j = i + old, j + new
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
