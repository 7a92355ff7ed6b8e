"""Give the sites whose mask only broadcasts a key-padding mask that mask, (B, 1, 1, N) bool, as their argument.

%m = expand(%kept[:, None, None, :], -1, 8, 4096, -1);  scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
->  site.arguments["attn_mask"] = %m[:, :1, :1]         the call itself stays as it is
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.edit_graph import Builder, example_value
from sla2_compile.passes.masks import narrow_mask
from sla2_compile.passes.sites import Site


def narrow_masks(sites: list[Site]) -> int:
    """Narrow the masks of `sites`; how many were."""
    num_narrowed = 0
    for site in sites:
        mask = site.arguments.get("attn_mask")
        if not isinstance(mask, Node) or not isinstance(example_value(mask), Tensor):
            continue
        last = site.node.prev
        narrow = narrow_mask(mask, Builder(site.node))
        if narrow is not None and narrow is not mask:
            site.arguments["attn_mask"] = narrow
            num_narrowed += 1
        elif narrow is None:
            # What was added before it turned out that the mask is another.
            while site.node.prev is not last:
                site.node.graph.erase_node(site.node.prev)
    return num_narrowed
