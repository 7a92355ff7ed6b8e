"""Comparing sizes that may be symbolic, without adding a guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols stand for."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever the symbols stand for."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_product(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of sizes multiply to the same number, whatever the symbols stand for."""
    return same_size(math.prod(a), math.prod(b))
