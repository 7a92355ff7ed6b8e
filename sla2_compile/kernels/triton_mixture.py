"""Sparse branch, pooled tail and mixing in one kernel: from strided q, k, v to the strided output.

A query block's rows stay on chip while the key blocks it keeps stream by, then the block means of all others. With the
pooled tail, row mixing and no learned gain the two are one softmax, so one accumulator serves both. Otherwise the
sparse branch's output waits in memory, in the inputs' dtype, until the tail is known. A linear tail adds
phi(q) H / (phi(q) . Z) to the weighted sparse branch with one more matmul; its states come from `triton_linear_state`.

With low-bit formats the keys, kept ones and means, and the values are the codes of `triton_low_bit`; q is rounded here.
Means of values are codes where keys are FP8 too. A linear tail is not low-bit, and neither is the log-sum-exp of means
that it is mixed by.

For shape (1, 12, 32760, 128) at 97 %: 0.19 TFLOP for 15 kept blocks, 0.10 for 512 block means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.hardware import capability, shared_memory
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import max_registers, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import row_tiles
from sla2_compile.kernels.triton_backward_loads import (
    in_elements,
    load_tile,
    query_block,
    scores_in_float32,
    store_tile,
    token_of,
)
from sla2_compile.kernels.triton_key_codes import to_codes
from sla2_compile.kernels.triton_mixture_steps import (
    LOG2_E,
    LOG2_TOP_CODE,
    TOP_CODE,
    add_linear_tail,
    kept_step,
    rows_times,
    scores_of_codes,
    softmax_step,
    value_codes,
)

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_SMALLEST = tl.constexpr(-149.0)  # of float32's numbers above 0


@dataclass(frozen=True)
class AttentionConfig:
    rows: int  # query rows of a program
    keys: int  # kept keys of a step
    means: int  # block means of a step
    num_warps: int
    num_stages: int
    copy_engine: bool = False  # read tiles through tensor descriptors where the layout allows it (sm_90 and later)


def attention_config(block_d: int, itemsize: int, device: torch.device, *, low_bit: bool) -> AttentionConfig:
    """For head dims padded to `block_d`: the largest tiles that no variant of the kernel spills with."""
    later, memory = capability(device)[0] >= 10, shared_memory(device)
    copies = capability(device) >= (9, 0)
    if itemsize == 4:
        return AttentionConfig(32 if block_d <= 128 else 16, 32, 32, 8, 1)
    if memory < 200 * 1024:
        if block_d <= 128:
            return AttentionConfig(64, 32, 32, 4, 2)
        return AttentionConfig(32, 32, 32, 8, 2 if memory >= 160 * 1024 else 1)
    if block_d <= 64:
        return AttentionConfig(128, 64, 64, 8, 3, copy_engine=copies)
    if block_d <= 128:
        rows, stages = (64, 3) if later else (128, 2)
        return AttentionConfig(rows, 64, 64, 8, stages, copy_engine=copies)
    return AttentionConfig(32 if later and low_bit else 64, 32, 32, 8, 2, copy_engine=copies)


@triton.jit
def _scales(ptr, kv_head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(1, BLOCK_D) what codes of a head's values stand for, by channel."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + kv_head * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, kept_ptr, bits_ptr, k_bar_ptr, v_bar_ptr,
    n_ptr, center_ptr, q_scale_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, real_ptr, order_ptr,
    logit_ptr, gain_ptr, num_nonempty_ptr, states_ptr,
    out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn, real_sb,
    H, GROUP, N, N_KV, M, T, num_stored, slots, words, first_exact, last_exact, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MEANS: tl.constexpr, CHUNK: tl.constexpr, RAGGED: tl.constexpr, HAS_TAIL: tl.constexpr,
    LINEAR: tl.constexpr, ROW_MIXING: tl.constexpr, UNIFIED: tl.constexpr, MAP: tl.constexpr, FP8_KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (B H M BLOCK_Q / ROWS,), first the query blocks that keep every key block, which take longest.

    UNIFIED: one softmax over kept keys and block means. The `tiles` are tensor descriptors of what the pointers point
    to, or None; the copy engine reads through them whole tiles of keys that are all real and in the model's order.
    center_ptr: what smoothing would take off the keys, where they are read without it and a log-sum-exp must tell, or
    FP8 probabilities, whose steps depend on the scores.
    sparse_out_ptr None: nothing is saved for the backward, and log-sum-exps are written as 0.
    """
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    out_sb, out_sh, out_sn = in_elements((out_sb, out_sh, out_sn), UNIT)
    ROW_PARTS: tl.constexpr = BLOCK_Q // ROWS
    KEY_PARTS: tl.constexpr = BLOCK_K // KEYS
    SAVE: tl.constexpr = sparse_out_ptr is not None
    FP8_MEANS: tl.constexpr = FP8_KEYS and v_codes_ptr is not None
    DROP: tl.constexpr = v_codes_ptr is not None and k_codes_ptr is None
    pid = tl.program_id(0)
    part, block = pid % ROW_PARTS, pid // ROW_PARTS
    head, m = query_block(block, tl.num_programs(0) // ROW_PARTS // M, M, first_exact, last_exact)
    b, h = head // H, head % H
    g, kv_head = h // GROUP, b * (H // GROUP) + h // GROUP
    k_row, k_column, v_row, v_column = 0, 0, 0, 0
    if k_tiles is not None:
        # As a matrix whose rows are k_sn apart.
        k_row, k_column = ((b * k_sb + g * k_sh) // k_sn).to(tl.int32), ((b * k_sb + g * k_sh) % k_sn).to(tl.int32)
    if v_tiles is not None:
        v_row, v_column = ((b * v_sb + g * v_sh) // v_sn).to(tl.int32), ((b * v_sb + g * v_sh) % v_sn).to(tl.int32)
    q_ptr += b * q_sb + h * q_sh
    k_ptr += b * k_sb + g * k_sh
    v_ptr += b * v_sb + g * v_sh
    if real_ptr is not None:
        real_ptr += b * real_sb
    kept_ptr += (head * M + m) * (1 + slots)

    position = m * BLOCK_Q + part * ROWS + tl.arange(0, ROWS)
    exists = position < N
    token = token_of(order_ptr, position, N)
    q = load_tile(q_ptr, token, exists, q_sn, D, BLOCK_D)
    scale_log2 = scale * LOG2_E
    kept_q, kept_factor = q, scale_log2
    if q_scale_ptr is not None:
        q_scale = tl.load(q_scale_ptr + head * M + m)
        kept_q, kept_factor = to_codes(q.to(tl.float32), q_scale, FP8_KEYS), scale_log2 * q_scale
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    # Smoothing K takes scale q . center off every score of the row.
    dropped = tl.zeros([ROWS], tl.float32)
    if DROP:
        dropped = rows_times(center_ptr + kv_head * D, q_ptr, token, exists, q_sn, D, BLOCK_D, ROWS, CHUNK)

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
        acc, total, peak = kept_step(
            acc, total, peak, dropped, kept_q, kept_factor, q_ptr, token, exists, q_sn, k_ptr, v_ptr, k_tiles, v_tiles,
            k_codes_ptr, k_scale_ptr, v_codes_ptr, real_ptr, order_ptr, k_row, k_column, v_row, v_column, k_sn, v_sn,
            kv_head, j, i % KEY_PARTS, N_KV, num_stored, D, BLOCK_D, BLOCK_K, ROWS, KEYS, CHUNK, real_ptr is not None,
            DROP, PRECISION,
        )  # fmt: skip
    if RAGGED and real_ptr is None:
        for i in tl.range(unchecked, count * KEY_PARTS, num_stages=1):
            acc, total, peak = kept_step(
                acc, total, peak, dropped, kept_q, kept_factor, q_ptr, token, exists, q_sn, k_ptr, v_ptr, None, None,
                k_codes_ptr, k_scale_ptr, v_codes_ptr, None, order_ptr, 0, 0, 0, 0, k_sn, v_sn,
                kv_head, T - 1, i % KEY_PARTS, N_KV, num_stored, D, BLOCK_D, BLOCK_K, ROWS, KEYS, CHUNK, True, DROP,
                PRECISION,
            )  # fmt: skip
    # Of FP8 values acc and total are TOP_CODE times too large, which matters to log-sum-exps and other kinds of means.
    log2_unit = 0.0
    if v_codes_ptr is not None:
        if UNIFIED and FP8_MEANS:
            log2_unit = LOG2_TOP_CODE
        else:
            acc *= _scales(v_scale_ptr, kv_head, D, BLOCK_D) / TOP_CODE
            total /= TOP_CODE

    if q_scale_ptr is not None and LINEAR:
        # Read again rather than held: the barrier keeps the compiler from making one load of the two.
        tl.debug_barrier()
        q = load_tile(q_ptr, token, exists, q_sn, D, BLOCK_D)
    out_ptr += b * out_sb + h * out_sh
    sparse_lse = peak + tl.log2(total) - log2_unit
    inverse = tl.where(total > 0, 1 / total, 0.0)
    statistics = head * N + token
    # What the saved log-sum-exps are to be less by, where the keys here were not smoothed.
    shift = tl.zeros([ROWS], tl.float32)
    if SAVE:
        if center_ptr is not None and not DROP:
            shift = rows_times(center_ptr + kv_head * D, q_ptr, token, exists, q_sn, D, BLOCK_D, ROWS, CHUNK) * scale
        sparse_out_ptr += b * out_sb + h * out_sh
        sparse_out = acc * inverse[:, None]
        if UNIFIED and FP8_MEANS:
            sparse_out *= _scales(v_scale_ptr, kv_head, D, BLOCK_D)
        store_tile(sparse_out_ptr, token, exists, out_sn, sparse_out, D, BLOCK_D)
        saved_lse = tl.where(total > 0, sparse_lse * LN_2 - shift, float("-inf"))
        tl.store(sparse_lse_ptr + statistics, saved_lse, mask=exists)
    else:
        tl.store(sparse_lse_ptr + statistics, shift, mask=exists)

    if not HAS_TAIL:
        acc = acc * inverse[:, None]
        saved_lse = tl.zeros([ROWS], tl.float32)
        if SAVE:
            saved_lse += float("-inf")
        tl.store(tail_lse_ptr + statistics, saved_lse, mask=exists)
    else:
        logit = 0.0
        if logit_ptr is not None:
            logit = tl.load(logit_ptr + h * M + m)
        if UNIFIED:
            # The logit weighs the sparse branch: it lowers the tail's scores.
            bias = logit * LOG2_E
            if FP8_MEANS:
                # Peaks stay whole numbers, so that codes do not depend on the logit.
                fraction = tl.exp2(bias - tl.floor(bias))
                acc, total, bias = acc * fraction, total * fraction, tl.floor(bias)
            peak += bias
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
            for first in tl.range(0, tl.where(no_tail, 0, T), MEANS, num_stages=STAGES):
                j = first + tl.arange(0, MEANS)
                word = tl.load(bits_ptr + (j >> 5), mask=j < T, other=-1)
                n = tl.load(n_ptr + j, mask=j < T, other=0.0)
                in_tail = ((word >> (j & 31)) & 1 == 0) & (n > 0)
                factor = scale_log2
                stored = kv_head * num_stored + T + first // BLOCK_K
                if k_codes_ptr is not None and not LINEAR:
                    scores, factor = scores_of_codes(
                        kept_q, kept_factor, k_codes_ptr, k_scale_ptr, stored, first % BLOCK_K // MEANS, D, BLOCK_D,
                        BLOCK_K, MEANS,
                    )  # fmt: skip
                elif PRECISION == "ieee":
                    scores = scores_in_float32(
                        q_ptr, token, exists, q_sn, k_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D, ROWS, MEANS, CHUNK
                    )
                else:
                    if k_bar_tiles is not None:
                        k_bar = k_bar_tiles.load([(kv_head * T).to(tl.int32) + first, 0])
                    else:
                        k_bar = load_tile(k_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
                    scores = tl.dot(q, tl.trans(k_bar), input_precision=PRECISION)
                scores += tl.where(in_tail, tl.log2(n) / factor, float("-inf"))[None, :]
                if LINEAR:
                    new_peak = tl.maximum(tail_peak, tl.max(scores, 1) * scale_log2)
                    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                    probs = tl.exp2(scores * scale_log2 - base[:, None])
                    tail_total = tail_total * tl.exp2(tail_peak - base) + tl.sum(probs, 1)
                    tail_peak = new_peak
                else:
                    if FP8_MEANS:
                        v_bar = value_codes(v_codes_ptr, stored, first % BLOCK_K // MEANS, D, BLOCK_D, BLOCK_K, MEANS)
                    elif v_bar_tiles is not None:
                        v_bar = v_bar_tiles.load([(kv_head * T).to(tl.int32) + first, 0])
                    else:
                        v_bar = load_tile(v_bar_ptr, j.to(tl.int64), j < T, D, D, BLOCK_D)
                    before = tail_peak
                    acc, tail_total, tail_peak = softmax_step(
                        acc, tail_total, tail_peak, scores, v_bar, factor, not UNIFIED, FP8_MEANS, PRECISION
                    )
                    if UNIFIED:
                        total *= tl.exp2(before - tail_peak)
        # A tail too small beside the kept keys for its sum to be above 0 is still no empty one.
        smallest = tl.where(no_tail, float("-inf"), tail_peak + LOG2_SMALLEST)
        tail_lse = tl.where(tail_total > 0, tail_peak + tl.log2(tail_total), smallest)
        if FP8_MEANS and not LINEAR:
            tail_lse -= LOG2_TOP_CODE
        if LINEAR and not ROW_MIXING:
            # Nobody reads it; the twin has the same.
            tail_lse = tl.where(keeps_all, tail_lse, 0.0)
            shift = tl.zeros([ROWS], tl.float32)
        if SAVE:
            tl.store(tail_lse_ptr + statistics, tail_lse * LN_2 - shift, mask=exists)
        else:
            tl.store(tail_lse_ptr + statistics, shift, mask=exists)
        if UNIFIED:
            both = total + tail_total
            acc = acc * tl.where(both > 0, 1 / both, 0.0)[:, None]
            if FP8_MEANS:
                acc *= _scales(v_scale_ptr, kv_head, D, BLOCK_D)
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
                acc = add_linear_tail(
                    acc * (weight * inverse)[:, None], 1 - weight, q_ptr, token, exists, q_sn,
                    states_ptr + (head * M + m) * (D + 1) * D, D, BLOCK_D, CHUNK, MAP, PRECISION,
                )  # fmt: skip
            else:
                tl.debug_barrier()
                sparse_out = load_tile(out_ptr, token, exists, out_sn, D, BLOCK_D).to(tl.float32)
                tail_inverse = tl.where(tail_total > 0, 1 / tail_total, 0.0)
                acc = acc * ((1 - weight) * tail_inverse)[:, None]
                if FP8_MEANS:
                    acc *= _scales(v_scale_ptr, kv_head, D, BLOCK_D)
                acc += sparse_out * weight[:, None]
    store_tile(out_ptr, token, exists, out_sn, acc, D, BLOCK_D)


def attention(outputs: Outputs, inputs: AttentionInputs, settings: Settings, config: AttentionConfig) -> None:
    """Write the outputs with tiles of the sizes in `config`."""
    q, k, v, codes, statistics = inputs.q, inputs.k, inputs.v, inputs.codes, inputs.statistics
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    blocks, slots = inputs.kept.shape[2], inputs.kept.shape[3] - 1
    T, exact = statistics.n.shape[1], settings.exact_queries(q_len, kv_len)
    rows, keys = min(config.rows, settings.block_q), min(config.keys, settings.block_k)
    pooled, by_row = settings.tail == "pooled", settings.mixing == "row"
    # 8-bit instructions take 32 channels at a time.
    block_d = max(padded_dim(dim), 32 if codes.k is not None else 16)
    k_tiles = v_tiles = k_bar_tiles = v_bar_tiles = None
    means = min(config.means, settings.block_k) if settings.is_low_bit else config.means
    if config.copy_engine and dim == block_d and kv_len > 1:
        k_bar_tiles, v_bar_tiles = (
            None if pooled and are_codes else row_tiles(x.flatten(0, 2)[None, None], means)
            for x, are_codes in ((statistics.k_bar, codes.k is not None), (statistics.v_bar, codes.has_means_values))
        )
        if inputs.real is None and inputs.order is None:
            k_tiles = row_tiles(k, keys) if codes.k is None else None
            v_tiles = row_tiles(v, keys) if codes.v is None else None
    unit, strides = token_strides(q, k, v, outputs.out)
    launch(
        _attention_kernel, (batch * heads * blocks * (settings.block_q // rows),),
        q, k, v, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, inputs.kept, inputs.bits, statistics.k_bar,
        statistics.v_bar, statistics.n, statistics.center if codes.k is None else None, codes.q_scale, codes.k,
        codes.k_scale, codes.v, codes.v_scale, inputs.real, inputs.order, inputs.alpha_logit, inputs.alpha_gain,
        inputs.num_nonempty, inputs.states,
        outputs.out, outputs.sparse_out, outputs.sparse_lse, outputs.tail_lse, *strides,
        0 if inputs.real is None else inputs.real.stride(0),
        heads, heads // k.shape[1], q_len, kv_len, blocks, T, codes.num_stored, slots, inputs.bits.shape[3],
        exact.num_first, exact.last_start, settings.scale,
        D=dim, BLOCK_D=block_d, BLOCK_Q=settings.block_q, BLOCK_K=settings.block_k, ROWS=rows, KEYS=keys,
        MEANS=means, CHUNK=min(32, block_d), RAGGED=kv_len % settings.block_k != 0, HAS_TAIL=inputs.has_tail,
        LINEAR=not pooled, ROW_MIXING=by_row,
        UNIFIED=inputs.has_tail and pooled and by_row and inputs.alpha_gain is None, MAP=settings.feature_map,
        FP8_KEYS=settings.qk_format == "fp8", PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=config.num_stages, UNIT=unit, num_warps=config.num_warps, maxnreg=max_registers(config.num_warps),
    )  # fmt: skip
