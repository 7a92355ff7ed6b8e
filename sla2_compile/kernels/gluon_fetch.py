"""The fetching warp of `gluon_attention.py`: it keeps rings of tiles in shared memory full with the copy engine."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sla2_compile.kernels.gluon_stream import next_slot


@gluon.jit
def query_block(index, num_heads, M, first_exact, last_exact):
    """(head, query block) number `index`; the blocks that keep every key block come first, since they take longest."""
    num_exact = first_exact + M - last_exact
    is_exact = index < num_heads * num_exact
    per_head = gl.where(is_exact, num_exact, M - num_exact)
    index = gl.where(is_exact, index, index - num_heads * num_exact)
    head, m = index // per_head, index % per_head
    exact_m = gl.where(m < first_exact, m, last_exact + m - first_exact)
    return head, gl.where(is_exact, exact_m, first_exact + m)


@gluon.jit
def fetch_pair(k_tiles, v_tiles, k_row, k_column, v_row, v_column, k_smem, v_smem, full, empty, slot, phase):
    """A tile of keys and one of values into a slot of their rings, once that is empty; the next slot and its phase.

    They share a barrier: whoever waits for the scores' keys has waited for the values that come one step later.
    """
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(k_tiles, [k_row, k_column], full.index(slot), k_smem.index(slot))
    tma.async_copy_global_to_shared(v_tiles, [v_row, v_column], full.index(slot), v_smem.index(slot))
    return next_slot(slot, phase, k_smem.shape[0])


@gluon.jit
def fetch_state(state_tiles, block, state_smem, state_full, state_empty, turn):
    """H of a query block, which lies above its Z."""
    mbarrier.wait(state_empty, (turn & 1) ^ 1)
    mbarrier.expect(state_full, state_tiles.block_type.nbytes)
    row = block * (state_smem.shape[0] + 1)
    tma.async_copy_global_to_shared(state_tiles, [row, 0], state_full, state_smem)


@gluon.jit
def _put_scale(scale, scale_smem, empty, slot, phase):
    """The scale of a block of codes, for all rows of scores alike, into the slot of its tile once that is empty."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    scale_smem.index(slot).store(gl.full([64], scale, gl.float32, layout=layout))


@gluon.jit
def fetch(
    q_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, state_tiles, k_scale_ptr, kept_ptr, q_smem, k_smem, v_smem,
    scale_smem, v_bar_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, q_rows, q_head_rows,
    q_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H, GROUP, M, T, num_stored, slots,
    num_heads, first_exact, last_exact,
):  # fmt: skip
    """Every tensor is a matrix to it, whose rows are as far apart as two tokens; codes lie block after block.

    q_rows: rows from one batch element to the next; q_head_rows, q_columns: rows and columns from one head to the next.
    """
    D: gl.constexpr = q_smem.shape[2]
    # Rows of a tile of values: keys, or channels where it is transposed.
    V_ROWS: gl.constexpr = v_tiles.block_type.shape[0]
    CODES: gl.constexpr = k_scale_ptr is not None
    slot, phase = 0, 0
    turn = 0
    total_blocks = num_heads * M
    # Key blocks come from the last to the first: the short one, if it is listed, meets `begin`. Lists and scales are
    # read a step before they are needed: this warp has nothing else to do while they come.
    head, m = query_block(gl.program_id(0), num_heads, M, first_exact, last_exact)
    kept_row = kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots)
    count = gl.load(kept_row)
    first = gl.load(kept_row + gl.minimum(count, slots))
    for index in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        b, h = head // H, head % H
        g = h // GROUP
        kv_head = b * (H // GROUP) + g
        j = gl.where(count < T, first, T - 1)
        scale, mean_scale = 0.0, 0.0
        scales = k_scale_ptr
        if CODES:
            scales += kv_head * num_stored
            scale = gl.load(scales + j)
            if k_bar_tiles is not None:
                mean_scale = gl.load(scales + T)
        buffer = turn & 1
        queries_full = q_full.index(buffer)
        mbarrier.wait(q_empty.index(buffer), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(queries_full, 2 * q_tiles.block_type.nbytes)
        q_row, q_column = b * q_rows + h * q_head_rows + m * 128, h * q_columns
        tma.async_copy_global_to_shared(q_tiles, [q_row, q_column], queries_full, q_smem.index(2 * buffer))
        tma.async_copy_global_to_shared(q_tiles, [q_row + 64, q_column], queries_full, q_smem.index(2 * buffer + 1))
        if k_smem.dtype == q_smem.dtype:
            k_row, k_column = b * k_rows + g * k_head_rows, g * k_columns
        else:
            k_row, k_column = kv_head * num_stored * 64, 0
        if v_smem.dtype == q_smem.dtype:
            v_row, v_column = b * v_rows + g * v_head_rows, g * v_columns
        else:
            v_row, v_column = kv_head * num_stored * D, 0
        next_head, next_m = query_block(index + gl.num_programs(0), num_heads, M, first_exact, last_exact)
        next_row = kept_ptr + (next_head.to(gl.int64) * M + next_m) * (1 + slots)
        has_next = index + gl.num_programs(0) < total_blocks
        next_count = gl.load(next_row, mask=has_next, other=0)
        for i in range(count):
            following = gl.load(kept_row + count - 1 - i, mask=(count < T) & (i + 1 < count), other=T - 2 - i)
            if CODES:
                _put_scale(scale, scale_smem, empty, slot, phase)
            slot, phase = fetch_pair(
                k_tiles, v_tiles, k_row + j * 64, k_column, v_row + j * V_ROWS, v_column, k_smem, v_smem, full, empty,
                slot, phase,
            )  # fmt: skip
            j = following
            if CODES:
                scale = gl.load(scales + j, mask=i + 1 < count, other=0.0)
        first = gl.load(next_row + gl.minimum(next_count, slots), mask=has_next, other=0)
        if k_bar_tiles is not None:
            # As codes means are the blocks behind the keys'.
            k_row, v_row = kv_head * T, kv_head * T
            if k_smem.dtype != q_smem.dtype:
                k_row = (kv_head * num_stored + T) * 64
            if v_bar_smem.dtype != q_smem.dtype:
                v_row = (kv_head * num_stored + T) * D
            V_BAR_ROWS: gl.constexpr = v_bar_tiles.block_type.shape[0]
            num_means = gl.where(count == T, 0, (T + 63) // 64)
            for i in range(num_means):
                if CODES:
                    _put_scale(mean_scale, scale_smem, empty, slot, phase)
                slot, phase = fetch_pair(
                    k_bar_tiles, v_bar_tiles, k_row + i * 64, 0, v_row + i * V_BAR_ROWS, 0, k_smem, v_bar_smem, full,
                    empty, slot, phase,
                )  # fmt: skip
                if CODES:
                    mean_scale = gl.load(scales + T + i + 1, mask=i + 1 < num_means, other=0.0)
        if state_tiles is not None:
            fetch_state(state_tiles, head * M + m, state_smem, state_full, state_empty, turn)
        head, m, kept_row, count = next_head, next_m, next_row, next_count
        turn += 1
