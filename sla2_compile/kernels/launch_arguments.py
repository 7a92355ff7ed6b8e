"""What launchers compute from the shapes and strides of attention's tensors, in plain integers.

Triton's own helpers for the same cost more than a launch's worth of time.
"""

from __future__ import annotations

import math

from torch import Tensor

# Elements of one byte that the widest load spans.
MAX_UNIT = 16


def padded_dim(dim: int) -> int:
    """The head dimension as kernels compute with it: a power of two, at least 16."""
    return max(16, next_power_of_two(dim))


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, which is positive."""
    return 1 << (size - 1).bit_length()


def token_strides(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """How far apart batch elements, heads and tokens of tensors (B, H, N, D) are, as kernels take it.

    Returns:
        unit: the largest power of two, at most 16, that divides every stride: so many elements a load may span.
        strides: along B, H and N of each tensor, divided by `unit`; 0 along dimensions of one element.
    """
    strides = tuple(x.stride(i) if x.shape[i] > 1 else 0 for x in tensors for i in range(3))
    unit = math.gcd(MAX_UNIT, *strides)
    return unit, tuple(stride // unit for stride in strides)
