"""`Axis`: one dimension of one tensor, and what it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from sla2_compile.passes.edit_graph import example_value


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension.

    Args:
        size: plain or symbolic.
        merged: the axes that a reshape merged into it, slowest first.
        joined: the axes that a cat put one after the other along it.
        is_spatial: a dimension of a convolution's output other than batch and channels, or a number of patches.
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


def listed(x: Any) -> list[Any]:
    """One or several, as a list."""
    return list(x) if isinstance(x, (tuple, list)) else [x]


def fresh_axes(node: Node) -> Any:
    """Axes of which nothing is known but their sizes: a list for a tensor, a tuple of lists for several."""
    value = example_value(node)
    if isinstance(value, Tensor):
        return [Axis(size, source=(node, i)) for i, size in enumerate(value.shape)]
    if isinstance(value, (tuple, list)):
        return tuple([Axis(size) for size in x.shape] if isinstance(x, Tensor) else None for x in value)
    return None
