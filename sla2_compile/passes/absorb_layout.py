"""Drop copies that only make an attention's inputs contiguous: the op reads any strides.

    %c = call_method[contiguous](%q);  %out = call_function[sla2.attention](%c, %k, %v)
    ->  %out = call_function[sla2.attention](%q, %k, %v)

Transposes and reshapes that are views cost nothing and stay; a copy that something else reads stays too.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sla2_compile.passes.edit_graph import erase_dead
from sla2_compile.passes.sites import Site


def absorb_layout(sites: list[Site]) -> int:
    """Pass every copy of q, k, v by, in the sites that were rewritten; how many copies were passed by."""
    num_absorbed = 0
    for site in sites:
        if site.verdict != "sla2":
            continue
        args: list[Any] = list(site.node.args)
        for i in range(3):
            while _is_copy_for(args[i], site.node):
                copy, args[i] = args[i], args[i].args[0]
                num_absorbed += 1
                site.node.args = tuple(args)
                erase_dead([copy])
    return num_absorbed


def _is_copy_for(x: Any, site: Node) -> bool:
    is_copy = isinstance(x, Node) and x.op == "call_method" and x.target == "contiguous"
    return is_copy and len(x.args) == 1 and not x.kwargs and set(x.users) == {site}
