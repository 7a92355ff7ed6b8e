"""The linear tail's feature maps in the kernels for Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def feature_map(x, MAP: gl.constexpr):
    """phi of float32 rows, but for the row sums that a softmax divides by; those."""
    if MAP == "softmax":
        x = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2_E)
        return x, gl.sum(x, 1)
    if MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp2(gl.minimum(x, 0.0) * LOG2_E)), gl.max(x, 1) * 0.0 + 1.0
    return gl.maximum(x, 0.0), gl.max(x, 1) * 0.0 + 1.0
