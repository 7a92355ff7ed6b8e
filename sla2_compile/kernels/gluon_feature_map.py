"""The linear tail's feature maps in the kernels for Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)
# As in reference.py: a row of the linear tail whose weights sum to less has none.
MIN_LINEAR_WEIGHT = gl.constexpr(1e-30)


@gluon.jit
def feature_map(x, MAP: gl.constexpr):
    """phi of float32 rows, but for the row sums that a softmax divides by; those."""
    if MAP == "softmax":
        x = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2_E)
        return x, gl.sum(x, 1)
    if MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp2(gl.minimum(x, 0.0) * LOG2_E)), gl.max(x, 1) * 0.0 + 1.0
    return gl.maximum(x, 0.0), gl.max(x, 1) * 0.0 + 1.0


@gluon.jit
def weighed_features(q, z, weight, dtype: gl.constexpr, MAP: gl.constexpr):
    """phi(q) (64, D) by weight / (phi(q) . z), what the linear tail multiplies a state by, in `dtype`."""
    features, size = feature_map(q, MAP)
    z = gl.convert_layout(z, gl.SliceLayout(0, features.type.layout))
    mass = gl.sum(features * z[None, :], 1)
    features = features * gl.where(mass > size * MIN_LINEAR_WEIGHT, weight / mass, 0.0)[:, None]
    if dtype == gl.float16:
        # As `to_finite` of the other kernels.
        features = gl.minimum(features, 65504.0)
    return features.to(dtype)
