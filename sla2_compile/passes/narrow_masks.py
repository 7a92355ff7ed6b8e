"""Give the sites whose mask only hides keys, or whole queries, the mask of the keys as their argument.

%m = expand(%kept[:, None, None, :], -1, 8, 4096, -1);  scaled_dot_product_attention(%q, %k, %v, attn_mask=%m)
->  site.arguments["attn_mask"] = %m[:, :1, :1]         the call itself stays as it is

%m = %kept[:, None, None, :] & %kept[:, None, :, None]
->  site.arguments["attn_mask"] = %kept[:, None, None, :];  site.query_mask = %kept[:, None, :, None]
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.edit_graph import Builder, erase_unused_after, example_value
from sla2_compile.passes.masks import SplitMask, split_mask
from sla2_compile.passes.sites import Site


def narrow_masks(sites: list[Site]) -> int:
    """Narrow the masks of `sites`; how many were."""
    num_narrowed = 0
    for site in sites:
        mask = site.arguments.get("attn_mask")
        if not isinstance(mask, Node) or not isinstance(example_value(mask), Tensor):
            continue
        last = site.node.prev
        split = split_mask(mask, Builder(site.node))
        if split is not None and _is_allowed(site, split):
            num_narrowed += split.keys is not mask
            site.arguments["attn_mask"], site.query_mask = split.keys, split.queries
        erase_unused_after(last, site.node, keep=(site.arguments["attn_mask"], site.query_mask))
    return num_narrowed


def _is_allowed(site: Site, split: SplitMask) -> bool:
    """A softmax that the model spells out gives a query that sees nothing NaN or a mean, not 0."""
    return split.queries is None or site.proposal is None
