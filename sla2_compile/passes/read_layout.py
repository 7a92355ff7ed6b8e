"""Read from the graph what the tokens of a site are: how many at either end are text, and the grid of the others.

    %video = flatten(conv3d(%x), 2).transpose(1, 2);  %q = ... cat([%text, %video], 1) ...
    ->  site.layout = TokenLayout(prefix=(77 tokens,), suffix=(), grid=(5, 16, 16))

`set_exact_tokens` then gives the op the lengths, as numbers or, where they are symbolic, as nodes that read them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from sla2_compile.config import SLA2Config
from sla2_compile.passes.axes import Axis
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
            site.layout = _layout(site, q[-2], k[-2])
    return sum(site.layout != TokenLayout() for site in sites)


def _layout(site: Site, q: Axis, k: Axis) -> TokenLayout:
    if not same_size(q.size, k.size):
        return _layout_of_longer_keys(site, q, k)
    if not q.joined or len(q.joined) != len(k.joined):
        return TokenLayout(grid=_grid(q) or _grid(k))
    if not all(same_size(x.size, y.size) for x, y in zip(q.joined, k.joined, strict=True)):
        return TokenLayout()
    sizes = [size_hint(part.size) for part in q.joined]
    at = sizes.index(max(sizes))
    text = _text_around(site, q.joined, at)
    return TokenLayout() if text is None else TokenLayout(*text, _grid(q.joined[at]) or _grid(k.joined[at]))


def _layout_of_longer_keys(site: Site, q: Axis, k: Axis) -> TokenLayout:
    """Where only the keys have text, the queries are the video or picture, and no token order fits both."""
    same = [i for i, part in enumerate(k.joined) if same_size(part.size, q.size)]
    text = _text_around(site, k.joined, same[0]) if len(same) == 1 else None
    return TokenLayout() if text is None else TokenLayout(*text)


def _text_around(site: Site, parts: Sequence[Axis], at: int) -> tuple[tuple[Axis, ...], tuple[Axis, ...]] | None:
    """The parts before and after the one that is video or picture; None where they are not text."""
    prefix, suffix = tuple(parts[:at]), tuple(parts[at + 1 :])
    is_text = num_tokens((*prefix, *suffix)) <= _MAX_TEXT_RATIO * size_hint(parts[at].size)
    return (prefix, suffix) if is_text and all(_can_read(site, part) for part in (*prefix, *suffix)) else None


def _can_read(site: Site, part: Axis) -> bool:
    """Whether the size of a part is a number or can be read in the site's own graph."""
    return isinstance(part.size, int) or (part.source is not None and part.source[0].graph is site.owner.graph)


def _grid(axis: Axis) -> tuple[int, int, int] | None:
    """(frames, height, width) that were merged into a dimension; a picture has one frame."""
    factors = list(axis.factors)
    while len(factors) > 3 and factors[0].size == 1:
        factors.pop(0)
    sizes = [factor.size for factor in factors]
    if not all(isinstance(size, int) for size in sizes) or sum(size > 1 for size in sizes) < 2:
        return None
    if len(sizes) == 2 and all(factor.is_spatial for factor in factors):
        return 1, sizes[0], sizes[1]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else None


def num_tokens(parts: Sequence[Axis]) -> int:
    """How many tokens parts of a sequence have, for the sizes that the graph was traced with."""
    return sum(size_hint(part.size) for part in parts)


def set_exact_tokens(sites: list[Site]) -> int:
    """Replace the traced numbers of exact tokens by the symbolic lengths they stand for; in how many sites."""
    num_symbolic = 0
    for site in sites:
        config = site.config
        if site.verdict != "sla2" or config is None:
            continue
        for name, parts in (("exact_prefix", site.layout.prefix), ("exact_suffix", site.layout.suffix)):
            is_inferred = parts and getattr(config, name) == num_tokens(parts)
            if is_inferred and not all(isinstance(part.size, int) for part in parts):
                site.node.kwargs = {**site.node.kwargs, name: _read_size(site, parts)}
                num_symbolic += 1
    return num_symbolic


def _read_size(site: Site, parts: Sequence[Axis]) -> Node | int:
    build = Builder(site.node)
    total: Node | int = 0
    for part in parts:
        size: Node | int = part.size
        if not isinstance(part.size, int):
            assert part.source is not None
            size = build.method("size", *part.source)
        total = size if total == 0 else build.function(operator.add, total, size)
    return total
