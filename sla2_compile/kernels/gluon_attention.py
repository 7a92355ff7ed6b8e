"""The attention kernel for Hopper, warp-specialised: the fast path of `triton_mixture.py`.

One warp fetches tiles of K and V with the copy engine into rings in shared memory (`gluon_fetch.py`); two groups of
four warps, 64 query rows each, consume them (`gluon_stream.py`). In a group the softmax of one tile runs while the
tensor cores multiply the last tile's probabilities with its values; the groups do not wait for each other, so that
one's softmax hides the other's matmuls. Programs are persistent: the fetching warp is already at the next query block
while the last one is finished.

Kept keys and block means are one softmax here where they can be, with a pooled tail and row mixing without a learned
gain; otherwise two, one after the other. A linear tail with block mixing adds phi(q) H / (phi(q) . Z) with one more
matmul. All else is `triton_mixture.py`'s.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.gluon_fetch import fetch, query_block
from sla2_compile.kernels.gluon_stream import (
    INTEGER_FLOAT,
    MEAN_BIAS,
    TOP_CODE,
    begin,
    finish,
    issue_last,
    left_operand,
    out_layout,
    pack_fp8,
    row_totals,
    scores_layout,
    stream,
)
from sla2_compile.kernels.hardware import capability, num_multiprocessors, shared_memory
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_shape, matrix_steps

BLOCK_Q, BLOCK_K = 128, 64
ELEMENTS = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv,
}  # fmt: skip
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
# log2 of float32's smallest number above 0.
LOG2_SMALLEST = gl.constexpr(-149.0)
# As in reference.py: a row of the linear tail whose weights sum to less has none.
MIN_LINEAR_WEIGHT = gl.constexpr(1e-30)
# Below every score of finite inputs.
LOWEST_PEAK = gl.constexpr(-1e38)


@gluon.jit
def _feature_map(x, MAP: gl.constexpr):
    """phi(x), but for the row sums (64,) that a softmax divides by; those."""
    if MAP == "softmax":
        x = gl.exp2((x - gl.max(x, 1)[:, None]) * LOG2_E)
        return x, gl.sum(x, 1)
    if MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp2(gl.minimum(x, 0.0) * LOG2_E)), gl.max(x, 1) * 0.0 + 1.0
    return gl.maximum(x, 0.0), gl.max(x, 1) * 0.0 + 1.0


@gluon.jit
def _to_codes(q, scale, dtype: gl.constexpr):
    """Queries (64, D) as codes, rounded to nearest even like `triton_low_bit.to_codes`, packed four at a time."""
    inverse = gl.minimum(1 / scale, 1e38)
    x = q.to(gl.float32)
    quotient = x * inverse
    x = gl.fma(gl.fma(-quotient, scale, x), inverse, quotient)
    if dtype == gl.float8e4nv:
        return pack_fp8(x)
    else:
        # Around 1.5 * 2^23 float32's numbers are the integers, and its last byte is theirs.
        x = gl.minimum(gl.maximum(x, -127.0), 127.0) + INTEGER_FLOAT
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            prmt.b32 low, $1, $2, 0x0040;
            prmt.b32 high, $3, $4, 0x0040;
            prmt.b32 $0, low, high, 0x5410;
            }""",
            "=r,r,r,r,r", [x], dtype=gl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def _channels(ptr, D: gl.constexpr):
    """A vector (D,), one element a thread: it waits for its use in few registers."""
    return gl.load(ptr + gl.arange(0, D, layout=gl.BlockedLayout([1], [32], [4], [0])))


@gluon.jit
def _write_rows(tiles, ptr, x, smem, row, column, first, N, pitch):
    """Write (64, D) to the tokens from `first` on that exist, by way of `smem`, busy until `tma.store_wait`."""
    D: gl.constexpr = x.shape[1]
    smem.store(x)
    fence_async_shared()
    if first + 64 <= N:
        tma.async_copy_shared_to_global(tiles, [row + first, column], smem)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        token = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        pointers = ptr + (row + token).to(gl.int64)[:, None] * pitch + (column + channel)[None, :]
        gl.store(pointers, smem.load(layout), mask=(token < N)[:, None])


@gluon.jit
def _consume(
    part: gl.constexpr, out_tiles, sparse_out_tiles, kept_ptr, bits_ptr, logit_ptr, gain_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr, tail_lse_ptr, q_smem, k_smem, v_smem,
    k_bar_smem, v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, out_rows,
    out_head_rows, out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact,
    scale, RAGGED: gl.constexpr, TAIL: gl.constexpr, LINEAR: gl.constexpr, APART: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """One group of warps: its half of every query block of this program."""
    D: gl.constexpr = q_smem.shape[2]
    SAVE: gl.constexpr = sparse_out_ptr is not None
    dtype: gl.constexpr = q_smem.dtype
    FP8_VALUES: gl.constexpr = v_smem.dtype == gl.float8e4nv
    # Kept keys and means in one stretch, where nothing is written between and both are of one kind.
    JOINED: gl.constexpr = TAIL and not SAVE and not APART and k_smem.dtype == dtype and v_smem.dtype == dtype
    KEY_BYTES: gl.constexpr = k_smem.dtype.primitive_bitwidth // 8
    o_layout: gl.constexpr = out_layout(D, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Values in 8 bits have a layout of their own for the same registers.
    kept_layout: gl.constexpr = out_layout(D, v_smem.dtype.primitive_bitwidth // 8)
    q_layout: gl.constexpr = left_operand(scores_layout(2), 2)
    codes_layout: gl.constexpr = left_operand(scores_layout(KEY_BYTES), KEY_BYTES)
    phi_layout: gl.constexpr = left_operand(o_layout, 2)
    last_size = N_KV - (T - 1) * 64
    factor = scale * LOG2_E
    # What the mean of the last, short block weighs less than the others', as a score.
    last_bias = (gl.log2(last_size.to(gl.float32)) - MEAN_BIAS) / factor
    # Of the ring, where the next tile arrives.
    slot, phase = 0, 0
    turn = 0
    total_blocks = num_heads * M
    head, m = query_block(gl.program_id(0), num_heads, M, first_exact, last_exact)
    count = gl.load(kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots))
    for index in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        wide_head = head.to(gl.int64)
        block = wide_head * M + m
        kept_row = kept_ptr + block * (1 + slots)
        b, h = head // H, head % H
        kv_head = (b * (H // GROUP) + h // GROUP).to(gl.int64)
        logit = 0.0
        if logit_ptr is not None:
            logit = gl.load(logit_ptr + h * M + m)
        # Long before they are used.
        z, center, v_scale = 0.0, 0.0, 0.0
        if LINEAR:
            z = _channels(states_ptr + (block * (D + 1) + D) * D, D).to(gl.float32)
        if SAVE and center_ptr is not None:
            center = _channels(center_ptr + kv_head * D, D)
        if FP8_VALUES:
            v_scale = _channels(v_scale_ptr + kv_head * D, D)

        buffer = turn & 1
        q_block = q_smem.index(2 * buffer + part)
        mbarrier.wait(q_full.index(buffer), (turn >> 1) & 1)
        if turn > 0:
            # The last block's rows have left for memory by now, from where its queries were.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(buffer ^ 1), count=1)
        acc = gl.zeros([64, D], gl.float32, layout=kept_layout)
        peak = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, kept_layout))
        # In base 2, what a learned logit adds to the scores of kept keys that share a softmax with means.
        bias = 0.0
        if TAIL and not APART:
            bias = logit * LOG2_E
        kept_factor = factor
        q = q_block.load(q_layout)
        kept_q = q
        scales = k_scale_ptr
        if k_scale_ptr is not None:
            q_scale = gl.load(q_scale_ptr + block)
            kept_q = _to_codes(q_block.load(codes_layout), q_scale, k_smem.dtype)
            kept_factor = factor * q_scale
            scales = k_scale_ptr + kv_head * T
        num_means = 0
        if TAIL:
            num_means = gl.where(count == T, 0, (T + 63) // 64)
        # Kept keys, then means where those follow at once.
        num_waits = count
        if JOINED:
            num_waits += num_means
        first_slot = slot
        weights, peak, held, total, slot, phase = begin(
            acc, peak, kept_q, k_smem, v_smem, full, slot, phase, count, num_waits, kept_factor, bias, kept_row + 1,
            scales, T, last_size, 0.0, False, RAGGED,
        )  # fmt: skip
        acc, weights, peak, held, total, last_slot, slot, phase = stream(
            acc, weights, peak, held, total, kept_q, k_smem, v_smem, full, empty, first_slot, slot, phase, 1, count,
            num_waits, kept_factor, bias, kept_row + 1, scales, T, last_size, 0.0, False, RAGGED,
        )  # fmt: skip
        if JOINED:
            acc, weights, peak, held, total, last_slot, slot, phase = stream(
                acc, weights, peak, held, total, q, k_smem, v_smem, full, empty, last_slot, slot, phase, 0, num_means,
                num_means, factor, MEAN_BIAS, bits_ptr + block * words, None, T, last_size, last_bias, True, RAGGED,
            )  # fmt: skip
        acc, token = issue_last(acc, weights, held, v_smem, last_slot)
        total = row_totals(total, gl.SliceLayout(1, kept_layout))
        peak = gl.convert_layout(peak, gl.SliceLayout(1, kept_layout))
        if k_scale_ptr is not None or LINEAR or (TAIL and not JOINED):
            # Read again rather than held by registers that the loop needs.
            q = q_block.load(q_layout)
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
            features, size = _feature_map(q.to(gl.float32), MAP)
            mass = gl.sum(features * gl.convert_layout(z, channel_layout)[None, :], 1)
            features = features * gl.where(mass > size * MIN_LINEAR_WEIGHT, rest / mass, 0.0)[:, None]
            if dtype == gl.float16:
                # As `to_finite` of the other kernels.
                features = gl.minimum(features, 65504.0)
            phi = gl.convert_layout(features.to(dtype), phi_layout)
        # The next block, while the last values are multiplied.
        next_head, next_m = query_block(index + gl.num_programs(0), num_heads, M, first_exact, last_exact)
        next_count = gl.load(
            kept_ptr + (next_head.to(gl.int64) * M + next_m) * (1 + slots),
            mask=index + gl.num_programs(0) < total_blocks, other=1,
        )  # fmt: skip
        acc = finish(acc, token, held, v_smem, empty, last_slot)
        if FP8_VALUES:
            acc = acc * gl.convert_layout(v_scale * (1 / TOP_CODE), gl.SliceLayout(0, kept_layout))[None, :]
            total = total * (1 / TOP_CODE)
        acc = gl.convert_layout(acc, o_layout)
        total = gl.convert_layout(total, row_layout)
        peak = gl.convert_layout(peak, row_layout)

        first_row = m * 128 + part * 64
        out_row, out_column = b * out_rows + h * out_head_rows, h * out_columns
        row = first_row + gl.arange(0, 64, layout=row_layout)
        lse = gl.zeros([64], gl.float32, layout=row_layout)
        tail_lse = lse
        if SAVE or APART:
            sparse_out = acc * (1 / total)[:, None]
        if SAVE:
            _write_rows(
                sparse_out_tiles, sparse_out_ptr, sparse_out.to(dtype), q_block, out_row, out_column, first_row, N,
                out_sn,
            )  # fmt: skip
            tma.store_wait(0)
            lse = (peak - bias + gl.log2(total)) * LN_2 - shift
            tail_lse = gl.full([64], float("-inf"), gl.float32, layout=row_layout)
            if LINEAR:
                # Nobody reads it but where there is no tail.
                tail_lse = gl.where(count == T, tail_lse, 0.0)
        elif APART:
            # It waits there, in 16 bit, while the registers are the tail's.
            q_block.store(sparse_out.to(dtype))
        gl.store(sparse_lse_ptr + wide_head * N + row, lse, mask=row < N)
        if TAIL and not JOINED:
            if num_means > 0:
                before, kept_total = peak, total
                if APART:
                    acc = gl.zeros([64, D], gl.float32, layout=o_layout)
                    # Not -inf, since all means of a tile can be those of kept blocks.
                    peak = gl.full([64], LOWEST_PEAK, gl.float32, layout=row_layout)
                first_slot = slot
                mean_weights, mean_peak, mean_held, mean_total, slot, phase = begin(
                    acc, peak, q, k_bar_smem, v_bar_smem, full, slot, phase, num_means, num_means, factor, MEAN_BIAS,
                    bits_ptr + block * words, None, T, last_size, last_bias, True, RAGGED,
                )  # fmt: skip
                acc, mean_weights, mean_peak, mean_held, mean_total, last_slot, slot, phase = stream(
                    acc, mean_weights, mean_peak, mean_held, mean_total, q, k_bar_smem, v_bar_smem, full, empty,
                    first_slot, slot, phase, 1, num_means, num_means, factor, MEAN_BIAS, bits_ptr + block * words,
                    None, T, last_size, last_bias, True, RAGGED,
                )  # fmt: skip
                acc, mean_token = issue_last(acc, mean_weights, mean_held, v_bar_smem, last_slot)
                added = row_totals(mean_total, row_layout)
                peak = gl.convert_layout(mean_peak, row_layout)
                acc = finish(acc, mean_token, mean_held, v_bar_smem, empty, last_slot)
                total = kept_total * gl.exp2(before - peak) + added
                if SAVE:
                    # A tail too small beside the kept keys for its sum to be above 0 is still no empty one.
                    size = gl.where(added > 0, gl.log2(gl.where(added > 0, added, 1.0)), LOG2_SMALLEST)
                    tail_lse = (peak + size) * LN_2
                if APART:
                    share = gl.full([64], logit * LOG2_E, gl.float32, layout=row_layout)
                    if gain_ptr is not None:
                        share += gl.load(gain_ptr + h) * (before + gl.log2(kept_total) - peak - gl.log2(added))
                    share = 1 / (1 + gl.exp2(-share))
                    acc = q_block.load(o_layout).to(gl.float32) * share[:, None] + acc * ((1 - share) / added)[:, None]
                    total = gl.full([64], 1.0, gl.float32, layout=row_layout)
        gl.store(tail_lse_ptr + wide_head * N + row, tail_lse, mask=row < N)
        acc = acc * ((1 - rest) / total)[:, None]
        if LINEAR:
            mbarrier.wait(state_full, turn & 1)
            token = warpgroup_mma(phi, state_smem, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(state_empty, count=1)
        _write_rows(out_tiles, out_ptr, acc.to(dtype), q_block, out_row, out_column, first_row, N, out_sn)
        head, m, count = next_head, next_m, next_count
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _attention_kernel(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, out_tiles, sparse_out_tiles, kept_ptr, bits_ptr,
    logit_ptr, gain_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr,
    sparse_lse_ptr, tail_lse_ptr, q_rows, q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows,
    v_columns, out_rows, out_head_rows, out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads,
    first_exact, last_exact, scale, RAGGED: gl.constexpr, APART: gl.constexpr, MAP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors. sparse_out_ptr None: nothing is saved, log-sum-exps are 0.

    k_bar_tiles, state_tiles None: the tail is not pooled, not linear. Scales are None where there are no codes.
    """
    TAIL: gl.constexpr = k_bar_tiles is not None
    LINEAR: gl.constexpr = state_tiles is not None
    # Two query blocks: the output leaves by the place of its queries while the next ones arrive.
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [4] + q_tiles.block_type.shape, q_tiles.layout)
    k_smem = gl.allocate_shared_memory(k_tiles.dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_smem = gl.allocate_shared_memory(v_tiles.dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    k_bar_smem, v_bar_smem, state_smem = k_smem, v_smem, q_smem
    if TAIL and k_tiles.dtype != q_tiles.dtype:
        k_bar_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES] + q_tiles.block_type.shape, q_tiles.layout)
    if TAIL and v_tiles.dtype != q_tiles.dtype:
        v_bar_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES] + q_tiles.block_type.shape, q_tiles.layout)
    if LINEAR:
        state_smem = gl.allocate_shared_memory(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    state_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    state_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    # What is full one thread announces; what is empty, both groups.
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    mbarrier.init(state_full, count=1)
    mbarrier.init(state_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), out_tiles, sparse_out_tiles, kept_ptr, bits_ptr, logit_ptr, gain_ptr,
                        q_scale_ptr, k_scale_ptr, v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr,
                        tail_lse_ptr, q_smem, k_smem, v_smem, k_bar_smem, v_bar_smem, state_smem, q_full, q_empty,
                        full, empty, state_full, state_empty, out_rows, out_head_rows,
                        out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact,
                        last_exact, scale, RAGGED, TAIL, LINEAR, APART, MAP)),
            (_consume, (gl.constexpr(1), out_tiles, sparse_out_tiles, kept_ptr, bits_ptr, logit_ptr, gain_ptr,
                        q_scale_ptr, k_scale_ptr, v_scale_ptr, center_ptr, states_ptr, out_ptr, sparse_out_ptr, sparse_lse_ptr,
                        tail_lse_ptr, q_smem, k_smem, v_smem, k_bar_smem, v_bar_smem, state_smem, q_full, q_empty,
                        full, empty, state_full, state_empty, out_rows, out_head_rows,
                        out_columns, out_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact,
                        last_exact, scale, RAGGED, TAIL, LINEAR, APART, MAP)),
            (fetch, (q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, kept_ptr, q_smem, k_smem,
                     v_smem, k_bar_smem, v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty,
                     q_rows, q_head_rows, q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H,
                     GROUP, M, T, slots, num_heads, first_exact, last_exact)),
        ],
        [4, 1],
        # Of a thread; the fetching warps give theirs to the groups that compute.
        [240, 24] if k_scale_ptr is not None else [232, 40],
    )  # fmt: skip


def _is_eligible(inputs: AttentionInputs, settings: Settings) -> bool:
    on_hopper = capability(inputs.q.device)[0] == 9
    fits = inputs.q.dtype in (torch.bfloat16, torch.float16) and inputs.q.shape[3] in (64, 128)
    blocks = (settings.block_q, settings.block_k) == (BLOCK_Q, BLOCK_K)
    plain = inputs.real is None and inputs.order is None and inputs.k.shape[2] > 1
    smooth = inputs.codes.v is None or inputs.codes.k is not None
    tail = settings.tail == "pooled" or settings.mixing == "block" or not inputs.has_tail
    return on_hopper and fits and blocks and plain and smooth and tail


def _is_one_softmax(inputs: AttentionInputs, settings: Settings) -> bool:
    """Whether a pooled tail is mixed as if its means were keys."""
    return settings.mixing == "row" and inputs.alpha_gain is None


def attend(outputs: Outputs, inputs: AttentionInputs, settings: Settings) -> bool:
    """Write the outputs and return True, or False where this kernel cannot do it, and nothing is written."""
    if not _is_eligible(inputs, settings):
        return False
    q, k, v, codes, statistics, states = inputs.q, inputs.k, inputs.v, inputs.codes, inputs.statistics, inputs.states
    (batch, heads, q_len, dim), (key_heads, kv_len) = q.shape, k.shape[1:3]
    T, slots, blocks = statistics.n.shape[1], inputs.kept.shape[3] - 1, inputs.kept.shape[2]
    tiles = [
        _token_tiles(q),
        _token_tiles(k) if codes.k is None else _matrix_tiles(codes.k, BLOCK_K),
        _token_tiles(v) if codes.v is None else _matrix_tiles(codes.v, dim),
    ]
    if None in tiles:
        return False
    pooled = inputs.has_tail and settings.tail == "pooled"
    tiles += [_matrix_tiles(mean, BLOCK_K) if pooled else None for mean in (statistics.k_bar, statistics.v_bar)]
    tiles.append(None if states is None else _matrix_tiles(states, dim))
    tiles += [None if x is None else _token_tiles(x) for x in (outputs.out, outputs.sparse_out)]
    exact = settings.exact_queries(q_len, kv_len)
    shifts = codes.k is None and outputs.sparse_out is not None
    _attention_kernel[min(num_multiprocessors(q.device), batch * heads * blocks),](
        *tiles, inputs.kept, inputs.bits, inputs.alpha_logit, inputs.alpha_gain, codes.q_scale, codes.k_scale, codes.v_scale,
        statistics.center if shifts else None, states,
        outputs.out, outputs.sparse_out, outputs.sparse_lse, outputs.tail_lse,
        *(step for x in (q, k, v, outputs.out) for step in matrix_steps(x)), outputs.out.stride(2),
        heads, heads // key_heads, q_len, kv_len, blocks, T, slots, inputs.bits.shape[3], batch * heads,
        exact.num_first, exact.last_start, settings.scale,
        RAGGED=kv_len % BLOCK_K != 0, APART=pooled and not _is_one_softmax(inputs, settings), MAP=settings.feature_map,
        STAGES=_num_stages(dim, inputs, pooled=pooled), num_warps=4,
    )  # fmt: skip
    return True


def _num_stages(dim: int, inputs: AttentionInputs, *, pooled: bool) -> int:
    """Slots of the rings: as deep as shared memory allows beside queries, state and barriers."""
    tile = BLOCK_K * dim
    held = 4 * tile * 2 + (dim * dim * 2 if inputs.states is not None else 0) + 2048
    slot = 0
    for codes in (inputs.codes.k, inputs.codes.v):
        # Codes and block means have slots of their own.
        slot += tile * 2 if codes is None else tile + (tile * 2 if pooled else 0)
    return min(6, (shared_memory(inputs.q.device) - held) // slot)


def _token_tiles(x: Tensor) -> TensorDescriptor | None:
    """A descriptor for tiles of 64 tokens of `x` (B, H, N, D); None where its layout forbids it."""
    shape = matrix_shape(x)
    return shape and _tiles(x, list(shape), 64, x.shape[3])


def _matrix_tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor for tiles of `rows` whole rows of contiguous `x` (..., columns)."""
    columns = x.shape[-1]
    return _tiles(x, [x.numel() // columns, columns], rows, columns)


def _tiles(x: Tensor, shape: list[int], rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, shape, [shape[1], 1], [rows, columns], _shared_layout(rows, columns, x.dtype))


@functools.cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[dtype])
