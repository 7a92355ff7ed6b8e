"""The fetching warps of Hopper's backward: they keep rings of tiles in shared memory full with the copy engine."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sla2_compile.kernels.gluon_fetch import query_block
from sla2_compile.kernels.gluon_tiles import phase_of, slot_of
from sla2_compile.kernels.triton_backward_rows import FIELDS

SPARSE_CAP_FIELD = gl.constexpr(FIELDS.index("sparse_cap"))
TAIL_CAP_FIELD = gl.constexpr(FIELDS.index("tail_cap"))
TAIL_FIELD = gl.constexpr(FIELDS.index("tail_lse"))


@gluon.jit
def _fetch_pair(x_tiles, y_tiles, x_row, x_column, y_row, y_column, x_smem, y_smem, full, empty, step):
    """A tile of each of two tensors into slot `step` of their rings, once that is empty."""
    STAGES: gl.constexpr = x_smem.shape[0]
    slot = slot_of(step, STAGES)
    barrier = full.index(slot)
    mbarrier.wait(empty.index(slot), phase_of(step, STAGES) ^ 1)
    mbarrier.expect(barrier, 2 * x_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(x_tiles, [x_row, x_column], barrier, x_smem.index(slot))
    tma.async_copy_global_to_shared(y_tiles, [y_row, y_column], barrier, y_smem.index(slot))


@gluon.jit
def fetch_for_queries(
    q_tiles, grad_tiles, k_tiles, v_tiles, k_bar_tiles, v_bar_tiles, dq_tiles, kept_ptr, q_smem, grad_smem, k_smem,
    v_smem, dq_smem, q_full, q_empty, full, empty, dq_full, dq_empty, q_rows, q_head_rows, q_columns, grad_rows,
    grad_head_rows, grad_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, dq_rows,
    dq_head_rows, dq_columns, H, GROUP, M, T, slots, num_heads, first_exact, last_exact, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """For `gluon_backward_queries.py`. Every tensor is a matrix, whose rows are as far apart as two tokens.

    q_rows: rows from one batch element to the next; q_head_rows, q_columns: rows and columns from one head to the next.
    """
    step = 0
    turn = 0
    for index in range(gl.program_id(0), num_heads * M, gl.num_programs(0)):
        head, m = query_block(index, num_heads, M, first_exact, last_exact)
        b, h = head // H, head % H
        g = h // GROUP
        kv_head = b * (H // GROUP) + g
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 4 * q_tiles.block_type.nbytes)
        q_row, q_column = b * q_rows + h * q_head_rows + m * 128, h * q_columns
        grad_row, grad_column = b * grad_rows + h * grad_head_rows + m * 128, h * grad_columns
        for part in gl.static_range(2):
            tma.async_copy_global_to_shared(q_tiles, [q_row + part * 64, q_column], q_full, q_smem.index(part))
            grad_place = [grad_row + part * 64, grad_column]
            tma.async_copy_global_to_shared(grad_tiles, grad_place, q_full, grad_smem.index(part))
        k_row, k_column = b * k_rows + g * k_head_rows, g * k_columns
        v_row, v_column = b * v_rows + g * v_head_rows, g * v_columns
        kept_row = kept_ptr + (head.to(gl.int64) * M + m) * (1 + slots)
        count = gl.load(kept_row)
        for i in range(count):
            first = gl.load(kept_row + 1 + i, mask=count < T, other=i) * 64
            _fetch_pair(
                k_tiles, v_tiles, k_row + first, k_column, v_row + first, v_column, k_smem, v_smem, full, empty, step
            )
            step += 1
        if k_bar_tiles is not None:
            for first in range(0, gl.where(count == T, 0, T), 64):
                row = kv_head * T + first
                _fetch_pair(k_bar_tiles, v_bar_tiles, row, 0, row, 0, k_smem, v_smem, full, empty, step)
                step += 1
        if ACCUMULATE:
            mbarrier.wait(dq_empty, (turn & 1) ^ 1)
            mbarrier.expect(dq_full, 2 * dq_tiles.block_type.nbytes)
            dq_row, dq_column = b * dq_rows + h * dq_head_rows + m * 128, h * dq_columns
            for part in gl.static_range(2):
                tma.async_copy_global_to_shared(dq_tiles, [dq_row + part * 64, dq_column], dq_full, dq_smem.index(part))
        turn += 1


@gluon.jit
def _fetch_rows(
    q_tiles, grad_tiles, rows_tiles, q_smem, grad_smem, rows_smem, cap_smem, full, empty, q_rows, q_head_rows,
    q_columns, grad_rows, grad_head_rows, grad_columns, b, h, row, head_row, step, field: gl.constexpr,
    cap_field: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """64 rows of q and dO, from `row` of a head on, and two of their statistics, from `field` on; with CAP their caps.

    The head's statistics begin at `head_row`; cap_field: which of them is the cap.
    """
    STAGES: gl.constexpr = q_smem.shape[0]
    slot = slot_of(step, STAGES)
    barrier = full.index(slot)
    mbarrier.wait(empty.index(slot), phase_of(step, STAGES) ^ 1)
    mbarrier.expect(barrier, 2 * q_tiles.block_type.nbytes + (2 if CAP else 1) * rows_tiles.block_type.nbytes)
    q_place = [b * q_rows + h * q_head_rows + row, h * q_columns]
    tma.async_copy_global_to_shared(q_tiles, q_place, barrier, q_smem.index(slot))
    grad_place = [b * grad_rows + h * grad_head_rows + row, h * grad_columns]
    tma.async_copy_global_to_shared(grad_tiles, grad_place, barrier, grad_smem.index(slot))
    tma.async_copy_global_to_shared(rows_tiles, [field, head_row + row], barrier, rows_smem.index(slot))
    if CAP:
        tma.async_copy_global_to_shared(rows_tiles, [cap_field, head_row + row], barrier, cap_smem.index(slot))


@gluon.jit
def fetch_for_keys(
    q_tiles, grad_tiles, k_tiles, v_tiles, rows_tiles, dk_tiles, dv_tiles, lists_ptr, q_smem, grad_smem, k_smem,
    v_smem, rows_smem, cap_smem, k_full, full, empty, q_rows, q_head_rows, q_columns, grad_rows, grad_head_rows,
    grad_columns, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, dk_rows, dk_head_rows, dk_columns,
    is_part, kv_head, j, first, num_steps, H, M, capacity, GROUP: gl.constexpr, CAP: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """For `gluon_backward_keys.py`: key block j, then its list's query blocks from entry `first` on, half at a time.

    With ACCUMULATE, what dk and dv hold comes as one more step.
    """
    G = H // GROUP
    b, g = kv_head // G, kv_head % G
    lists_ptr += kv_head.to(gl.int64) * capacity + first
    if num_steps >= 0:
        entry = gl.load(lists_ptr, mask=num_steps > 0, other=0)
        mbarrier.expect(k_full, 2 * k_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(k_tiles, [b * k_rows + g * k_head_rows + j * 64, g * k_columns], k_full, k_smem)
        tma.async_copy_global_to_shared(v_tiles, [b * v_rows + g * v_head_rows + j * 64, g * v_columns], k_full, v_smem)
        for step in range(num_steps):
            h, m = g * GROUP + entry // M, entry % M
            _fetch_rows(
                q_tiles, grad_tiles, rows_tiles, q_smem, grad_smem, rows_smem, cap_smem, full, empty, q_rows,
                q_head_rows, q_columns, grad_rows, grad_head_rows, grad_columns, b, h, m * 128 + step % 2 * 64,
                (b * H + h) * M * 128, step, 0, SPARSE_CAP_FIELD, CAP,
            )  # fmt: skip
            ahead = (step + 1) // 2
            entry = gl.load(lists_ptr + ahead, mask=2 * ahead < num_steps, other=0)
        if ACCUMULATE:
            for _ in range((is_part == 0).to(gl.int32)):
                row, column = b * dk_rows + g * dk_head_rows + j * 64, g * dk_columns
                _fetch_pair(dk_tiles, dv_tiles, row, column, row, column, q_smem, grad_smem, full, empty, num_steps)


@gluon.jit
def fetch_for_tail(
    q_tiles, grad_tiles, k_bar_tiles, v_bar_tiles, rows_tiles, q_smem, grad_smem, k_smem, v_smem, rows_smem, cap_smem,
    k_full, full, empty, q_rows, q_head_rows, q_columns, grad_rows, grad_head_rows, grad_columns, kv_head, j, first,
    num_steps, H, M, T, GROUP: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """For `gluon_backward_tail.py`: means from j on, then query blocks from the group's `first` on, half at a time."""
    G = H // GROUP
    b, g = kv_head // G, kv_head % G
    mbarrier.expect(k_full, 2 * k_bar_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(k_bar_tiles, [kv_head * T + j, 0], k_full, k_smem)
    tma.async_copy_global_to_shared(v_bar_tiles, [kv_head * T + j, 0], k_full, v_smem)
    for step in range(num_steps):
        block = first + step // 2
        h, m = g * GROUP + block // M, block % M
        _fetch_rows(
            q_tiles, grad_tiles, rows_tiles, q_smem, grad_smem, rows_smem, cap_smem, full, empty, q_rows, q_head_rows,
            q_columns, grad_rows, grad_head_rows, grad_columns, b, h, m * 128 + step % 2 * 64,
            (b * H + h) * M * 128, step, TAIL_FIELD, TAIL_CAP_FIELD, CAP,
        )  # fmt: skip
