"""Attention in FP8 on Hopper, two programs a multiprocessor: faster there than `gluon_attention.py`.

Its softmax keeps the tensor cores waiting: two groups of warps of 240 registers issue instructions in 45 % of cycles.
Here four groups share a multiprocessor, two of each program, 64 query rows each, with 128 registers a thread. Queries
are multiplied from shared memory, where their codes are, and no group only fetches: see `gluon_fp8_stream.py`.

For inference, keys and values in FP8, head dim 128: a pooled tail, kept keys and means in one softmax, with a learned
logit or none; and a linear tail with block mixing where there are many tiles, whose state comes as two more tiles. All
else is `gluon_attention.py`'s: 16-bit tiles leave no room for two programs. With a pooled tail the tensor cores find
the sums of weights too, so that an output is divided by the sum of what its values were multiplied by, rounded weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sla2_compile.kernels.attention_stage import AttentionInputs, Outputs
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_attention import MAX_TILES_IN_TENSOR_CORES
from sla2_compile.kernels.gluon_codes import halves, to_codes
from sla2_compile.kernels.gluon_feature_map import LOG2_E, weighed_features
from sla2_compile.kernels.gluon_fp8_stream import (
    MAX_TILES,
    PLACES,
    TABLE_LAYOUT,
    another,
    attend_to_tiles,
    bring,
    fetch,
    fetch_states,
    place_of,
    states_in_slot,
    write_tables,
)
from sla2_compile.kernels.gluon_stream import MEAN_BIAS, group_barrier, out_layout, scores_layout, sum_in_thread
from sla2_compile.kernels.gluon_tiles import (
    BLOCK_K,
    HALF_REGISTERS,
    matrix_tiles,
    phase_of,
    row_layout,
    slot_of,
    suits_hopper,
    token_tiles,
    write_rows,
)
from sla2_compile.kernels.hardware import num_multiprocessors
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps

DIM = 128
# Of a query block with a linear tail: for fewer tiles `gluon_attention.py` is as quick.
MIN_TILES = 24
# Of the rings: queries and their codes leave room for no more.
STAGES = 4
_REGISTERS = gl.constexpr(HALF_REGISTERS)
_ONES_LAYOUT = gl.constexpr(gl.NVMMASharedLayout.get_default_for([8, 64], gl.float8e4nv))
_ONES_IN_REGISTERS = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _add_states(part: gl.constexpr, acc, step, features, state_tiles, k_smem, v_smem, full, empty):
    """`acc` (64, D) and the product of features with a state, two tiles of the ring, which are given back."""
    STAGES: gl.constexpr = k_smem.shape[0]
    half_layout: gl.constexpr = out_layout(64, 2)
    left, right = halves(acc)
    left, right = gl.convert_layout(left, half_layout), gl.convert_layout(right, half_layout)
    for half in gl.static_range(2):
        slot = slot_of(step, STAGES)
        mbarrier.wait(full.index(slot), phase_of(step, STAGES))
        phi = features.slice(64 * half, 64, 1)
        of_left, of_right = states_in_slot(state_tiles, k_smem, v_smem, slot)
        left_token = warpgroup_mma(phi, of_left, left, is_async=True)
        right_token = warpgroup_mma(phi, of_right, right, is_async=True)
        left, right = warpgroup_mma_wait(0, deps=[left_token, right_token])
        mbarrier.arrive(empty.index(slot), count=1, pred=(step + part) & 1 == 1)
        step += 1
    joined = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), acc.shape)
    return gl.convert_layout(joined, acc.type.layout), step


@gluon.jit
def _attend(
    part: gl.constexpr, q_tiles, k_tiles, v_tiles, state_tiles, out_tiles, kept_ptr, bits_ptr, logit_ptr, q_scale_ptr,
    k_scale_ptr, v_scale_ptr, states_ptr, out_ptr, sparse_lse_ptr, tail_lse_ptr, rows_smem, q_smem, k_smem, v_smem,
    numbers, scales, q_full, full, empty, q_rows, q_head_rows, q_columns, out_rows, out_head_rows, out_columns,
    out_sn, H, GROUP, N, N_KV, slots, num_heads, scale, RAGGED: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """One group of warps: its half of every query block of this program.

    sparse_lse_ptr, tail_lse_ptr: only one group has them. state_tiles None: the tail is pooled; else bits_ptr is.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = q_smem.shape[1]
    LINEAR: gl.constexpr = state_tiles is not None
    dtype: gl.constexpr = q_tiles.dtype
    o_layout: gl.constexpr = out_layout(D, 1)
    # Few arguments: those of a second group go by way of shared memory, of which nothing is left.
    M, T = (N + 127) // 128, (N_KV + 63) // 64
    last_size = N_KV - (T - 1) * 64
    last_bias = gl.log2(last_size.to(gl.float32)) - MEAN_BIAS
    total_blocks = num_heads * M
    step = 0
    count, num_tiles, first_block = write_tables(
        0, kept_ptr, k_scale_ptr, numbers, scales, part, H, GROUP, M, T, slots, total_blocks, not LINEAR
    )  # fmt: skip
    if part < num_tiles:
        fetch(k_tiles, v_tiles, numbers, first_block, part, part, k_smem, v_smem, full, empty)
    for turn in range((total_blocks - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)):
        wide_head, m, b, h, _ = place_of(turn, H, GROUP, M)
        block = wide_head * M + m
        first_row = m * 128 + part * 64
        # Rows of the last output have left from where queries arrive.
        tma.store_wait(0)
        mbarrier.expect(q_full, q_tiles.block_type.nbytes)
        q_row, q_column = b * q_rows + h * q_head_rows + first_row, h * q_columns
        tma.async_copy_global_to_shared(q_tiles, [q_row, q_column], q_full, rows_smem)
        q_scale = gl.load(q_scale_ptr + block)
        # Kept keys' bias is whole, so that codes do not depend on it; what that leaves is made up for behind them.
        bias, fraction, logit = 0.0, 1.0, 0.0
        if logit_ptr is not None:
            logit = gl.load(logit_ptr + h * M + m) * LOG2_E
            if not LINEAR:
                bias = gl.floor(logit)
                fraction = gl.exp2(logit - bias)
        if LINEAR:
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, row_layout(D)))
            z = gl.load(states_ptr + (block * (D + 1) + D) * D + channel).to(gl.float32)
        short_size = 64
        if RAGGED:
            # The last block, if it is kept, comes first.
            first_number = gl.load(kept_ptr + block * (1 + slots) + count)
            short_size = gl.where(first_number == T - 1, last_size, 64)
        mbarrier.wait(q_full, turn & 1)
        q = rows_smem.load(row_layout(D)).to(gl.float32)
        q_smem.store(to_codes(q, q_scale, q_smem.dtype))
        # In place of the queries until the output comes there: what the product with the state, or sums, need.
        ones = None
        if LINEAR:
            rows_smem.store(weighed_features(q, z, 1 / (1 + gl.exp2(logit)), dtype, MAP))
        else:
            ones = rows_smem._reinterpret(q_smem.dtype, [8, 64], _ONES_LAYOUT)
            # As bits: of a conversion of constants ptxas 12.8 leaves two bytes of each word unset.
            codes_of_one = gl.full([8, 64], 0x38, gl.int8, layout=_ONES_IN_REGISTERS)
            ones.store(codes_of_one.to(q_smem.dtype, bitcast=True))
        fence_async_shared()
        mbarrier.wait(full.index(slot_of(step, STAGES)), phase_of(step, STAGES))
        # Here, once: the compiler would put it into the loops.
        group_barrier()
        # The next query block's list of tiles; where there is none, the last one's.
        following = gl.minimum(gl.program_id(0) + (another(turn) + 1) * gl.num_programs(0), total_blocks - 1)
        bring(kept_ptr + following.to(gl.int64) * (1 + slots) + gl.minimum(gl.arange(0, 128, layout=PLACES), slots))
        acc = gl.zeros([64, D], gl.float32, layout=o_layout)
        total = sum_in_thread(gl.zeros([64, 64], gl.float32, layout=scores_layout(1)))
        peak = total - float("inf")
        factor = scale * LOG2_E * q_scale
        acc, peak, total, step = attend_to_tiles(
            part, acc, peak, total, step, 0, count, num_tiles, q_smem, ones, k_smem, v_smem, full, empty, k_tiles,
            v_tiles, numbers, first_block, scales, factor, bias, None, T, short_size, 0.0, False, RAGGED,
        )  # fmt: skip
        if not LINEAR:
            if logit_ptr is not None:
                acc, total = acc * fraction, total * fraction
            words_ptr = bits_ptr + block * (2 * ((T + 63) // 64))
            acc, peak, total, step = attend_to_tiles(
                part, acc, peak, total, step, count, num_tiles, num_tiles, q_smem, ones, k_smem, v_smem, full, empty,
                k_tiles, v_tiles, numbers, first_block, scales, factor, MEAN_BIAS, words_ptr, T, short_size, last_bias,
                True, RAGGED,
            )  # fmt: skip
        # Of the next two tiles, which is this group's to fetch.
        own = (step + part) & 1
        if own == 0:
            mbarrier.arrive(empty.index(slot_of(step - 1, STAGES)), count=1)
        wide_head, m, b, h, kv_head = place_of(another(turn), H, GROUP, M)
        next_step = step
        if LINEAR:
            row = (wide_head * M + m).to(gl.int32) * (D + 1) + 64 * own
            fetch_states(state_tiles, row, step + own, k_smem, v_smem, full, empty)
            next_step += 2
        # Before this block's output, so that they are there when it has left.
        count, num_tiles, first_block = write_tables(
            turn + 1, kept_ptr, k_scale_ptr, numbers, scales, own, H, GROUP, M, T, slots, total_blocks, not LINEAR
        )  # fmt: skip
        if own < num_tiles:
            fetch(k_tiles, v_tiles, numbers, first_block, own, next_step + own, k_smem, v_smem, full, empty)
        first_row = m * 128 + part * 64
        # Not by `channels`: to move them between threads takes shared memory, of which nothing is left.
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
        v_scale = gl.load(v_scale_ptr + kv_head * D + channel)
        # Without `ones` a thread has the sum of its columns, with them that of the row.
        total = gl.sum(total, 1) if LINEAR else gl.max(total, 1)
        share = gl.convert_layout(1 / total, gl.SliceLayout(1, o_layout))
        if LINEAR:
            logit = 0.0
            if logit_ptr is not None:
                # Again, rather than held by a register that the loops need.
                logit = gl.load(logit_ptr + h * M + m) * LOG2_E
            share *= 1 / (1 + gl.exp2(-logit))
        acc = acc * v_scale[None, :] * share[:, None]
        if LINEAR:
            acc, step = _add_states(part, acc, step, rows_smem, state_tiles, k_smem, v_smem, full, empty)
        write_rows(
            out_tiles, out_ptr, None, acc.to(dtype), rows_smem, b * out_rows + h * out_head_rows,
            h * out_columns, first_row, N, out_sn,
        )  # fmt: skip
        if sparse_lse_ptr is not None:
            # Nobody reads them where nothing is saved.
            row = m * 128 + gl.arange(0, 128, layout=PLACES)
            zeros = gl.zeros([128], gl.float32, layout=PLACES)
            gl.store(sparse_lse_ptr + wide_head * N + row, zeros, mask=row < N)
            gl.store(tail_lse_ptr + wide_head * N + row, zeros, mask=row < N)
    tma.store_wait(0)


@gluon.jit
def _fp8_attention_kernel(
    q_tiles, k_tiles, v_tiles, state_tiles, out_tiles, kept_ptr, bits_ptr, logit_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, states_ptr, out_ptr, sparse_lse_ptr, tail_lse_ptr, q_rows, q_head_rows, q_columns, out_rows,
    out_head_rows, out_columns, out_sn, H, GROUP, N, N_KV, slots, num_heads, scale, RAGGED: gl.constexpr,
    MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: at most two programs a multiprocessor, and no more than query blocks."""
    D: gl.constexpr = q_tiles.block_type.shape[1]
    codes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], k_tiles.dtype)
    # Of either group: queries, later the output; their codes.
    rows_smem = gl.allocate_shared_memory(q_tiles.dtype, [2, 64, D], q_tiles.layout)
    q_smem = gl.allocate_shared_memory(k_tiles.dtype, [2, 64, D], codes_layout)
    k_smem = gl.allocate_shared_memory(k_tiles.dtype, [STAGES] + k_tiles.block_type.shape, k_tiles.layout)
    v_smem = gl.allocate_shared_memory(v_tiles.dtype, [STAGES] + v_tiles.block_type.shape, v_tiles.layout)
    numbers = gl.allocate_shared_memory(gl.int16, [2, 32], TABLE_LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [2, 64], TABLE_LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        # By the group that does not fetch it; who does knows when it is done itself.
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (gl.constexpr(0), q_tiles, k_tiles, v_tiles, state_tiles, out_tiles, kept_ptr, bits_ptr,
                       logit_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, states_ptr, out_ptr, sparse_lse_ptr,
                       tail_lse_ptr, rows_smem.index(0), q_smem.index(0), k_smem, v_smem, numbers.index(0),
                       scales.index(0), q_full.index(0), full, empty, q_rows, q_head_rows, q_columns, out_rows,
                       out_head_rows, out_columns, out_sn, H, GROUP, N, N_KV, slots, num_heads, scale, RAGGED, MAP)),
            (_attend, (gl.constexpr(1), q_tiles, k_tiles, v_tiles, state_tiles, out_tiles, kept_ptr, bits_ptr,
                       logit_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, states_ptr, out_ptr, None, None,
                       rows_smem.index(1), q_smem.index(1), k_smem, v_smem, numbers.index(1), scales.index(1),
                       q_full.index(1), full, empty, q_rows, q_head_rows, q_columns, out_rows, out_head_rows,
                       out_columns, out_sn, H, GROUP, N, N_KV, slots, num_heads, scale, RAGGED, MAP)),
        ],
        [4],
        [_REGISTERS],
    )  # fmt: skip


def _is_eligible(outputs: Outputs, inputs: AttentionInputs, settings: Settings) -> bool:
    q, codes, slots = inputs.q, inputs.codes, inputs.kept.shape[3] - 1
    # Arguments of the second group go by way of shared memory, and these are more than there is room for.
    too_many = inputs.alpha_logit is not None and q.shape[1] != inputs.k.shape[1]
    pooled = settings.tail == "pooled" and settings.mixing == "row" and inputs.alpha_gain is None
    linear = inputs.states is not None and settings.mixing == "block" and slots >= MIN_TILES and not too_many
    plain = outputs.sparse_out is None and inputs.real is None and inputs.order is None
    exact = settings.exact_queries(q.shape[2], inputs.k.shape[2])
    T = inputs.statistics.n.shape[1]
    num_tiles = slots + (num_blocks(T, BLOCK_K) if pooled else 0)
    in_fp8 = codes.k is not None and codes.v is not None and (linear or codes.has_means_values)
    return (
        suits_hopper(q, settings) and q.shape[3] == DIM and inputs.has_tail and (pooled or linear) and plain
        and in_fp8 and settings.qk_format == "fp8" and exact.count == 0
        and num_tiles <= min(MAX_TILES, MAX_TILES_IN_TENSOR_CORES)
    )  # fmt: skip


def attend(outputs: Outputs, inputs: AttentionInputs, settings: Settings) -> bool:
    """Write the outputs and return True, or False where this kernel cannot do it, and nothing is written."""
    if not _is_eligible(outputs, inputs, settings):
        return False
    q, codes = inputs.q, inputs.codes
    assert codes.k is not None
    assert codes.v is not None
    (batch, heads, q_len, dim), (key_heads, kv_len) = q.shape, inputs.k.shape[1:3]
    slots, blocks = inputs.kept.shape[3] - 1, inputs.kept.shape[2]
    states = inputs.states
    linear = states is not None
    state_tiles = matrix_tiles(states, 64, 64) if states is not None else None
    q_tiles, out_tiles = token_tiles(q), token_tiles(outputs.out)
    if q_tiles is None or out_tiles is None:
        return False
    launch(
        _fp8_attention_kernel, (min(2 * num_multiprocessors(q.device), batch * heads * blocks),),
        q_tiles, matrix_tiles(codes.k, BLOCK_K), matrix_tiles(codes.v, dim), state_tiles, out_tiles, inputs.kept,
        None if linear else inputs.bits, inputs.alpha_logit, codes.q_scale, codes.k_scale, codes.v_scale, states,
        outputs.out, outputs.sparse_lse, outputs.tail_lse,
        *(step for x in (q, outputs.out) for step in matrix_steps(x)), outputs.out.stride(2),
        heads, heads // key_heads, q_len, kv_len, slots, batch * heads, settings.scale,
        RAGGED=kv_len % BLOCK_K != 0, MAP=settings.feature_map, STAGES=STAGES, num_warps=4, maxnreg=HALF_REGISTERS,
    )  # fmt: skip
    return True
