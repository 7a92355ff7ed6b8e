"""What each query row brings to the backward's other kernels, and the gradients of a's logit and gain.

With s = dO . O_s, d = dO . O, spread = s - d, gain g (0 for block mixing) and weight a, other kernels compute, in base
2 and with scores already multiplied by scale and log2(e),

    kept keys     p = exp2(scores - sparse_lse') = a P,        dS = p (dO . v - offset),
                  offset = d + spread (1 - g)
    pooled tail   r = exp2(scores - tail_lse') = (1 - a) R,    dt = r (dO . v_bar - tail_offset),
                  tail_offset = d - a / (1 - a) spread (1 - g)
    linear tail   numerator's gradient linear_weight dO / w,  linear_weight = 1 - a,   w = phi(q) . Z
                  and, with row mixing, for the pooled scores  dt = R (-tail_offset),  tail_offset = a g spread

so that the inner loops do not know of mixing. The quotient is bounded: where 1 - a is below 2^-64, spread is rounding
error. Where smoothed keys' scores made the sparse log-sum-exp it carries q . mean(k) as well, and the kernels read k as
it is. Low-bit scores may lie far below these: p is then kept at most a, `sparse_cap` its log2, and r of a pooled tail
at most 1 - a, `tail_cap`. Rows past the last token get probability 0.

The logit's gradient is the sum of a spread, the gain's that of a spread times the difference of the log-sum-exps. Where
a is near 1 spread is the difference of two rounded outputs. With a linear tail both gradients are found anew from the
branches' own (`triton_backward_linear_queries.py`), and in float32 with a pooled one from the tail's product, (1 - a)
dO . O_t, which q's kernel sums up (`mixing_gradients`): 16-bit inputs are no better than their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, load_tile, token_of

LOG2_E = tl.constexpr(1.4426950408889634)
FIELDS = (
    "sparse_lse", "offset", "tail_lse", "tail_offset", "linear_weight", "linear_product", "sparse_cap",
    "tail_cap", "sparse_product", "lse_difference",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Each (B H, M * block_q) float32, in visiting order; a field that the settings do not use is not written."""

    sparse_lse: Tensor
    offset: Tensor
    tail_lse: Tensor
    tail_offset: Tensor
    linear_weight: Tensor
    linear_product: Tensor  # (1 - a) dO . O_l, which the linear tail's kernel for dq finds
    sparse_cap: Tensor
    tail_cap: Tensor
    sparse_product: Tensor  # dO . O_s, and how the branches' log-sum-exps differ, for who finds a's gradients anew
    lse_difference: Tensor


@triton.jit
def _rows_kernel(
    grad_ptr, q_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr, kept_ptr, logit_ptr, gain_ptr, k_mean_ptr,
    num_nonempty_ptr, order_ptr, rows_ptr, d_logit_ptr, d_gain_ptr,
    grad_sb, grad_sh, grad_sn, q_sb, q_sh, q_sn, out_sb, out_sh, out_sn, sparse_out_sb, sparse_out_sh, sparse_out_sn,
    sparse_lse_sb, sparse_lse_sh, sparse_lse_sn, tail_lse_sb, tail_lse_sh, tail_lse_sn,
    H, GROUP, N, M, T, slots, field_size, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr, LINEAR: tl.constexpr,
    CAP: tl.constexpr, ANEW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B M H,). logit_ptr, gain_ptr, k_mean_ptr, num_nonempty_ptr and order_ptr may be None.

    ANEW: `mixing_gradients` follows.
    """
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    out_sb, out_sh, out_sn = in_elements((out_sb, out_sh, out_sn), UNIT)
    sparse_out_sb, sparse_out_sh, sparse_out_sn = in_elements((sparse_out_sb, sparse_out_sh, sparse_out_sn), UNIT)
    b, h, m = heads_fastest(tl.program_id(0).to(tl.int64), H, M)
    head = b * H + h
    row = head * M + m
    grad_ptr += b * grad_sb + h * grad_sh
    q_ptr += b * q_sb + h * q_sh
    out_ptr += b * out_sb + h * out_sh
    sparse_out_ptr += b * sparse_out_sb + h * sparse_out_sh
    sparse_lse_ptr += b * sparse_lse_sb + h * sparse_lse_sh
    tail_lse_ptr += b * tail_lse_sb + h * tail_lse_sh
    rows_ptr += head * M * BLOCK_Q
    field_size = tl.cast(field_size, tl.int64)

    num_nonempty = T if num_nonempty_ptr is None else tl.load(num_nonempty_ptr + b)
    has_tail = tl.load(kept_ptr + row * (1 + slots)) < num_nonempty
    logit = 0.0 if logit_ptr is None else tl.load(logit_ptr + h * M + m).to(tl.float32)
    gain = 0.0 if gain_ptr is None else tl.load(gain_ptr + h).to(tl.float32)
    d_logit = tl.zeros([], tl.float32)
    d_gain = tl.zeros([], tl.float32)
    for first in tl.range(0, BLOCK_Q, TILE, num_stages=1):
        position = m * BLOCK_Q + first + tl.arange(0, TILE)
        exists = position < N
        token = token_of(order_ptr, position, N)
        grad = load_tile(grad_ptr, token, exists, grad_sn, D, BLOCK_D).to(tl.float32)
        out = load_tile(out_ptr, token, exists, out_sn, D, BLOCK_D).to(tl.float32)
        sparse_out = load_tile(sparse_out_ptr, token, exists, sparse_out_sn, D, BLOCK_D).to(tl.float32)
        sparse_lse = tl.load(sparse_lse_ptr + token * sparse_lse_sn, mask=exists, other=0.0)
        tail_lse = tl.load(tail_lse_ptr + token * tail_lse_sn, mask=exists, other=0.0)
        d = tl.sum(grad * out, 1)

        has_keys = exists & (tl.abs(sparse_lse) < float("inf"))
        difference = tl.where(has_keys & has_tail & (tl.abs(tail_lse) < float("inf")), sparse_lse - tail_lse, 0.0)
        # log2 of a and 1 - a, exact where 1 - sigmoid(z) would have lost every digit.
        z = (logit + gain * difference) * LOG2_E
        softplus = tl.log2(1 + tl.exp2(-tl.abs(z)))
        log_a = tl.where(has_tail, tl.minimum(z, 0.0) - softplus, 0.0)
        a = tl.exp2(log_a)
        log_rest = tl.minimum(-z, 0.0) - softplus
        # The difference of the outputs first: they may be nearly the same, and sums of either have lost digits.
        spread = tl.where(has_tail & exists, tl.sum(grad * (sparse_out - out), 1), 0.0)
        d_alpha = a * spread
        d_logit += tl.sum(d_alpha, 0)
        if gain_ptr is not None:
            d_gain += tl.sum(d_alpha * difference, 0)

        lse = sparse_lse * LOG2_E - log_a
        if k_mean_ptr is not None:
            dims = tl.arange(0, BLOCK_D)
            kv_head = b * (H // GROUP) + h // GROUP
            k_mean = tl.load(k_mean_ptr + kv_head * D + dims, mask=dims < D, other=0.0)
            q = load_tile(q_ptr, token, exists, q_sn, D, BLOCK_D).to(tl.float32)
            lse += tl.sum(q * k_mean[None, :], 1) * (scale * LOG2_E)
        tl.store(rows_ptr + position, tl.where(has_keys, lse, float("inf")))
        tl.store(rows_ptr + field_size + position, d + spread * (1 - gain))
        in_tail = exists & has_tail & (tl.abs(tail_lse) < float("inf"))
        if CAP or LINEAR or ANEW:
            tl.store(rows_ptr + 6 * field_size + position, log_a)
        if LINEAR:
            tail_lse = tail_lse * LOG2_E
            tl.store(rows_ptr + 3 * field_size + position, gain * d_alpha)
            tl.store(rows_ptr + 4 * field_size + position, tl.where(has_tail & exists, tl.exp2(log_rest), 0.0))
        else:
            tail_lse = tail_lse * LOG2_E - log_rest
            tail_offset = d - tl.exp2(tl.minimum(z, 64.0)) * spread * (1 - gain)
            tl.store(rows_ptr + 3 * field_size + position, tail_offset)
            if CAP or ANEW:
                tl.store(rows_ptr + 7 * field_size + position, log_rest)
        if LINEAR or ANEW:
            tl.store(rows_ptr + 8 * field_size + position, tl.where(exists, d + spread, 0.0))
            tl.store(rows_ptr + 9 * field_size + position, difference)
        tl.store(rows_ptr + 2 * field_size + position, tl.where(in_tail, tail_lse, float("inf")))
    tl.store(d_logit_ptr + row, d_logit)
    tl.store(d_gain_ptr + row, d_gain)


def row_statistics(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    sparse_out: Tensor,
    sparse_lse: Tensor,
    tail_lse: Tensor,
    kept: Tensor,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    k_mean: Tensor | None,
    num_nonempty: Tensor | None,
    order: Tensor | None,
    num_key_blocks: int,
    group: int,
    settings: Settings,
) -> tuple[Rows, Tensor, Tensor]:
    """The rows, and d logit and d gain of each query block, (B, H, M) float32.

    Args:
        grad_out, q, out, sparse_out: (B, H, N, D), the last stride 1.
        sparse_lse, tail_lse: (B, H, N) float32.
        kept: (B, H, M, 1 + slots) int32.
        alpha_logit: (H, M) or None.
        alpha_gain: (H,), None for block mixing.
        k_mean: (B, G, D) float32 what smoothing subtracted, or None.
        num_nonempty: (B,) int32 key blocks with a real key; None: all have one.
        order: (N,) int32 visiting order, or None.
        num_key_blocks: T.
        group: query heads of one key head.
        settings: the op's.
    """
    (batch, heads, q_len, dim), blocks = q.shape, kept.shape[2]
    rows = q.new_empty(len(FIELDS), batch * heads, blocks * settings.block_q, dtype=torch.float32)
    d_logit, d_gain = (q.new_empty(batch, heads, blocks, dtype=torch.float32) for _ in range(2))
    unit, strides = token_strides(grad_out, q, out, sparse_out)
    launch(
        _rows_kernel, (batch * heads * blocks,),
        grad_out, q, out, sparse_out, sparse_lse, tail_lse, kept.contiguous(),
        None if alpha_logit is None else alpha_logit.contiguous(),
        None if alpha_gain is None else alpha_gain.contiguous(),
        k_mean, num_nonempty, order, rows, d_logit, d_gain,
        *strides, *sparse_lse.stride(), *tail_lse.stride(),
        heads, group, q_len, blocks, num_key_blocks, kept.shape[3] - 1, rows.stride(0), settings.scale,
        D=dim, BLOCK_D=padded_dim(dim), BLOCK_Q=settings.block_q,
        TILE=16 if dim > 128 else min(settings.block_q, 32), LINEAR=settings.tail == "linear",
        CAP=settings.qk_format is not None, ANEW=finds_mixing_anew(q, settings), UNIT=unit, num_warps=4,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return Rows(*rows), d_logit, d_gain


def finds_mixing_anew(q: Tensor, settings: Settings) -> bool:
    """Whether the gradients of a's logit and gain are those of `mixing_gradients`."""
    return q.dtype == torch.float32 and settings.tail == "pooled" and not settings.is_low_bit


def mixing_gradients(d_logit: Tensor, d_gain: Tensor, rows: Rows, tail_product: Tensor, settings: Settings) -> None:
    """Write d logit and d gain of each query block, (B, H, M), of a pooled tail.

    tail_product: (B H, M * block_q) float32 (1 - a) dO . O_t.
    """
    a, rest = rows.sparse_cap.exp2(), rows.tail_cap.exp2()
    d_alpha = torch.where(rows.sparse_cap < 0, a * (rest * rows.sparse_product - tail_product), 0.0)
    torch.sum(d_alpha.view(*d_logit.shape, -1), 3, out=d_logit)
    if settings.mixing == "row":
        torch.sum((d_alpha * rows.lse_difference).view(*d_gain.shape, -1), 3, out=d_gain)
