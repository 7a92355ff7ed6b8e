"""What launchers compute from the shapes and strides of attention's tensors, in plain integers.

Triton's own helpers for the same cost more than a launch's worth of time.
"""

from __future__ import annotations

import math

from torch import Tensor

# Elements of one byte that the widest load spans.
MAX_UNIT = 16
# Registers of a thread of up to eight warps. Told this limit, the assembler uses what it needs; left alone it sometimes
# spills a few for the sake of more programs at a time.
MAX_REGISTERS = 255


def max_registers(num_warps: int) -> int:
    """Registers of a thread, of which a multiprocessor has 65,536 for all."""
    return min(MAX_REGISTERS, 65536 // (32 * num_warps))


def padded_dim(dim: int) -> int:
    """The head dimension as kernels compute with it: a power of two, at least 16."""
    return max(16, next_power_of_two(dim))


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, which is positive."""
    return 1 << (size - 1).bit_length()


def token_strides(*tensors: Tensor) -> tuple[int, tuple[int, ...]]:
    """How far apart batch elements, heads and tokens of tensors (B, H, N, D) are, as kernels take it.

    Returns:
        unit: the largest power of two that divides every stride, so that loads are as wide as it; 1 where that is 16 or
            more, which Triton sees by itself.
        strides: along B, H and N of each tensor, divided by `unit`; 0 along dimensions of one element.
    """
    strides = tuple(
        stride if size > 1 else 0 for x in tensors for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    unit = math.gcd(MAX_UNIT, *strides)
    if unit == MAX_UNIT:
        return 1, strides
    return unit, tuple(stride // unit for stride in strides)
