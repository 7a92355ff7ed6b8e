"""phi of the linear tail and its gradient, in float32; see `reference.feature_map`. And weights that fit float16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def feature_map(x, D: tl.constexpr, BLOCK_D: tl.constexpr, NAME: tl.constexpr):
    """phi of the rows of x (R, BLOCK_D); 0 past the head dimension."""
    inside = (tl.arange(0, BLOCK_D) < D)[None, :]
    if NAME == "softmax":
        x = tl.where(inside, x, float("-inf"))
        exp = tl.exp(x - tl.max(x, 1)[:, None])
        return exp / tl.sum(exp, 1)[:, None]
    elif NAME == "elu":
        return tl.where(inside, tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0))), 0.0)
    else:
        return tl.where(inside, tl.maximum(x, 0.0), 0.0)


@triton.jit
def feature_map_gradient(x, phi, grad, NAME: tl.constexpr):
    """Gradient of x from that of phi = feature_map(x)."""
    if NAME == "softmax":
        return phi * (grad - tl.sum(grad * phi, 1)[:, None])
    elif NAME == "elu":
        return grad * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        return tl.where(x > 0, grad, 0.0)


@triton.jit
def to_finite(x, dtype: tl.constexpr):
    """`x` in a 16-bit dtype; float16's largest number where it is larger.

    A row of the linear tail divides by phi(q) . Z, which is next to nothing where no key of the tail is near the query.
    """
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)
