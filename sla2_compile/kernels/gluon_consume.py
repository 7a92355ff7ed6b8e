"""A group of warps of `gluon_attention.py`: its 64 rows of every query block, from queries to output."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sla2_compile.kernels.gluon_codes import to_codes
from sla2_compile.kernels.gluon_feature_map import LOG2_E, weighed_features
from sla2_compile.kernels.gluon_fetch import query_block
from sla2_compile.kernels.gluon_stream import (
    LOG2_TOP_CODE,
    MEAN_BIAS,
    TOP_CODE,
    begin,
    finish,
    group_barrier,
    issue_last,
    left_operand,
    out_layout,
    row_totals,
    scores_layout,
    stream,
)
from sla2_compile.kernels.gluon_tiles import channels, visited_tokens, write_rows

LN_2 = gl.constexpr(0.6931471805599453)
# log2 of float32's smallest number above 0.
LOG2_SMALLEST = gl.constexpr(-149.0)
# Below every score of finite inputs.
LOWEST_PEAK = gl.constexpr(-1e38)


@gluon.jit
def _of_values(acc, scale, layout: gl.constexpr, FP8: gl.constexpr):
    """Sums (64, D) of codes as sums of what they stand for, by the channels' scales (D,), in another layout."""
    if FP8:
        acc = acc * gl.convert_layout(scale, gl.SliceLayout(0, acc.type.layout))[None, :]
    return gl.convert_layout(acc, layout)


@gluon.jit
def _numbers(
    head, m, exists, M, T, slots, words, kept_ptr, bits_ptr, q_scale_ptr, RAGGED: gl.constexpr
):  # fmt: skip
    """Of a query block: how many key blocks it keeps, the word of its bits that has the last one, its codes' scale."""
    block = head.to(gl.int64) * M + m
    count = gl.load(kept_ptr + block * (1 + slots), mask=exists, other=1)
    last_word, q_scale = 0, 1.0
    if RAGGED:
        last_word = gl.load(bits_ptr + block * words + ((T - 1) >> 5), mask=exists, other=0)
    if q_scale_ptr is not None:
        q_scale = gl.load(q_scale_ptr + block, mask=exists, other=1.0)
    return count, last_word, q_scale


@gluon.jit
def consume(
    part: gl.constexpr, out_tiles, sparse_out_tiles, order_ptr, kept_ptr, bits_ptr, logit_ptr, gain_ptr, q_scale_ptr,
    v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem,
    scale_smem, v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, head_start,
    out_rows, out_head_rows, out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact,
    last_exact, scale, RAGGED: gl.constexpr, TAIL: gl.constexpr, LINEAR: gl.constexpr, APART: gl.constexpr,
    PROMOTE: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """One group of warps: its half of every query block of this program."""
    D: gl.constexpr = q_smem.shape[2]
    SAVE: gl.constexpr = sparse_out_ptr is not None
    dtype: gl.constexpr = q_smem.dtype
    FP8_VALUES: gl.constexpr = v_smem.dtype == gl.float8e4nv
    FP8_MEANS: gl.constexpr = TAIL and v_bar_smem.dtype == gl.float8e4nv
    # Kept keys and means in one stretch, where nothing is to be done between: both are of one kind, and no logit moves
    # FP8's peaks by a fraction.
    SAME_KIND: gl.constexpr = v_bar_smem.dtype == v_smem.dtype and (logit_ptr is None or not FP8_VALUES)
    JOINED: gl.constexpr = TAIL and not SAVE and not APART and SAME_KIND
    # The means are added to sums of codes.
    SHARED: gl.constexpr = FP8_MEANS and not JOINED and not APART
    KEY_BYTES: gl.constexpr = k_smem.dtype.primitive_bitwidth // 8
    o_layout: gl.constexpr = out_layout(D, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Values in 8 bits have a layout of their own for the same registers.
    kept_layout: gl.constexpr = out_layout(D, v_smem.dtype.primitive_bitwidth // 8)
    q_layout: gl.constexpr = left_operand(scores_layout(2), 2)
    codes_layout: gl.constexpr = left_operand(scores_layout(KEY_BYTES), KEY_BYTES)
    phi_layout: gl.constexpr = left_operand(o_layout, 2)
    zeros_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    # Of FP8 values sums and total are TOP_CODE times too large, which cancels in all but log-sum-exps.
    LOG2_UNIT: gl.constexpr = LOG2_TOP_CODE if FP8_VALUES and (FP8_MEANS or not TAIL) else 0.0
    means_layout: gl.constexpr = out_layout(D, v_bar_smem.dtype.primitive_bitwidth // 8)
    last_size = N_KV - (T - 1) * 64
    factor = scale * LOG2_E
    # What the mean of the last, short block weighs less than the others', in base 2.
    last_bias = gl.log2(last_size.to(gl.float32)) - MEAN_BIAS
    # Of the ring, where the next tile arrives.
    slot, phase = 0, 0
    turn = 0
    total_blocks = num_heads * M
    head, m = query_block(gl.program_id(0), num_heads, M, first_exact, last_exact)
    count, last_word, q_scale = _numbers(
        head, m, True, M, T, slots, words, kept_ptr, bits_ptr, q_scale_ptr, RAGGED
    )  # fmt: skip
    for index in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        wide_head = head.to(gl.int64)
        block = wide_head * M + m
        b, h = head // H, head % H
        kv_head = (b * (H // GROUP) + h // GROUP).to(gl.int64)
        logit = 0.0
        if logit_ptr is not None:
            logit = gl.load(logit_ptr + h * M + m)
        # Long before they are used.
        z, center, v_scale = 0.0, 0.0, 0.0
        if LINEAR:
            z = channels(states_ptr + (block * (D + 1) + D) * D, D).to(gl.float32)
        if SAVE and center_ptr is not None:
            center = channels(center_ptr + kv_head * D, D)
        if FP8_VALUES:
            v_scale = channels(v_scale_ptr + kv_head * D, D)

        buffer = turn & 1
        q_block = q_smem.index(2 * buffer + part)
        if part == 1:
            # Once, so that this group still multiplies when the other ends a query block.
            if turn == 0:
                mbarrier.wait(head_start, 0)
        mbarrier.wait(q_full.index(buffer), (turn >> 1) & 1)
        acc = gl.zeros([64, D], gl.float32, layout=kept_layout)
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, kept_layout))
        # In base 2, what a learned logit adds to the scores of kept keys that share a softmax with means.
        bias = 0.0
        if TAIL and not APART:
            bias = logit * LOG2_E
        # Whole, so that codes do not depend on it; what that leaves is made up for when there are sums.
        kept_bias = bias
        if FP8_VALUES:
            kept_bias = gl.floor(bias + 0.0 * factor)
        kept_factor = factor
        q = q_block.load(q_layout)
        kept_q = q
        if q_scale_ptr is not None:
            kept_q = to_codes(q_block.load(codes_layout), q_scale, k_smem.dtype)
            kept_factor = factor * q_scale
        num_means = 0
        if TAIL:
            num_means = gl.where(count == T, 0, (T + 63) // 64)
        # Kept keys, then means where those follow at once.
        num_waits = count
        if JOINED:
            num_waits += num_means
        first_slot = slot
        # -1, and a number of the same kind as those of slots.
        no_slot = gl.minimum(slot, -1)
        weights, peak, held, total, slot, phase = begin(
            acc, peak, kept_q, k_smem, v_smem, scale_smem, full, slot, phase, num_waits, kept_factor,
            kept_bias, None, T, (last_word >> ((T - 1) & 31)) & 1 == 1, last_size, 0.0, False, RAGGED,
        )  # fmt: skip
        if part == 0:
            if turn == 0:
                mbarrier.arrive(head_start, count=1)
        if turn > 0:
            # The last block's rows have left for memory by now, from where its queries were.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(buffer ^ 1), count=1)
        # Else the compiler lets the group's warps wait for each other in every step, for what they have read above.
        group_barrier()
        acc, weights, peak, held, total, used_slot, last_slot, slot, phase = stream(
            acc, weights, peak, held, total, kept_q, k_smem, v_smem, scale_smem, full, empty, no_slot, first_slot, slot,
            phase, 1, count, num_waits, kept_factor, kept_bias, None, T, 0.0, False, RAGGED, PROMOTE,
        )  # fmt: skip
        if JOINED:
            acc, weights, peak, held, total, used_slot, last_slot, slot, phase = stream(
                acc, weights, peak, held, total, kept_q, k_smem, v_smem, scale_smem, full, empty, used_slot, last_slot,
                slot, phase, 0, num_means, num_means, kept_factor, MEAN_BIAS, bits_ptr + block * words, T, last_bias,
                True, RAGGED, PROMOTE,
            )  # fmt: skip
        acc, token = issue_last(acc, weights, held, v_smem, last_slot, PROMOTE)
        total = row_totals(total, gl.SliceLayout(1, kept_layout))
        peak = gl.convert_layout(peak, gl.SliceLayout(1, kept_layout))
        if LINEAR or (TAIL and not JOINED and q_scale_ptr is None):
            # Read again rather than held by registers that the loop needs.
            q = q_block.load(q_layout)
            if q_scale_ptr is None:
                kept_q = q
        channel_layout: gl.constexpr = gl.SliceLayout(0, q_layout)
        rest = 0.0
        phi = q
        shift = gl.zeros([64], gl.float32, layout=row_layout)
        if SAVE and center_ptr is not None:
            # Smoothing takes it off every score of a row; the keys here are not smoothed.
            center = gl.convert_layout(center, channel_layout)
            shift = gl.convert_layout(gl.sum(q.to(gl.float32) * center[None, :], 1) * scale, row_layout)
        if LINEAR:
            # While the last values are multiplied.
            rest = 1 / (1 + gl.exp2(logit * LOG2_E))
            rest = gl.where(count == T, 0.0, rest)
            phi = gl.convert_layout(weighed_features(q.to(gl.float32), z, rest, dtype, MAP), phi_layout)
        # The next block, while the last values are multiplied.
        next_head, next_m = query_block(index + gl.num_programs(0), num_heads, M, first_exact, last_exact)
        next_count, next_word, next_scale = _numbers(
            next_head, next_m, index + gl.num_programs(0) < total_blocks, M, T, slots, words, kept_ptr, bits_ptr,
            q_scale_ptr, RAGGED,
        )  # fmt: skip
        acc = finish(acc, token, held, empty, used_slot, last_slot, PROMOTE)
        if FP8_VALUES and TAIL and not FP8_MEANS:
            acc, total = acc * (1 / TOP_CODE), total * (1 / TOP_CODE)
        if not SHARED:
            acc = _of_values(acc, v_scale, o_layout, FP8_VALUES)
        total = gl.convert_layout(total, row_layout)
        peak = gl.convert_layout(peak, row_layout)

        first_row = m * 128 + part * 64
        out_row, out_column = b * out_rows + h * out_head_rows, h * out_columns
        row = first_row + gl.arange(0, 64, layout=row_layout)
        token_of_row = row
        if order_ptr is not None:
            token_of_row = visited_tokens(order_ptr, first_row, N, o_layout)
        lse = gl.zeros([64], gl.float32, layout=row_layout)
        tail_lse = lse
        if SAVE or APART:
            sparse_out = acc
            if SHARED:
                sparse_out = _of_values(acc, v_scale, o_layout, FP8_VALUES)
            sparse_out = sparse_out * (1 / total)[:, None]
        if SAVE:
            write_rows(
                sparse_out_tiles, sparse_out_ptr, order_ptr, sparse_out.to(dtype), q_block, out_row, out_column,
                first_row, N, out_sn,
            )  # fmt: skip
            tma.store_wait(0)
            lse = (peak - kept_bias + gl.log2(total) - LOG2_UNIT) * LN_2 - shift
            tail_lse = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
            if LINEAR:
                # Nobody reads it but where there is no tail.
                tail_lse = gl.where(count == T, tail_lse, 0.0)
        elif APART:
            # It waits there, in 16 bit, while the registers are the tail's.
            q_block.store(sparse_out.to(dtype))
        if TAIL and not JOINED:
            if num_means > 0:
                tail_acc = acc
                if APART:
                    tail_acc = gl.zeros([64, D], gl.float32, layout=means_layout)
                elif FP8_VALUES:
                    fraction = gl.exp2(bias - kept_bias)
                    tail_acc, total = acc * fraction, total * fraction
                before, kept_total = peak, total
                if APART:
                    # Not -inf, since all means of a tile can be those of kept blocks.
                    peak = gl.full([64], LOWEST_PEAK, gl.float32, layout=row_layout)
                first_slot = slot
                mean_weights, mean_peak, mean_held, mean_total, slot, phase = begin(
                    tail_acc, peak, kept_q, k_smem, v_bar_smem, scale_smem, full, slot, phase, num_means,
                    kept_factor, MEAN_BIAS, bits_ptr + block * words, T, num_means == 1, last_size, last_bias, True,
                    RAGGED,
                )  # fmt: skip
                tail_acc, mean_weights, mean_peak, mean_held, mean_total, used_slot, last_slot, slot, phase = stream(
                    tail_acc, mean_weights, mean_peak, mean_held, mean_total, kept_q, k_smem, v_bar_smem, scale_smem,
                    full, empty, no_slot, first_slot, slot, phase, 1, num_means, num_means, kept_factor, MEAN_BIAS,
                    bits_ptr + block * words, T, last_bias, True, RAGGED, PROMOTE and FP8_MEANS,
                )  # fmt: skip
                tail_acc, mean_token = issue_last(
                    tail_acc, mean_weights, mean_held, v_bar_smem, last_slot, PROMOTE and FP8_MEANS
                )
                added = row_totals(mean_total, row_layout)
                peak = gl.convert_layout(mean_peak, row_layout)
                tail_acc = finish(tail_acc, mean_token, mean_held, empty, used_slot, last_slot, PROMOTE and FP8_MEANS)
                total = kept_total * gl.exp2(before - peak) + added
                if SAVE:
                    # A tail too small beside the kept keys for its sum to be above 0 is still no empty one.
                    size = gl.where(added > 0, gl.log2(gl.where(added > 0, added, 1.0)), LOG2_SMALLEST)
                    tail_lse = (peak + size - (LOG2_TOP_CODE if FP8_MEANS else 0.0)) * LN_2
                if not APART:
                    acc = tail_acc
                else:
                    share = gl.full([64], logit * LOG2_E, gl.float32, layout=row_layout)
                    if gain_ptr is not None:
                        share += gl.load(gain_ptr + h) * (before + gl.log2(kept_total) - peak - gl.log2(added))
                    share = 1 / (1 + gl.exp2(-share))
                    tail_out = _of_values(tail_acc, v_scale, o_layout, FP8_MEANS) * ((1 - share) / added)[:, None]
                    acc = q_block.load(o_layout).to(gl.float32) * share[:, None] + tail_out
                    total = gl.full([64], 1.0, gl.float32, layout=row_layout)
        if SHARED:
            acc = _of_values(acc, v_scale, o_layout, FP8_VALUES)
        acc = acc * ((1 - rest) / total)[:, None]
        if LINEAR:
            mbarrier.wait(state_full, turn & 1)
            token = warpgroup_mma(phi, state_smem, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(state_empty, count=1)
        write_rows(out_tiles, out_ptr, order_ptr, acc.to(dtype), q_block, out_row, out_column, first_row, N, out_sn)
        # Behind the output, which waits for every store before it.
        if not SAVE:
            # Zeros, in whatever order.
            token_of_row = first_row + gl.arange(0, 64, layout=zeros_layout)
            row = token_of_row
            lse = gl.zeros([64], gl.float32, layout=zeros_layout)
            tail_lse = lse
        gl.store(sparse_lse_ptr + wide_head * N + token_of_row, lse, mask=row < N)
        gl.store(tail_lse_ptr + wide_head * N + token_of_row, tail_lse, mask=row < N)
        head, m, count, last_word, q_scale = next_head, next_m, next_count, next_word, next_scale
        turn += 1
    tma.store_wait(0)
