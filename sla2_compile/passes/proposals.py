"""`Proposal`: an attention that the model spells in other ways, written as an SDPA node beside the original.

The normalising passes only propose. Once every site is decided, `settle_proposals` puts the chosen ones in place of
the originals and takes the others back, so that what stays dense is what the model's author wrote, bit for bit:

    %p = softmax(%q @ %k.mT * 0.125);  %out = %p @ %v                                  what the model has
    %a = scaled_dot_product_attention(%q, %k, %v, scale=0.125)                         proposed, without users
    ->  chosen: %a in place of %out, whose chain goes;   not chosen: %a goes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from sla2_compile.passes.edit_graph import Builder, erase_dead, example_value
from sla2_compile.passes.read_node import PERMUTATIONS, op_name, permutation
from sla2_compile.passes.shapes import same_shape

if TYPE_CHECKING:
    from sla2_compile.passes.sites import Site


@dataclass
class Proposal:
    """One attention, as the model has it and as an SDPA node.

    Args:
        owner: the graph that holds the nodes.
        original: the node whose value the model reads.
        attention: the SDPA node; None where no such node can stand for the original.
        result: what takes the original's place: `attention`, or what follows it.
        chain: the nodes that become dead with the original, in order.
        obstacle: why the original must stay although it is attention; None where nothing speaks against it.
    """

    owner: GraphModule
    original: Node
    attention: Node | None
    result: Node | None
    chain: list[Node] = field(default_factory=list)
    obstacle: str | None = None


def settle_proposals(sites: list[Site]) -> int:
    """Put the proposals of sites that become SLA2 in their place, and erase the others; how many were put in place."""
    num_taken = 0
    for site in sites:
        if site.verdict == "sla2":
            if site.proposal is not None:
                _take(site.proposal)
                num_taken += 1
            continue
        if site.proposal is not None:
            site.node = site.proposal.original
            if site.proposal.result is not None:
                erase_dead([site.proposal.result])
        # Masks that were narrowed for the decision have no user now.
        masks = (site.arguments.get("attn_mask"), site.query_mask)
        erase_dead([mask for mask in masks if isinstance(mask, Node)])
    return num_taken


def _take(proposal: Proposal) -> None:
    original, result = proposal.original, proposal.result
    assert result is not None
    assert proposal.attention is not None
    original.replace_all_uses_with(result)
    if result.target == "flatten":
        _skip_merge_of_heads(result)
    erase_dead([*reversed(proposal.chain), original], also=[*proposal.chain, original])


def _skip_merge_of_heads(merged: Node) -> None:
    """Where (B*H, N, D) comes apart again, read what was merged instead: a merge is a copy.

    %m = flatten(%a, 0, 1);  view(%m, B, H, N, D)                            ->  %a
    %m = flatten(%a, 0, 1);  view(contiguous(transpose(%m, 0, 1)), N, B, C)  ->  view(contiguous(permute(%a, ...)), ...)
    """
    split = merged.args[0]
    assert isinstance(split, Node)
    for user in list(merged.users):
        splits = user.op == "call_method" and user.target in ("view", "reshape", "unflatten")
        if splits and same_shape(example_value(user).shape, example_value(split).shape):
            user.replace_all_uses_with(split)
            erase_dead([user])
        elif op_name(user) in PERMUTATIONS and permutation(user, 3) == [1, 0, 2] and _comes_apart(user):
            _move_views(user, Builder(user).method("permute", split, 2, 0, 1, 3))
    erase_dead([merged])


def _comes_apart(x: Node) -> bool:
    """Whether all that is ever done to `x` is to copy it and to give it another shape."""
    return all(
        op_name(user) in ("view", "reshape") or (op_name(user) == "contiguous" and _comes_apart(user))
        for user in x.users
    )


def _move_views(old: Node, new: Node) -> None:
    """Let the copies and views of `old` be those of `new`, which holds the same numbers in the same order."""
    for user in list(old.users):
        if op_name(user) == "contiguous":
            _move_views(user, Builder(user).method("contiguous", new))
        else:
            user.replace_input_with(old, new)
    erase_dead([old])
