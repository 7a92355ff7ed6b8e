"""The fetching warps of `gluon_attention.py` where tokens are visited in an order of their own: they gather rows.

The copy engine takes rows that are neighbours in memory, and tokens of a 4 x 4 x 4 tile are not, so four warps copy
row after row into the same rings. Such a copy announces nothing: the warps wait for it a tile later and then tell the
groups that compute. Block means and states have no order and come by the copy engine.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sla2_compile.kernels.gluon_fetch import fetch_pair, fetch_state, query_block
from sla2_compile.kernels.gluon_stream import next_slot
from sla2_compile.kernels.gluon_tiles import row_layout, visited_tokens


@gluon.jit
def _copy_rows(ptr, pitch, row, column, token, smem):
    D: gl.constexpr = smem.shape[1]
    layout: gl.constexpr = row_layout(D)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    pointers = ptr + (row + token).to(gl.int64)[:, None] * pitch + (column + channel)[None, :]
    async_copy.async_copy_global_to_shared(smem, pointers)


@gluon.jit
def _announce(full, slot, STAGES: gl.constexpr):
    """Tell the groups of a tile that has been waited for; the slot after it."""
    # The tensor cores read what ordinary copies wrote.
    fence_async_shared()
    mbarrier.arrive(full.index(slot), count=1)
    return gl.where(slot + 1 == STAGES, 0, slot + 1)


@gluon.jit
def gather(
    q_ptr, k_ptr, v_ptr, q_pitch, k_pitch, v_pitch, order_ptr, k_bar_tiles, v_bar_tiles, state_tiles, kept_ptr, q_smem,
    k_smem, v_smem, state_smem, q_full, q_empty, full, empty, state_full, state_empty, q_rows, q_head_rows, q_columns,
    k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, H, GROUP, N, N_KV, M, T, slots, num_heads,
    first_exact, last_exact,
):  # fmt: skip
    """As `gluon_fetch.fetch`. order_ptr: (N,) int32, the token at each visited position, of queries and keys alike."""
    STAGES: gl.constexpr = k_smem.shape[0]
    layout: gl.constexpr = row_layout(k_smem.shape[2])
    slot, phase = 0, 0
    # The slot that is announced next.
    oldest = 0
    turn = 0
    total_blocks = num_heads * M
    # As `fetch` reads lists ahead, and the order of a tile's tokens with them.
    head, m = query_block(gl.program_id(0), num_heads, M, first_exact, last_exact)
    kept_row = kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots)
    count = gl.load(kept_row)
    j = gl.load(kept_row + count, mask=count < T, other=T - 1)
    tokens = visited_tokens(order_ptr, j * 64, N_KV, layout)
    for index in range(gl.program_id(0), total_blocks, gl.num_programs(0)):
        b, h = head // H, head % H
        g = h // GROUP
        buffer = turn & 1
        mbarrier.wait(q_empty.index(buffer), ((turn >> 1) & 1) ^ 1)
        q_row, q_column = b * q_rows + h * q_head_rows, h * q_columns
        # On their way with the first tile, and announced with it.
        for half in gl.static_range(2):
            _copy_rows(
                q_ptr, q_pitch, q_row, q_column, visited_tokens(order_ptr, m * 128 + half * 64, N, layout),
                q_smem.index(2 * buffer + half),
            )  # fmt: skip
        k_row, k_column = b * k_rows + g * k_head_rows, g * k_columns
        v_row, v_column = b * v_rows + g * v_head_rows, g * v_columns
        j = gl.load(kept_row + count - 1, mask=(count < T) & (count > 1), other=T - 2)
        next_head, next_m = query_block(index + gl.num_programs(0), num_heads, M, first_exact, last_exact)
        next_row = kept_ptr + (next_head.to(gl.int64) * M + next_m) * (1 + slots)
        has_next = index + gl.num_programs(0) < total_blocks
        next_count = gl.load(next_row, mask=has_next, other=1)
        for i in range(count):
            mbarrier.wait(empty.index(slot), phase ^ 1)
            _copy_rows(k_ptr, k_pitch, k_row, k_column, tokens, k_smem.index(slot))
            _copy_rows(v_ptr, v_pitch, v_row, v_column, tokens, v_smem.index(slot))
            async_copy.commit_group()
            # Of the tile after this one, and the number of the one after that.
            tokens = visited_tokens(order_ptr, gl.maximum(j, 0) * 64, N_KV, layout)
            j = gl.load(kept_row + count - 2 - i, mask=(count < T) & (i + 2 < count), other=T - 3 - i)
            slot, phase = next_slot(slot, phase, STAGES)
            # One tile is on its way when the one before it is announced: with two, that one would be held back until
            # there is room for the second, which may be no sooner than the groups have had it.
            if i >= 1:
                async_copy.wait_group(1)
                oldest = _announce(full, oldest, STAGES)
                if i == 1:
                    mbarrier.arrive(q_full.index(buffer), count=1)
        j = gl.load(next_row + next_count, mask=has_next & (next_count < T), other=T - 1)
        async_copy.wait_group(0)
        oldest = _announce(full, oldest, STAGES)
        if count == 1:
            mbarrier.arrive(q_full.index(buffer), count=1)
        tokens = visited_tokens(order_ptr, j * 64, N_KV, layout)
        if k_bar_tiles is not None:
            for first in range(0, gl.where(count == T, 0, T), 64):
                row = (b * (H // GROUP) + g) * T + first
                slot, phase = fetch_pair(
                    k_bar_tiles, v_bar_tiles, row, 0, row, 0, k_smem, v_smem, full, empty, slot, phase
                )  # fmt: skip
            oldest = slot
        if state_tiles is not None:
            fetch_state(state_tiles, head * M + m, state_smem, state_full, state_empty, turn)
        head, m, kept_row, count = next_head, next_m, next_row, next_count
        turn += 1
