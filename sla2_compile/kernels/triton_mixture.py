"""Sparse branch, pooled tail and mixing in one kernel: from strided q, k, v to the strided output.

A query block's rows stay on chip while the key blocks it keeps stream by, then the block means of all others. With the
pooled tail, row mixing and no learned gain the two are one softmax, so one accumulator serves both. Otherwise the
sparse branch's output waits in memory, in the inputs' dtype, until the tail is known. A linear tail adds
phi(q) H / (phi(q) . Z) to the weighted sparse branch with one more matmul; its states come from `triton_linear_tail`.

For shape (1, 12, 32760, 128) at 97 %: 0.19 TFLOP for 15 kept blocks, 0.10 for 512 block means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sla2_compile.kernels.hardware import capability, shared_memory
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_shape
from sla2_compile.kernels.triton_backward_feature_map import feature_map
from sla2_compile.kernels.triton_backward_loads import is_real, load_tile, store_tile, token_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# As in reference.py: a row of the linear tail whose weights sum to less has none.
MIN_LINEAR_WEIGHT = tl.constexpr(1e-30)


@dataclass(frozen=True)
class AttentionConfig:
    rows: int  # query rows of a program
    keys: int  # kept keys of a step
    means: int  # block means of a step
    num_warps: int
    num_stages: int
    copy_engine: bool = False  # read tiles through tensor descriptors where the layout allows it (sm_90 and later)


def attention_config(block_d: int, itemsize: int, device: torch.device) -> AttentionConfig:
    """For head dims padded to `block_d`; measured on sm_90 only."""
    large = shared_memory(device) >= 160 * 1024
    if itemsize == 4:
        return AttentionConfig(32, 32, 32, 4, 1) if block_d <= 128 else AttentionConfig(16, 16, 16, 4, 1)
    if block_d <= 64:
        return AttentionConfig(128, 64, 64, 4, 3 if large else 2)
    if block_d == 128 and large:
        return AttentionConfig(128, 64, 64, 4, 2, copy_engine=capability(device) >= (9, 0))
    if block_d == 128:
        return AttentionConfig(64, 32, 32, 4, 2)
    return AttentionConfig(64, 32, 32, 4, 2) if large else AttentionConfig(32, 32, 32, 4, 1)


@triton.jit
def _softmax_step(acc, total, peak, scores, v, scale_log2, SAFE: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of an online softmax in base 2; `scores` are not scaled yet. SAFE: a row may have seen no key."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    base = new_peak
    if SAFE:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    probs = tl.exp2(scores * scale_log2 - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(probs, 1)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, kept_ptr, bits_ptr, k_bar_ptr, v_bar_ptr,
    n_ptr, k_mean_ptr, real_ptr, order_ptr, logit_ptr, gain_ptr, num_nonempty_ptr, state_ptr, normalizer_ptr,
    out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn, real_sb,
    H, GROUP, N, N_KV, M, T, slots, words, first_exact, last_exact, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MEANS: tl.constexpr, RAGGED: tl.constexpr, HAS_TAIL: tl.constexpr, LINEAR: tl.constexpr,
    ROW_MIXING: tl.constexpr, UNIFIED: tl.constexpr, SAVE: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B H M BLOCK_Q / ROWS,), first the query blocks that keep every key block, which take longest.

    UNIFIED: one softmax over kept keys and block means. The `tiles` are tensor descriptors of what the pointers point
    to, or None; the copy engine reads through them whole tiles of keys that are all real and in the model's order.
    """
    ROW_PARTS: tl.constexpr = BLOCK_Q // ROWS
    KEY_PARTS: tl.constexpr = BLOCK_K // KEYS
    pid = tl.program_id(0)
    part, block = pid % ROW_PARTS, pid // ROW_PARTS
    num_exact = first_exact + M - last_exact
    num_heads = tl.num_programs(0) // ROW_PARTS // M
    if block < num_heads * num_exact:
        head = block // num_exact
        m = block % num_exact
        m = tl.where(m < first_exact, m, last_exact + m - first_exact)
    else:
        block -= num_heads * num_exact
        head = block // (M - num_exact)
        m = first_exact + block % (M - num_exact)
    head = head.to(tl.int64)
    b, h = head // H, head % H
    g, kv_head = h // GROUP, b * (H // GROUP) + h // GROUP
    q_ptr += b * q_sb + h * q_sh
    if k_tiles is not None:
        # As a matrix whose rows are k_sn apart.
        k_row, k_column = ((b * k_sb + g * k_sh) // k_sn).to(tl.int32), ((b * k_sb + g * k_sh) % k_sn).to(tl.int32)
        v_row, v_column = ((b * v_sb + g * v_sh) // v_sn).to(tl.int32), ((b * v_sb + g * v_sh) % v_sn).to(tl.int32)
    k_ptr += b * k_sb + g * k_sh
    v_ptr += b * v_sb + g * v_sh
    out_ptr += b * out_sb + h * out_sh
    sparse_out_ptr += b * out_sb + h * out_sh
    if real_ptr is not None:
        real_ptr += b * real_sb
    kept_ptr += (head * M + m) * (1 + slots)

    position = m * BLOCK_Q + part * ROWS + tl.arange(0, ROWS)
    exists = position < N
    token = token_of(order_ptr, position, N)
    q = load_tile(q_ptr, token, exists, q_sn, D, BLOCK_D)
    scale_log2 = scale * LOG2_E
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)

    count = tl.load(kept_ptr)
    keeps_all = count == T
    # Only the last block can be short; it is the last one listed and gets a step with checks of its own.
    unchecked = count * KEY_PARTS
    if RAGGED and real_ptr is None:
        last = tl.load(kept_ptr + tl.minimum(count, slots), mask=count > 0, other=0)
        unchecked -= tl.where(keeps_all | (last == T - 1), KEY_PARTS, 0)
        unchecked = tl.maximum(unchecked, 0)
    for i in tl.range(0, unchecked, num_stages=STAGES):
        j = i // KEY_PARTS
        j = tl.where(keeps_all, j, tl.load(kept_ptr + 1 + j, mask=j < slots, other=0))
        keys = j * BLOCK_K + i % KEY_PARTS * KEYS + tl.arange(0, KEYS)
        token_kv = token_of(order_ptr, keys, N_KV)
        if k_tiles is not None:
            first_row = j * BLOCK_K + i % KEY_PARTS * KEYS
            k = k_tiles.load([k_row + first_row, k_column])
            v = v_tiles.load([v_row + first_row, v_column])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc, total, peak = _softmax_step(acc, total, peak, scores, v, scale_log2, False, PRECISION)
        elif real_ptr is None:
            k = load_tile(k_ptr, token_kv, None, k_sn, D, BLOCK_D)
            v = load_tile(v_ptr, token_kv, None, v_sn, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc, total, peak = _softmax_step(acc, total, peak, scores, v, scale_log2, False, PRECISION)
        else:
            real = is_real(real_ptr, token_kv, keys, N_KV)
            k = load_tile(k_ptr, token_kv, real, k_sn, D, BLOCK_D)
            v = load_tile(v_ptr, token_kv, real, v_sn, D, BLOCK_D)
            scores = tl.where(real[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
            acc, total, peak = _softmax_step(acc, total, peak, scores, v, scale_log2, True, PRECISION)
    if RAGGED and real_ptr is None:
        for i in tl.range(unchecked, count * KEY_PARTS, num_stages=1):
            keys = (T - 1) * BLOCK_K + i % KEY_PARTS * KEYS + tl.arange(0, KEYS)
            token_kv = token_of(order_ptr, keys, N_KV)
            real = keys < N_KV
            k = load_tile(k_ptr, token_kv, real, k_sn, D, BLOCK_D)
            v = load_tile(v_ptr, token_kv, real, v_sn, D, BLOCK_D)
            scores = tl.where(real[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
            acc, total, peak = _softmax_step(acc, total, peak, scores, v, scale_log2, True, PRECISION)

    sparse_lse = peak + tl.log2(total)
    inverse = tl.where(total > 0, 1 / total, 0.0)
    # Smoothing K takes scale q . k_mean off every score of the row; the keys here are not smoothed.
    shift = tl.zeros([ROWS], tl.float32)
    if SAVE:
        if k_mean_ptr is not None:
            d = tl.arange(0, BLOCK_D)
            k_mean = tl.load(k_mean_ptr + kv_head * D + d, mask=d < D, other=0.0)
            shift = tl.sum(q.to(tl.float32) * k_mean[None, :], 1) * scale
        store_tile(sparse_out_ptr, token, exists, out_sn, acc * inverse[:, None], D, BLOCK_D)
        statistics = head * N + token
        tl.store(
            sparse_lse_ptr + statistics, tl.where(total > 0, sparse_lse * LN_2 - shift, float("-inf")), mask=exists
        )

    if not HAS_TAIL:
        acc = acc * inverse[:, None]
        if SAVE:
            tl.store(tail_lse_ptr + statistics, tl.full([ROWS], float("-inf"), tl.float32), mask=exists)
    else:
        logit = 0.0
        if logit_ptr is not None:
            logit = tl.load(logit_ptr + h * M + m)
        if UNIFIED:
            # The logit weighs the sparse branch: it lowers the tail's scores.
            peak += logit * LOG2_E
        else:
            if not LINEAR:
                store_tile(out_ptr, token, exists, out_sn, acc * inverse[:, None], D, BLOCK_D)
                acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        # Sums of the tail; `total` is the sparse branch's, kept in step with the common peak where they share one.
        tail_total = tl.zeros([ROWS], tl.float32)
        tail_peak = peak
        if not UNIFIED:
            tail_peak = tl.full([ROWS], float("-inf"), tl.float32)
        bits_ptr += (head * M + m) * words
        n_ptr += b * T
        k_bar_ptr += kv_head * T * D
        v_bar_ptr += kv_head * T * D
        num_nonempty = T
        if num_nonempty_ptr is not None:
            num_nonempty = tl.load(num_nonempty_ptr + b)
        no_tail = count >= num_nonempty
        if not LINEAR or ROW_MIXING:
            inverse_scale = 1 / scale_log2
            for first in tl.range(0, tl.where(no_tail, 0, T), MEANS, num_stages=STAGES):
                j = first + tl.arange(0, MEANS)
                word = tl.load(bits_ptr + (j >> 5), mask=j < T, other=-1)
                n = tl.load(n_ptr + j, mask=j < T, other=0.0)
                in_tail = ((word >> (j & 31)) & 1 == 0) & (n > 0)
                bias = tl.where(in_tail, tl.log2(n) * inverse_scale, float("-inf"))
                if k_bar_tiles is not None:
                    k_bar = k_bar_tiles.load([(kv_head * T).to(tl.int32) + first, 0])
                else:
                    k_bar = load_tile(k_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
                scores = tl.dot(q, tl.trans(k_bar), input_precision=PRECISION) + bias[None, :]
                if LINEAR:
                    new_peak = tl.maximum(tail_peak, tl.max(scores, 1) * scale_log2)
                    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                    probs = tl.exp2(scores * scale_log2 - base[:, None])
                    tail_total = tail_total * tl.exp2(tail_peak - base) + tl.sum(probs, 1)
                    tail_peak = new_peak
                else:
                    if v_bar_tiles is not None:
                        v_bar = v_bar_tiles.load([(kv_head * T).to(tl.int32) + first, 0])
                    else:
                        v_bar = load_tile(v_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
                    before = tail_peak
                    acc, tail_total, tail_peak = _softmax_step(
                        acc, tail_total, tail_peak, scores, v_bar, scale_log2, not UNIFIED, PRECISION
                    )
                    if UNIFIED:
                        total *= tl.exp2(before - tail_peak)
        tail_lse = tl.where(tail_total > 0, tail_peak + tl.log2(tail_total), float("-inf"))
        if LINEAR and not ROW_MIXING:
            # Nobody reads it; the twin has the same.
            tail_lse = tl.where(keeps_all, tail_lse, 0.0)
            shift = tl.zeros([ROWS], tl.float32)
        if SAVE:
            tl.store(tail_lse_ptr + statistics, tail_lse * LN_2 - shift, mask=exists)
        if UNIFIED:
            both = total + tail_total
            acc = acc * tl.where(both > 0, 1 / both, 0.0)[:, None]
        else:
            z = tl.zeros([ROWS], tl.float32) + logit
            if ROW_MIXING:
                gain = 1.0
                if gain_ptr is not None:
                    gain = tl.load(gain_ptr + h)
                both = (total > 0) & (tail_total > 0)
                z += gain * tl.where(both, sparse_lse - tail_lse, 0.0) * LN_2
            weight = tl.where(no_tail, 1.0, 1 / (1 + tl.exp2(-z * LOG2_E)))
            if LINEAR:
                acc = acc * (weight * inverse)[:, None]
                d = tl.arange(0, BLOCK_D)
                phi = feature_map(q.to(tl.float32), D, BLOCK_D, MAP)
                normalizer = tl.load(normalizer_ptr + (head * M + m) * D + d, mask=d < D, other=0.0)
                mass = tl.sum(phi * normalizer[None, :], 1)
                phi = phi * tl.where(mass > MIN_LINEAR_WEIGHT, (1 - weight) / mass, 0.0)[:, None]
                inside = (d < D)[:, None] & (d < D)[None, :]
                state_ptr += (head * M + m) * D * D
                state = tl.load(state_ptr + d[:, None] * D + d[None, :], mask=inside, other=0.0)
                acc = tl.dot(phi.to(state.dtype), state, acc, input_precision=PRECISION)
            else:
                tl.debug_barrier()
                sparse_out = load_tile(out_ptr, token, exists, out_sn, D, BLOCK_D).to(tl.float32)
                tail_inverse = tl.where(tail_total > 0, 1 / tail_total, 0.0)
                acc = acc * ((1 - weight) * tail_inverse)[:, None] + sparse_out * weight[:, None]
    store_tile(out_ptr, token, exists, out_sn, acc, D, BLOCK_D)


@dataclass(frozen=True)
class TailMeans:
    """What the tail sees of the key blocks."""

    k_bar: Tensor  # (B, G, T, D) in the inputs' dtype
    v_bar: Tensor  # (B, G, T, D)
    n: Tensor  # (B, T) float32
    k_mean: Tensor | None  # (B, G, D) float32 mean of all keys, where the op smooths them


@dataclass(frozen=True)
class LinearStates:
    state: Tensor  # (B H, M, D, D) in the inputs' dtype
    normalizer: Tensor  # (B H, M, D) float32


@dataclass(frozen=True)
class Outputs:
    out: Tensor  # (B, H, N, D)
    sparse_out: Tensor | None  # (B, H, N, D), None where no gradient is needed
    sparse_lse: Tensor  # (B, H, N) float32
    tail_lse: Tensor  # (B, H, N) float32


def attention(
    outputs: Outputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    bits: Tensor,
    means: TailMeans,
    linear: LinearStates | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    config: AttentionConfig,
) -> None:
    """Write the outputs.

    Args:
        outputs: where to write; out and sparse_out share their strides.
        q: (B, H, N, D), last stride 1.
        k, v: (B, G, N_kv, D), last stride 1.
        kept: (B, H, M, 1 + slots) int32.
        bits: (B, H, M, W) int32, the same as a bit mask.
        means: of the key blocks.
        linear: states of the linear tail, None where the tail is pooled or empty.
        alpha_logit: (H, M) float32 or None for 0.
        alpha_gain: (H,) float32 or None for 1; row mixing only.
        real: (B, N_kv) bool or None where all keys are real.
        order: (N,) int32 or None.
        settings: the op's.
        config: tile sizes.
    """
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    blocks, slots = kept.shape[2], kept.shape[3] - 1
    T, exact = means.n.shape[1], settings.exact_queries(q_len, kv_len)
    has_tail, rows = slots < T, min(config.rows, settings.block_q)
    pooled, by_row = settings.tail == "pooled", settings.mixing == "row"
    keys = min(config.keys, settings.block_k)
    tiles: tuple[Any, ...] = (None, None, None, None)
    if config.copy_engine and real is None and order is None and dim == triton.next_power_of_2(dim):
        bars = (x.flatten(0, 2) for x in (means.k_bar, means.v_bar))
        tiles = (_rows_of(k, keys), _rows_of(v, keys), *(_rows_of(x[None, None], config.means) for x in bars))
        tiles = (None, None, None, None) if None in tiles else tiles
    num_nonempty = None if real is None else (means.n > 0).sum(1, dtype=torch.int32)
    _attention_kernel[batch * heads * blocks * (settings.block_q // rows),](
        q, k, v, *tiles, kept, bits, means.k_bar, means.v_bar, means.n, means.k_mean, real, order, alpha_logit,
        alpha_gain, num_nonempty,
        None if linear is None else linear.state, None if linear is None else linear.normalizer,
        outputs.out, outputs.out if outputs.sparse_out is None else outputs.sparse_out, outputs.sparse_lse,
        outputs.tail_lse, *(s for x in (q, k, v, outputs.out) for s in x.stride()[:3]),
        0 if real is None else real.stride(0),
        heads, heads // k.shape[1], q_len, kv_len, blocks, T, slots, bits.shape[3],
        exact.num_first, exact.last_start, settings.scale,
        D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_Q=settings.block_q, BLOCK_K=settings.block_k,
        ROWS=rows, KEYS=keys, MEANS=config.means,
        RAGGED=kv_len % settings.block_k != 0, HAS_TAIL=has_tail, LINEAR=not pooled, ROW_MIXING=by_row,
        UNIFIED=has_tail and pooled and by_row and alpha_gain is None, SAVE=outputs.sparse_out is not None,
        MAP=settings.feature_map, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def _rows_of(x: Tensor, rows: int) -> TensorDescriptor | None:
    """A descriptor for tiles of `rows` tokens of `x` (B, H, N, D); None where its layout forbids it."""
    shape = matrix_shape(x)
    return shape and TensorDescriptor(x, list(shape), [shape[1], 1], [rows, x.shape[3]])
