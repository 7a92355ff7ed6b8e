"""`ScoreChain`: what is known of one attention that is spelled out as products and a softmax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from sla2_compile.passes.contractions import Contraction, Labels

# The label of the token axis of the left and of the right operand of the first product, and of merged batch and heads.
LEFT, RIGHT, MERGED = "<left>", "<right>", "<merged>"


@dataclass(frozen=True)
class Mask:
    """A mask met on the way.

    Args:
        node: the mask.
        form: bool, True where a key is hidden ("hidden") or kept ("kept"), or a float that is added ("added").
        axes: the labels of the scores it was applied to.
    """

    node: Node
    form: Literal["hidden", "kept", "added"]
    axes: Labels


@dataclass(frozen=True)
class ScoreChain:
    """The state of following: after the last product, all that is known of one attention.

    Args:
        first: the product of q and k.
        node: where following stands; at the end, the product with v.
        axes: one label per dimension of `node`: batch labels of `first`, LEFT, RIGHT, MERGED.
        batch: the batch labels of `first` in the order of its output.
        tokens: the labels in `first` of the axes LEFT and RIGHT.
        num_heads: where a merged batch was split on the way, into how many heads; None otherwise.
        scale: of the scores.
        factors: scalars known only at run time that the scores are multiplied by, or (True) divided by.
        masks: in the order of application.
        keys: which token axis the softmax runs over; None before the softmax.
        dropout_p: of the probabilities.
        nodes: everything from `first` to the node before the last.
        obstacle: why it cannot be written as scaled dot product attention.
        last: the product with v; None on the way.
    """

    first: Contraction
    node: Node
    axes: Labels
    batch: Labels
    tokens: dict[str, str]
    num_heads: int | None = None
    scale: float = 1.0
    factors: tuple[tuple[Node, bool], ...] = ()
    masks: tuple[Mask, ...] = ()
    keys: str | None = None
    dropout_p: float = 0.0
    nodes: tuple[Node, ...] = ()
    obstacle: str | None = None
    last: Contraction | None = None

    def step(self, node: Node, **changes: Any) -> ScoreChain:
        return dataclasses.replace(self, node=node, nodes=(*self.nodes, self.node), **changes)

    def blocked(self, reason: str) -> ScoreChain:
        return self if self.obstacle else dataclasses.replace(self, obstacle=reason)
