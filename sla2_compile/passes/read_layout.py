"""Read from the graph what the tokens of a site are: how many at either end are text, and the grid of the others.

    %video = flatten(conv3d(%x), 2).transpose(1, 2);  %q = ... cat([%text, %video], 1) ...
    ->  site.layout = TokenLayout(prefix=(77 tokens,), suffix=(), grid=(5, 16, 16))

`set_symbolic_sizes` then gives the op the sizes that are symbolic, as nodes that read them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule

from sla2_compile.config import SLA2Config
from sla2_compile.passes.axes import Axis
from sla2_compile.passes.carry_into import calls_around, carry_into
from sla2_compile.passes.edit_graph import Builder
from sla2_compile.passes.shapes import same_size
from sla2_compile.passes.sites import Site, TokenLayout, size_hint
from sla2_compile.passes.trace_axes import trace_axes

# Text is at most this share of the video or picture it is joined with; a longer part is another picture.
_MAX_TEXT_RATIO = 0.5


def read_layouts(gm: GraphModule, sites: list[Site], config: SLA2Config) -> int:
    """Set the layout of every site of `gm`; how many show anything."""
    if not config.infer_layout or not sites:
        return 0
    axes = trace_axes(gm)
    for site in sites:
        if not site.arguments:
            continue
        q, k = (axes.get(site.arguments[name]) for name in ("query", "key"))
        if isinstance(q, list) and isinstance(k, list):
            readable = {site.owner.graph, *(parent.graph for parent, _ in calls_around(site.owner, gm))}
            site.layout = _layout(q[-2], k[-2], readable)
    return sum(site.layout != TokenLayout() for site in sites)


def _layout(q: Axis, k: Axis, readable: set[Graph]) -> TokenLayout:
    if not same_size(q.size, k.size):
        return _layout_of_longer_keys(q, k, readable)
    if not q.joined or len(q.joined) != len(k.joined):
        return TokenLayout(grid=_grid(q, readable) or _grid(k, readable))
    if not all(same_size(x.size, y.size) for x, y in zip(q.joined, k.joined, strict=True)):
        return TokenLayout()
    sizes = [size_hint(part.size) for part in q.joined]
    at = sizes.index(max(sizes))
    text = _text_around(q.joined, at, readable)
    if text is None:
        return TokenLayout()
    return TokenLayout(*text, _grid(q.joined[at], readable) or _grid(k.joined[at], readable))


def _layout_of_longer_keys(q: Axis, k: Axis, readable: set[Graph]) -> TokenLayout:
    """Where only the keys have text, the queries are the video or picture, and no token order fits both."""
    same = [i for i, part in enumerate(k.joined) if same_size(part.size, q.size)]
    text = _text_around(k.joined, same[0], readable) if len(same) == 1 else None
    return TokenLayout() if text is None else TokenLayout(*text)


def _text_around(
    parts: Sequence[Axis], at: int, readable: set[Graph]
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]] | None:
    """The parts before and after the one that is video or picture; None where they are not text."""
    prefix, suffix = tuple(parts[:at]), tuple(parts[at + 1 :])
    is_text = num_tokens((*prefix, *suffix)) <= _MAX_TEXT_RATIO * size_hint(parts[at].size)
    return (prefix, suffix) if is_text and all(_can_read(part, readable) for part in (*prefix, *suffix)) else None


def _can_read(part: Axis, readable: set[Graph]) -> bool:
    """Whether the size of a part is a number, or can be read in one of these graphs."""
    return isinstance(part.size, int) or (part.source is not None and part.source[0].graph in readable)


def _grid(axis: Axis, readable: set[Graph]) -> tuple[Axis, Axis, Axis] | None:
    """(frames, height, width) that were merged into a dimension; a picture has one frame."""
    factors = list(axis.factors)
    while len(factors) > 3 and same_size(factors[0].size, 1):
        factors.pop(0)
    if len(factors) == 2 and all(factor.is_spatial for factor in factors):
        factors.insert(0, Axis(1))
    if len(factors) != 3 or sum(size_hint(factor.size) > 1 for factor in factors) < 2:
        return None
    frames, height, width = factors
    return (frames, height, width) if all(_can_read(factor, readable) for factor in factors) else None


def num_tokens(parts: Sequence[Axis]) -> int:
    """How many tokens parts of a sequence have, for the sizes that the graph was traced with."""
    return sum(size_hint(part.size) for part in parts)


def set_symbolic_sizes(gm: GraphModule, sites: list[Site]) -> int:
    """Replace traced numbers of exact tokens and grids by the symbolic sizes they stand for; in how many sites."""
    num_symbolic = 0
    for site in sites:
        config, layout = site.config, site.layout
        if site.verdict != "sla2" or config is None:
            continue
        symbolic: dict[str, Any] = {}
        for name, parts in (("exact_prefix", layout.prefix), ("exact_suffix", layout.suffix)):
            if _is_symbolic(parts) and getattr(config, name) == num_tokens(parts):
                first, *others = (_read_size(gm, site, part) for part in parts)
                symbolic[name] = functools.reduce(
                    functools.partial(Builder(site.node).function, operator.add), others, first
                )
        grid = layout.grid or ()
        if _is_symbolic(grid) and config.token_grid == tuple(size_hint(part.size) for part in grid):
            symbolic["token_grid"] = [_read_size(gm, site, part) for part in grid]
        site.node.kwargs = {**site.node.kwargs, **symbolic}
        num_symbolic += bool(symbolic)
    return num_symbolic


def _is_symbolic(parts: Sequence[Axis]) -> bool:
    return not all(isinstance(part.size, int) for part in parts)


def _read_size(gm: GraphModule, site: Site, part: Axis) -> Any:
    """A size of the site's sequence: a number, or a node of the site's graph that reads it."""
    if isinstance(part.size, int):
        return part.size
    assert part.source is not None
    node, dim = part.source
    owner, reader = site.owner, site.node
    if node.graph is not owner.graph:
        owner, reader = next((parent, call) for parent, call in calls_around(owner, gm) if parent.graph is node.graph)
    return carry_into(Builder(reader).method("size", node, dim), owner, site.owner, gm)
