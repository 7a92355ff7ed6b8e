"""A tile's scores and their gradients, for `gluon_backward_queries.py`: how they are issued, masked, put together."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from sla2_compile.kernels.gluon_stream import scores_layout
from sla2_compile.kernels.gluon_tiles import slot_of


@gluon.jit
def issue_scores(q, grad, k_smem, v_smem, step):
    """Scores of tile `step` and the gradients of its probabilities, both in flight; the tile has arrived."""
    slot = slot_of(step, k_smem.shape[0])
    empty = gl.zeros([64, 64], gl.float32, layout=scores_layout(2))
    scores = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
    d_probs = warpgroup_mma(grad, v_smem.index(slot).permute((1, 0)), empty, use_acc=False, is_async=True)
    return scores, d_probs


@gluon.jit
def _past(limit):
    """Bits from number `limit` on, not negative, of a word of 32."""
    return gl.where(limit < 32, -1 << (limit & 31), 0)


@gluon.jit
def _has_bit(low, high):
    """Which of 64 columns have their bit set in two words."""
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, scores_layout(2)))
    # In two parts: the first is the same for all columns of a thread, the second a constant.
    word = (gl.where(column < 32, low, high) >> (column & 6)) >> (column & 25)
    return (word & 1) != 0


@gluon.jit
def mask_short(scores, last_size):
    """-inf for keys past the end in the last, short key block."""
    is_past = _has_bit(_past(last_size), _past(gl.maximum(last_size - 32, 0)))
    return gl.where(is_past[None, :], float("-inf"), scores)


@gluon.jit
def mask(scores, first, low, high, T, last_size, last_bias, RAGGED: gl.constexpr):
    """-inf for keys past the end, or for means from `first` on, not negative, of kept blocks and past the last.

    low, high: words whose bits say which means are of kept blocks; 0 for keys.
    last_bias: what a mean of the last, short block weighs less than others.
    """
    is_mean = first >= 0
    limit = gl.where(is_mean, T - first, last_size)
    low, high = low | _past(limit), high | _past(gl.maximum(limit - 32, 0))
    scores = gl.where(_has_bit(low, high)[None, :], float("-inf"), scores)
    if RAGGED:
        # The bit of that block, if it is here.
        place = gl.where(is_mean & (limit <= 64), limit - 1, -1)
        low = gl.where((place >= 0) & (place < 32), 1 << (place & 31), 0)
        high = gl.where(place >= 32, 1 << (place & 31), 0)
        scores += gl.where(_has_bit(low, high), last_bias, 0.0)[None, :]
    return scores


@gluon.jit
def _to_16_bits(x, dtype: gl.constexpr):
    """float32 to 16 bits, in pairs, here and now: the compiler does it, and what leads to it, behind the next wait."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def score_gradient(scores, d_probs, lse, offset, cap, factor, dtype: gl.constexpr, CAP: gl.constexpr):
    """dS (64, 64) of scores and d_probs, for each row's log-sum-exp in base 2 and offset."""
    scores = scores * factor - lse[:, None]
    if CAP:
        scores = gl.minimum(scores, cap[:, None])
    return _to_16_bits(gl.exp2(scores) * (d_probs - offset[:, None]), dtype)
