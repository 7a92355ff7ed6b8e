"""One step of `gluon_backward_keys.py` and `gluon_backward_tail.py`: what 64 query rows add to 64 keys' gradients."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from sla2_compile.kernels.gluon_stream import left_operand, scores_layout


@gluon.jit
def add_rows(dk, dv, k_smem, v_smem, q, grad, rows, cap, bias, factor, VALUES: gl.constexpr):
    """dk and dv with the products of one tile of rows, which has arrived.

    Scores are (keys, rows), so that neither they nor their gradients go through memory on their way into the next
    product. The exponentials run while dO v^T is multiplied, and dS is made while P^T dO is.

    Args:
        dk, dv: (64, D) float32 sums, in an `out_layout`.
        k_smem, v_smem: (64, D) keys and values in shared memory.
        q, grad: (64, D) rows of q and dO, likewise.
        rows: (2, 64) float32 of the rows, likewise: log-sum-exps in base 2, offsets.
        cap: (2, 64) the largest scores in base 2 first, or None.
        bias: (64,) what is added to the keys' scores in base 2, or None.
        factor: what makes a score in base 2 of a product.
        VALUES: whether there are values; dv is not changed otherwise.
    """
    layout: gl.constexpr = scores_layout(2)
    left: gl.constexpr = left_operand(dk.type.layout, 2)
    nothing = gl.zeros([64, 64], gl.float32, layout=layout)
    score_token = warpgroup_mma(k_smem, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if VALUES:
        prob_token = warpgroup_mma(v_smem, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[score_token])
    else:
        scores = warpgroup_mma_wait(0, deps=[score_token])
    scores = scores * factor - rows.slice(0, 1, dim=0).load(layout)
    if bias is not None:
        scores += bias[:, None]
    if cap is not None:
        scores = gl.minimum(scores, cap.slice(0, 1, dim=0).load(layout))
    probs = gl.exp2(scores)
    if VALUES:
        dv_token = warpgroup_mma(gl.convert_layout(probs.to(q.dtype), left), grad, dv, is_async=True)
        d_probs = warpgroup_mma_wait(1, deps=[prob_token])
        d_scores = probs * (d_probs - rows.slice(1, 1, dim=0).load(layout))
        dk_token = warpgroup_mma(gl.convert_layout(d_scores.to(q.dtype), left), q, dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, deps=[dk_token, dv_token])
    else:
        d_scores = probs * (0.0 - rows.slice(1, 1, dim=0).load(layout))
        dk_token = warpgroup_mma(gl.convert_layout(d_scores.to(q.dtype), left), q, dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk_token])
    return dk, dv
