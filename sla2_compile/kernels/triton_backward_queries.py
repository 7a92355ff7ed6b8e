"""Gradient of q: each query block over the key blocks it keeps, then over the block means of the others.

For shape (1, 12, 32760, 128) at 97 %: 0.44 TFLOP (3 matmuls per pair of tiles); K and V tiles come from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import max_registers, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import (
    FLOAT32_CHUNK,
    in_elements,
    is_real,
    load_tile,
    query_block,
    scores_in_float32,
    store_tile,
    token_of,
)
from sla2_compile.kernels.triton_backward_rows import LOG2_E, Rows
from sla2_compile.kernels.triton_statistics import Statistics


@dataclass(frozen=True)
class QueriesConfig:
    rows: int  # query rows of a program
    keys: int  # keys of a step
    num_warps: int
    num_stages: int


def queries_config(dim: int, itemsize: int, shared_memory: int) -> QueriesConfig:
    """For a head dim and a GPU with so many bytes of shared memory per program."""
    large = shared_memory >= 200 * 1024
    if itemsize == 4:
        return QueriesConfig(32, 32, 8 if dim <= 128 else 16, 1)
    if dim <= 64:
        return QueriesConfig(128, 64, 8, 3) if large else QueriesConfig(64, 32, 4, 2)
    if dim <= 128:
        return QueriesConfig(128, 64, 8, 2) if large else QueriesConfig(64, 32, 4, 2)
    return QueriesConfig(128, 32, 8, 2) if large else QueriesConfig(32, 32, 4, 1)


@triton.jit
def _kept_step(
    dq, dropped, q, grad, q_ptr, grad_ptr, q_token, exists, q_sn, grad_sn, lse, offset, cap, k_ptr, v_ptr, real_ptr,
    order_ptr, k_sn, v_sn, position, N_KV, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, CHECK: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of kept keys; with CHECK some may not be real. `dropped` sums dS where keys are smoothed."""
    token = token_of(order_ptr, position, N_KV)
    real = is_real(real_ptr, token, position, N_KV) if CHECK else None
    k = load_tile(k_ptr, token, real, k_sn, D, BLOCK_D)
    if PRECISION == "ieee":
        inside = real if CHECK else position < N_KV
        scores = scores_in_float32(
            q_ptr, q_token, exists, q_sn, k_ptr, token, inside, k_sn, D, BLOCK_D, ROWS, KEYS, FLOAT32_CHUNK
        )
        d_probs = scores_in_float32(
            grad_ptr, q_token, exists, grad_sn, v_ptr, token, inside, v_sn, D, BLOCK_D, ROWS, KEYS, FLOAT32_CHUNK
        )
    else:
        v = load_tile(v_ptr, token, real, v_sn, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    scores = scores * scale_log2 - lse[:, None]
    if CAP:
        scores = tl.minimum(scores, cap[:, None])
    if CHECK:
        scores = tl.where(real[None, :], scores, float("-inf"))
    d_scores = (tl.exp2(scores) * (d_probs - offset[:, None])).to(k.dtype)
    if SMOOTH:
        dropped += tl.sum(d_scores.to(tl.float32), 1)
    return tl.dot(d_scores, k, dq, input_precision=PRECISION), dropped


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, kept_ptr, bits_ptr, k_bar_ptr, v_bar_ptr, n_ptr, k_mean_ptr, real_ptr, order_ptr,
    sparse_lse_ptr, offset_ptr, sparse_cap_ptr, tail_lse_ptr, tail_offset_ptr, tail_cap_ptr, dq_ptr, product_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, grad_sb, grad_sh, grad_sn, real_sb,
    H, GROUP, N, N_KV, M, T, slots, words, first_exact, last_exact, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MEANS: tl.constexpr, RAGGED: tl.constexpr, POOLED: tl.constexpr, VALUES: tl.constexpr,
    ACCUMULATE: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B H M BLOCK_Q / ROWS,), first the query blocks that keep every key block, which take longest.

    POOLED: the tail's scores are pooled ones; VALUES: so are its values. ACCUMULATE: add to what dq holds. product_ptr:
    where the sums of r (dO . v_bar) over the tail go, or None.
    """
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    ROW_PARTS: tl.constexpr = BLOCK_Q // ROWS
    KEY_PARTS: tl.constexpr = BLOCK_K // KEYS
    pid = tl.program_id(0)
    part, block = pid % ROW_PARTS, pid // ROW_PARTS
    head, m = query_block(block, tl.num_programs(0) // ROW_PARTS // M, M, first_exact, last_exact)
    row = head * M + m
    b, h = head // H, head % H
    g, kv_head = h // GROUP, b * (H // GROUP) + h // GROUP
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + g * k_sh
    v_ptr += b * v_sb + g * v_sh
    grad_ptr += b * grad_sb + h * grad_sh
    if real_ptr is not None:
        real_ptr += b * real_sb
    kept_ptr += row * (1 + slots)

    position = m * BLOCK_Q + part * ROWS + tl.arange(0, ROWS)
    exists = position < N
    token = token_of(order_ptr, position, N)
    q = load_tile(q_ptr, token, exists, q_sn, D, BLOCK_D)
    grad = load_tile(grad_ptr, token, exists, grad_sn, D, BLOCK_D)
    statistics = head * M * BLOCK_Q + position
    lse, offset = tl.load(sparse_lse_ptr + statistics), tl.load(offset_ptr + statistics)
    cap = lse
    if CAP:
        cap = tl.load(sparse_cap_ptr + statistics)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if ACCUMULATE:
        # From the start, when registers are free.
        dq = load_tile(dq_ptr + (b * N * H + h) * D, token, exists, H * D, D, BLOCK_D).to(tl.float32) / scale
    dropped = tl.zeros([ROWS], tl.float32)

    count = tl.load(kept_ptr)
    keeps_all = count == T
    # Only the last block can be short; it is the last one listed and gets a loop with checks of its own.
    unchecked = count * KEY_PARTS
    if RAGGED and real_ptr is None:
        last = tl.load(kept_ptr + tl.minimum(count, slots), mask=count > 0, other=0)
        unchecked -= tl.where(keeps_all | (last == T - 1), KEY_PARTS, 0)
        unchecked = tl.maximum(unchecked, 0)
    for i in tl.range(0, unchecked, num_stages=STAGES):
        j = i // KEY_PARTS
        j = tl.where(keeps_all, j, tl.load(kept_ptr + 1 + j, mask=j < slots, other=0))
        keys = j * BLOCK_K + i % KEY_PARTS * KEYS + tl.arange(0, KEYS)
        dq, dropped = _kept_step(
            dq, dropped, q, grad, q_ptr, grad_ptr, token, exists, q_sn, grad_sn, lse, offset, cap, k_ptr, v_ptr,
            real_ptr, order_ptr, k_sn, v_sn, keys, N_KV, scale_log2, D, BLOCK_D, ROWS, KEYS, real_ptr is not None,
            k_mean_ptr is not None, CAP, PRECISION,
        )  # fmt: skip
    if RAGGED and real_ptr is None:
        for i in tl.range(unchecked, count * KEY_PARTS, num_stages=1):
            keys = (T - 1) * BLOCK_K + i % KEY_PARTS * KEYS + tl.arange(0, KEYS)
            dq, dropped = _kept_step(
                dq, dropped, q, grad, q_ptr, grad_ptr, token, exists, q_sn, grad_sn, lse, offset, cap, k_ptr, v_ptr,
                real_ptr, order_ptr, k_sn, v_sn, keys, N_KV, scale_log2, D, BLOCK_D, ROWS, KEYS, True,
                k_mean_ptr is not None, CAP, PRECISION,
            )  # fmt: skip

    if POOLED:
        bits_ptr += row * words
        n_ptr += b * T
        k_bar_ptr += kv_head * T * D
        v_bar_ptr += kv_head * T * D
        lse, offset = tl.load(tail_lse_ptr + statistics), tl.load(tail_offset_ptr + statistics)
        if CAP and VALUES:
            cap = tl.load(tail_cap_ptr + statistics)
        product = tl.zeros([ROWS], tl.float32)
        for first in tl.range(0, tl.where(keeps_all, 0, T), MEANS, num_stages=STAGES):
            j = first + tl.arange(0, MEANS)
            word = tl.load(bits_ptr + (j >> 5), mask=j < T, other=-1)
            n = tl.load(n_ptr + j, mask=j < T, other=0.0)
            bias = tl.where(((word >> (j & 31)) & 1 == 0) & (n > 0), tl.log2(n), float("-inf"))
            k_bar = load_tile(k_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
            d_probs = tl.zeros([ROWS, MEANS], tl.float32)
            if PRECISION == "ieee":
                scores = scores_in_float32(
                    q_ptr, token, exists, q_sn, k_bar_ptr, j, j < T, D, D, BLOCK_D, ROWS, MEANS, FLOAT32_CHUNK
                )
                if VALUES:
                    d_probs = scores_in_float32(
                        grad_ptr, token, exists, grad_sn, v_bar_ptr, j, j < T, D, D, BLOCK_D, ROWS, MEANS, FLOAT32_CHUNK
                    )
            else:
                scores = tl.dot(q, tl.trans(k_bar), input_precision=PRECISION)
                if VALUES:
                    v_bar = load_tile(v_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
                    d_probs = tl.dot(grad, tl.trans(v_bar), input_precision=PRECISION)
            scores = scores * scale_log2 - lse[:, None]
            scores += bias[None, :]
            if CAP and VALUES:
                scores = tl.minimum(scores, cap[:, None])
            weights = tl.exp2(scores)
            if product_ptr is not None:
                product += tl.sum(weights * d_probs, 1)
            d_scores = weights * (d_probs - offset[:, None])
            dq = tl.dot(d_scores.to(k_bar.dtype), k_bar, dq, input_precision=PRECISION)
        if product_ptr is not None:
            tl.store(product_ptr + statistics, product)

    # Where the result goes follows from the query block's number: nothing else of it is held during the loops.
    head, m = row // M, (row % M).to(tl.int32)
    b, h = head // H, head % H
    position = m * BLOCK_Q + part * ROWS + tl.arange(0, ROWS)
    exists = position < N
    token = token_of(order_ptr, position, N)
    if k_mean_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        kv_head = b * (H // GROUP) + h // GROUP
        k_mean = tl.load(k_mean_ptr + kv_head * D + d, mask=d < D, other=0.0)
        dq -= dropped[:, None] * k_mean[None, :]
    store_tile(dq_ptr + (b * N * H + h) * D, token, exists, H * D, dq * scale, D, BLOCK_D)


def query_gradient(
    dq: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    bits: Tensor,
    means: Statistics,
    rows: Rows,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    config: QueriesConfig,
    tail_product: Tensor | None,
) -> None:
    """Write dq (B, H, N, D), contiguous; with a linear tail add to what it holds.

    tail_product: where the sums that `mixing_gradients` takes go, or None.
    """
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    blocks, slots = kept.shape[2], kept.shape[3] - 1
    T, exact = means.n.shape[1], settings.exact_queries(q_len, kv_len)
    linear, has_tail = settings.tail == "linear", slots < T
    row_size = min(config.rows, settings.block_q)
    unit, strides = token_strides(q, k, v, grad_out)
    launch(
        _queries_kernel, (batch * heads * blocks * (settings.block_q // row_size),),
        q, k, v, grad_out, kept.contiguous(), bits, means.k_bar, means.v_bar, means.n, means.center, real, order,
        rows.sparse_lse, rows.offset, rows.sparse_cap, rows.tail_lse, rows.tail_offset, rows.tail_cap, dq, tail_product,
        *strides, 0 if real is None else real.stride(0),
        heads, heads // k.shape[1], q_len, kv_len, blocks, T, slots, bits.shape[2],
        exact.num_first, exact.last_start, settings.scale,
        D=dim, BLOCK_D=padded_dim(dim), BLOCK_Q=settings.block_q, BLOCK_K=settings.block_k,
        ROWS=row_size, KEYS=min(config.keys, settings.block_k), MEANS=config.keys,
        RAGGED=kv_len % settings.block_k != 0, POOLED=has_tail and (not linear or settings.mixing == "row"),
        VALUES=not linear, ACCUMULATE=linear and has_tail,
        CAP=settings.qk_format is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=config.num_stages, UNIT=unit, num_warps=config.num_warps, maxnreg=max_registers(config.num_warps),
    )  # fmt: skip
