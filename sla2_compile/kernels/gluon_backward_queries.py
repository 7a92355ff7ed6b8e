"""Gradient of q for Hopper, warp-specialised: the fast path of `triton_backward_queries.py`.

One warp fetches tiles of kept keys and values, then of block means, into rings in shared memory; two groups of four
warps, 64 query rows each, consume them. A group issues the next tile's scores q k^T and d_probs dO v^T to the tensor
cores, then the last tile's dS k; while the last is multiplied it makes dS of the former two. Kept keys and means are
one stretch of tiles, at whose border the rows' statistics change. Programs are persistent, as the forward's.

For shape (1, 12, 32760, 128) at 97 %: 71,000 steps of 128 rows and 64 keys, of 1,536 cycles of tensor cores each, so
0.47 ms with 132 multiprocessors at 1.75 GHz (0.31 without means); 544 of exponentials, and 2.3 GB of tiles from L2.
"""

from __future__ import annotations

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

from sla2_compile.kernels.gluon_backward_fetch import fetch_for_queries
from sla2_compile.kernels.gluon_backward_scores import issue_scores, mask, mask_short, score_gradient
from sla2_compile.kernels.gluon_fetch import query_block
from sla2_compile.kernels.gluon_stream import MEAN_BIAS, left_operand, out_layout, scores_layout, sum_in_thread
from sla2_compile.kernels.gluon_tiles import (
    BLOCK_K,
    channels,
    is_eligible,
    matrix_tiles,
    phase_of,
    slot_of,
    token_tiles,
    write_rows,
)
from sla2_compile.kernels.hardware import num_multiprocessors, shared_memory
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import next_power_of_two
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps
from sla2_compile.kernels.triton_backward_rows import Rows
from sla2_compile.kernels.triton_statistics import Statistics

LOG2_E = gl.constexpr(1.4426950408889634)
# A group waits for the next tile before it hands back the last, and holds one in between.
MIN_STAGES = 4


@gluon.jit
def _consume(
    part: gl.constexpr, dq_tiles, kept_ptr, bits_ptr, k_mean_ptr, lse_ptr, offset_ptr, cap_ptr, tail_lse_ptr,
    tail_offset_ptr, tail_cap_ptr, dq_ptr, q_smem, grad_smem, k_smem, v_smem, dq_smem, q_full, q_empty, full, empty,
    dq_full, dq_empty, dq_rows, dq_head_rows, dq_columns, dq_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads,
    first_exact, last_exact, scale, RAGGED: gl.constexpr, TAIL: gl.constexpr, VALUES: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """One group of warps: its half of every query block of this program."""
    D: gl.constexpr = q_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = scores_layout(2)
    o_layout: gl.constexpr = out_layout(D, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    factor = scale * LOG2_E
    last_size = N_KV - (T - 1) * 64
    # What the mean of the last, short block weighs less than the others', as a product of q and k.
    last_bias = (gl.log2(last_size.to(gl.float32)) - MEAN_BIAS) / factor
    step = 0
    turn = 0
    total_blocks = num_heads * M
    head, m = query_block(gl.program_id(0), num_heads, M, first_exact, last_exact)
    count = gl.load(kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots))
    for index in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        block = head.to(gl.int64) * M + m
        kept_row = kept_ptr + block * (1 + slots)
        num_tiles = count
        if TAIL:
            num_tiles += gl.where(count == T, 0, (T + 63) // 64)
        # The kept tile with keys past the end, if there is one.
        last = gl.load(kept_row + count, mask=count < T, other=T - 1) if RAGGED else -1
        short = gl.where(last == T - 1, count - 1, -1)
        # All rows of a GPU's memory have numbers of 32 bits, which leave registers to the loop.
        row = (head * M + m) * 128 + part * 64 + gl.arange(0, 64, layout=row_layout)
        lse, offset = gl.load(lse_ptr + row), gl.load(offset_ptr + row)
        cap = lse
        if cap_ptr is not None:
            cap = gl.load(cap_ptr + row)

        mbarrier.wait(q_full, turn & 1)
        q = q_smem.index(part).load(left_operand(s_layout, 2))
        grad = grad_smem.index(part).load(left_operand(s_layout, 2))
        mbarrier.arrive(q_empty, count=1)
        dq = gl.zeros([64, D], gl.float32, layout=o_layout)
        dropped = sum_in_thread(gl.zeros([64, 64], gl.float32, layout=s_layout))
        mbarrier.wait(full.index(slot_of(step, STAGES)), phase_of(step, STAGES))
        score_token, prob_token = issue_scores(q, grad, k_smem, v_smem, step)
        if turn > 0:
            tma.store_wait(0)
            if ACCUMULATE:
                mbarrier.arrive(dq_empty, count=1)
        scores, d_probs = warpgroup_mma_wait(0, deps=[score_token, prob_token])
        if RAGGED:
            for _ in range((short == 0).to(gl.int32)):
                scores = mask_short(scores, last_size)
        d_scores = score_gradient(scores, d_probs, lse, offset, cap, factor, dtype, cap_ptr is not None)
        if num_tiles > 1:
            mbarrier.wait(full.index(slot_of(step + 1, STAGES)), phase_of(step + 1, STAGES))
        for i in range(1, num_tiles):
            first, low, high = 0, 0, 0
            if TAIL:
                # Read long before it is used.
                first = gl.where(i >= count, (i - count) * 64, -1)
                words_ptr = bits_ptr + block * words + first // 32
                low = gl.load(words_ptr, mask=i >= count, other=0)
                high = gl.load(words_ptr + 1, mask=(i >= count) & (first // 32 + 1 < words), other=0)
            score_token, prob_token = issue_scores(q, grad, k_smem, v_smem, step + 1)
            slot = slot_of(step, STAGES)
            left = gl.convert_layout(d_scores, left_operand(o_layout, 2))
            token = warpgroup_mma(left, k_smem.index(slot), dq, is_async=True)
            if k_mean_ptr is not None:
                dropped += sum_in_thread(d_scores.to(gl.float32)) * (i <= count).to(gl.float32)
            scores, d_probs = warpgroup_mma_wait(1, deps=[score_token, prob_token])
            # Loops that run once or not at all: a branch becomes instructions that every tile executes.
            if TAIL:
                for _ in range((i == count).to(gl.int32)):
                    here = row
                    if cap_ptr is not None and VALUES:
                        # `row` too, but no address that the compiler would hold from before the loop and then spill.
                        here = row + (i - count)
                    lse, offset = gl.load(tail_lse_ptr + here) - MEAN_BIAS, gl.load(tail_offset_ptr + here)
                    cap = gl.full([64], float("inf"), gl.float32, layout=row_layout)
                    if cap_ptr is not None and VALUES:
                        cap = gl.load(tail_cap_ptr + here)
                for _ in range(((i >= count) | (i == short)).to(gl.int32)):
                    scores = mask(scores, first, low, high, T, last_size, last_bias, RAGGED)
                    if not VALUES:
                        # A kept short key block, which comes here too, has values.
                        d_probs = d_probs * gl.where(first < 0, 1.0, 0.0)
            elif RAGGED:
                for _ in range((i == short).to(gl.int32)):
                    scores = mask_short(scores, last_size)
            d_scores = score_gradient(scores, d_probs, lse, offset, cap, factor, dtype, cap_ptr is not None)
            # Here and not where it is needed: a branch keeps the assembler from moving the next wait up to before the
            # exponentials.
            if i + 1 < num_tiles:
                mbarrier.wait(full.index(slot_of(step + 2, STAGES)), phase_of(step + 2, STAGES))
            dq = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        left = gl.convert_layout(d_scores, left_operand(o_layout, 2))
        token = warpgroup_mma(left, k_smem.index(slot_of(step, STAGES)), dq, is_async=True)
        # The next block, while the last tile is multiplied.
        next_head, next_m = query_block(index + gl.num_programs(0), num_heads, M, first_exact, last_exact)
        next_count = gl.load(
            kept_ptr + (next_head.to(gl.int64) * M + next_m) * (1 + slots),
            mask=index + gl.num_programs(0) < total_blocks, other=1,
        )  # fmt: skip
        b, h = head // H, head % H
        k_mean = 0.0
        if k_mean_ptr is not None:
            k_mean = channels(k_mean_ptr + (b * (H // GROUP) + h // GROUP).to(gl.int64) * D, D)
            dropped += sum_in_thread(d_scores.to(gl.float32)) * (num_tiles <= count).to(gl.float32)
        dq = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(slot_of(step, STAGES)), count=1)
        step += 1

        if k_mean_ptr is not None:
            drop = gl.convert_layout(gl.sum(dropped, 1), gl.SliceLayout(1, o_layout))
            dq -= drop[:, None] * gl.convert_layout(k_mean, gl.SliceLayout(0, o_layout))[None, :]
        dq *= scale
        place = dq_smem.index(part)
        if ACCUMULATE:
            mbarrier.wait(dq_full, turn & 1)
            dq += place.load(o_layout).to(gl.float32)
        write_rows(
            dq_tiles, dq_ptr, None, dq.to(dtype), place, b * dq_rows + h * dq_head_rows, h * dq_columns,
            m * 128 + part * 64, N, dq_sn,
        )  # fmt: skip
        head, m, count = next_head, next_m, next_count
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _queries_kernel(
    q_tiles, grad_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, dq_tiles, kept_ptr, bits_ptr, k_mean_ptr, lse_ptr,
    offset_ptr, cap_ptr, tail_lse_ptr, tail_offset_ptr, tail_cap_ptr, dq_ptr, q_rows, q_head_rows, q_columns, grad_rows,
    grad_head_rows, grad_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, dq_rows,
    dq_head_rows, dq_columns, dq_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact, scale,
    RAGGED: gl.constexpr, VALUES: gl.constexpr, ACCUMULATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as multiprocessors. k_bar_tiles None: no tail has pooled scores.

    VALUES: the tail's values are the means. ACCUMULATE: add to what dq holds. k_mean_ptr, cap_ptr may be None; without
    the latter tail_cap_ptr is not read.
    """
    TAIL: gl.constexpr = k_bar_tiles is not None
    tile: gl.constexpr = q_tiles.block_type.shape
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [2, tile[0], tile[1]], q_tiles.layout)
    grad_smem = gl.allocate_shared_memory(q_tiles.dtype, [2, tile[0], tile[1]], q_tiles.layout)
    dq_smem = gl.allocate_shared_memory(q_tiles.dtype, [2, tile[0], tile[1]], q_tiles.layout)
    k_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, tile[0], tile[1]], q_tiles.layout)
    v_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, tile[0], tile[1]], q_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # What is full one thread announces; what is empty, both groups.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(dq_full, count=1)
    mbarrier.init(dq_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), dq_tiles, kept_ptr, bits_ptr, k_mean_ptr, lse_ptr, offset_ptr, cap_ptr,
                        tail_lse_ptr, tail_offset_ptr, tail_cap_ptr, dq_ptr, q_smem, grad_smem, k_smem, v_smem,
                        dq_smem, q_full, q_empty, full, empty, dq_full, dq_empty, dq_rows, dq_head_rows, dq_columns,
                        dq_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact, scale,
                        RAGGED, TAIL, VALUES, ACCUMULATE)),
            (_consume, (gl.constexpr(1), dq_tiles, kept_ptr, bits_ptr, k_mean_ptr, lse_ptr, offset_ptr, cap_ptr,
                        tail_lse_ptr, tail_offset_ptr, tail_cap_ptr, dq_ptr, q_smem, grad_smem, k_smem, v_smem,
                        dq_smem, q_full, q_empty, full, empty, dq_full, dq_empty, dq_rows, dq_head_rows, dq_columns,
                        dq_sn, H, GROUP, N, N_KV, M, T, slots, words, num_heads, first_exact, last_exact, scale,
                        RAGGED, TAIL, VALUES, ACCUMULATE)),
            (fetch_for_queries, (q_tiles, grad_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, dq_tiles, kept_ptr,
                                 q_smem, grad_smem, k_smem, v_smem, dq_smem, q_full, q_empty, full, empty, dq_full,
                                 dq_empty, q_rows, q_head_rows, q_columns, grad_rows, grad_head_rows, grad_columns,
                                 k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, dq_rows, dq_head_rows,
                                 dq_columns, H, GROUP, M, T, slots, num_heads, first_exact, last_exact, ACCUMULATE)),
        ],
        [4, 1],
        # Of a thread; the fetching warp gives its own to the groups that compute.
        [240, 24],
    )  # fmt: skip


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
) -> bool:
    """Write dq as its namesake in Triton and return True, or False where this kernel cannot do it."""
    if not is_eligible(q, real, order, k.shape[2], settings):
        return False
    tiles, num_stages = [token_tiles(x) for x in (q, grad_out, k, v)], _num_stages(q.shape[3], shared_memory(q.device))
    if None in tiles or num_stages < MIN_STAGES:
        return False
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    blocks, slots = kept.shape[2], kept.shape[3] - 1
    T, exact = means.n.shape[1], settings.exact_queries(q_len, kv_len)
    linear, has_tail = settings.tail == "linear", slots < T
    pooled = has_tail and (not linear or settings.mixing == "row")
    # Without values of its own the tail's second tile is not used.
    bars = (means.k_bar, means.k_bar if linear else means.v_bar) if pooled else (None, None)
    launch(
        _queries_kernel, (min(num_multiprocessors(q.device), batch * heads * blocks),),
        *tiles, *(x if x is None else matrix_tiles(x, BLOCK_K) for x in bars), token_tiles(dq),
        kept.contiguous(), bits, means.center, rows.sparse_lse, rows.offset,
        None if settings.qk_format is None else rows.sparse_cap, rows.tail_lse, rows.tail_offset, rows.tail_cap, dq,
        *(step for x in (q, grad_out, k, v, dq) for step in matrix_steps(x)), dq.stride(2),
        heads, heads // k.shape[1], q_len, kv_len, blocks, T, slots, bits.shape[2], batch * heads, exact.num_first,
        exact.last_start, settings.scale,
        RAGGED=kv_len % BLOCK_K != 0, VALUES=not linear, ACCUMULATE=linear and has_tail,
        STAGES=num_stages, num_warps=4,
    )  # fmt: skip
    return True


def _num_stages(dim: int, shared_memory: int) -> int:
    """Slots of the rings: a power of two, as many as fit beside q, dO, dq and barriers."""
    tile = BLOCK_K * dim * 2
    return next_power_of_two((shared_memory - 6 * tile - 2048) // (2 * tile) + 1) // 2
