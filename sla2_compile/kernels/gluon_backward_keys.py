"""Gradients of k and v for Hopper, warp-specialised: the fast path of `triton_backward_keys.py`.

A program has one key block, or a part of its list of query blocks. One warp fetches 64 rows of q and dO at a time into
rings in shared memory, with the rows' statistics; four warps compute scores k q^T and d_probs v dO^T, and add
probabilities times dO to dv and dS q to dk. Two programs share a multiprocessor: one's exponentials, start and end hide
behind the other's matmuls, whichever the lengths of their lists are.

For shape (1, 12, 32760, 128) at 97 %: 92,000 steps of 64 rows and 64 keys, of 1,024 cycles of tensor cores each, so
0.41 ms with 132 multiprocessors at 1.75 GHz; 3 GB of tiles from L2, which takes as long or longer; reading the tiles
from shared memory, and writing them there, keeps that busy for 1,024 cycles a step too.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from sla2_compile.kernels.gluon_backward_fetch import fetch_for_keys
from sla2_compile.kernels.gluon_backward_rows import add_rows
from sla2_compile.kernels.gluon_stream import out_layout
from sla2_compile.kernels.gluon_tiles import (
    HALF_REGISTERS,
    channels,
    half_stages,
    is_eligible,
    phase_of,
    slot_of,
    statistics_tiles,
    token_tiles,
    write_rows,
)
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import next_power_of_two
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps
from sla2_compile.kernels.triton_backward_keys import add_parts, empty_parts
from sla2_compile.kernels.triton_backward_rows import Rows
from sla2_compile.kernels.triton_inverse_index import InverseIndex

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _of_mean(mean_ptr, kv_row, n, split_stride, splits, D: gl.constexpr, SPLITS: gl.constexpr):
    """What each token of a block gets of its mean's gradient, (D,): the sum of the splits, all loaded at once."""
    layout: gl.constexpr = gl.BlockedLayout([SPLITS, 1], [1, 32], [1, 4], [1, 0])
    split = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    pointers = mean_ptr + kv_row * D + split.to(gl.int64)[:, None] * split_stride + channel[None, :]
    return gl.sum(gl.load(pointers, mask=(split < splits)[:, None], other=0.0), 0) / n


@gluon.jit
def _write_part(ptr, x, item, D: gl.constexpr):
    """Write (64, D) float32 sums of part number `item`."""
    layout: gl.constexpr = x.type.layout
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + item.to(gl.int64) * (64 * D) + key[:, None] * D + channel[None, :], x)


@gluon.jit
def _consume(
    dk_tiles, dv_tiles, dk_bar_ptr, dv_bar_ptr, correction_ptr, partial_ptr, dk_ptr, dv_ptr, q_smem, grad_smem, k_smem,
    v_smem, rows_smem, cap_smem, k_full, full, empty, dk_rows, dk_head_rows, dk_columns, dk_sn, split_stride,
    partial_size, item, is_part, kv_head, j, num_steps, G, N_KV, T, splits, scale, CAP: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    """The warps that compute: dk and dv of one key block or part. num_steps < 0: there is nothing to do."""
    D: gl.constexpr = q_smem.shape[2]
    STAGES: gl.constexpr = q_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    o_layout: gl.constexpr = out_layout(D, 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, o_layout)
    factor = scale * LOG2_E
    if num_steps >= 0:
        # Long before they are used.
        kv_row = kv_head.to(gl.int64) * T + j
        n = gl.where(j == T - 1, N_KV - j * 64, 64).to(gl.float32)
        of_k_bar, of_v_bar, correction = 0.0, 0.0, 0.0
        if dk_bar_ptr is not None:
            of_k_bar = _of_mean(dk_bar_ptr, kv_row, n, split_stride, splits, D, SPLITS)
        if dv_bar_ptr is not None:
            of_v_bar = _of_mean(dv_bar_ptr, kv_row, n, split_stride, splits, D, SPLITS)
        if correction_ptr is not None:
            correction = channels(correction_ptr + kv_head.to(gl.int64) * D, D)
        dk = gl.zeros([64, D], gl.float32, layout=o_layout)
        dv = gl.zeros([64, D], gl.float32, layout=o_layout)
        mbarrier.wait(k_full, 0)
        for step in range(num_steps):
            slot = slot_of(step, STAGES)
            q, grad, rows = q_smem.index(slot), grad_smem.index(slot), rows_smem.index(slot)
            mbarrier.wait(full.index(slot), phase_of(step, STAGES))
            cap = cap_smem.index(slot) if CAP else None
            dk, dv = add_rows(dk, dv, k_smem, v_smem, q, grad, rows, cap, None, factor, True)
            mbarrier.arrive(empty.index(slot), count=1)
        if is_part:
            _write_part(partial_ptr, dk, item, D)
            _write_part(partial_ptr + partial_size, dv, item, D)
        else:
            if dk_bar_ptr is not None:
                dk += gl.convert_layout(of_k_bar, column_layout)[None, :]
            dk *= scale
            if dv_bar_ptr is not None:
                dv += gl.convert_layout(of_v_bar, column_layout)[None, :]
            if correction_ptr is not None:
                # What a linear tail has written came with one more step.
                slot = slot_of(num_steps, STAGES)
                mbarrier.wait(full.index(slot), phase_of(num_steps, STAGES))
                dk += q_smem.index(slot).load(o_layout).to(gl.float32)
                dk -= gl.convert_layout(correction, column_layout)[None, :]
                dv += grad_smem.index(slot).load(o_layout).to(gl.float32)
            b, g = kv_head // G, kv_head % G
            row, column = b * dk_rows + g * dk_head_rows, g * dk_columns
            write_rows(dk_tiles, dk_ptr, None, dk.to(dtype), k_smem, row, column, j * 64, N_KV, dk_sn)
            write_rows(dv_tiles, dv_ptr, None, dv.to(dtype), v_smem, row, column, j * 64, N_KV, dk_sn)
            tma.store_wait(0)


@gluon.jit
def _keys_kernel(
    q_tiles, grad_tiles, k_tiles, v_tiles, rows_tiles, dk_tiles, dv_tiles, dk_bar_ptr, dv_bar_ptr, count_ptr,
    start_ptr, lists_ptr, first_part_ptr, part_key_ptr, correction_ptr, partial_ptr, dk_ptr, dv_ptr, q_rows,
    q_head_rows, q_columns, grad_rows, grad_head_rows, grad_columns, k_rows, k_head_rows, k_columns, v_rows,
    v_head_rows, v_columns, dk_rows, dk_head_rows, dk_columns, dk_sn, split_stride, partial_size, H, N_KV, M, T,
    key_heads, capacity, max_parts, part_length, splits, scale, GROUP: gl.constexpr, CAP: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (B G (max_parts + T),), parts of long lists first. dk_bar_ptr, dv_bar_ptr, correction_ptr may be None."""
    item = gl.program_id(0)
    num_parts = key_heads * max_parts
    is_part = item < num_parts
    kv_head = gl.where(is_part, item // max_parts, (item - num_parts) // T)
    j = gl.where(is_part, gl.load(part_key_ptr + item, mask=is_part, other=0), (item - num_parts) % T)
    exists = j >= 0
    j = gl.maximum(j, 0)
    kv_row = kv_head * T + j
    length = gl.load(count_ptr + kv_row)
    is_split = length >= 2 * part_length
    parts = gl.where(is_part & is_split, length // part_length, 1)
    chunk = gl.where(is_part, item % max_parts - gl.load(first_part_ptr + kv_row), 0)
    count = length // parts + gl.where(chunk < length % parts, 1, 0)
    first = chunk * (length // parts) + gl.minimum(chunk, length % parts) + gl.load(start_ptr + kv_row)
    # Of half a query block each; -1 where another program does it.
    num_steps = gl.where(exists & (is_split == is_part), 2 * count, -1)

    tile: gl.constexpr = q_tiles.block_type.shape
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, tile[0], tile[1]], q_tiles.layout)
    grad_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, tile[0], tile[1]], q_tiles.layout)
    k_smem = gl.allocate_shared_memory(q_tiles.dtype, tile, q_tiles.layout)
    v_smem = gl.allocate_shared_memory(q_tiles.dtype, tile, q_tiles.layout)
    rows_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 64], rows_tiles.layout)
    cap_smem = rows_smem
    if CAP:
        cap_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 64], rows_tiles.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (dk_tiles, dv_tiles, dk_bar_ptr, dv_bar_ptr, correction_ptr, partial_ptr, dk_ptr, dv_ptr,
                        q_smem, grad_smem, k_smem, v_smem, rows_smem, cap_smem, k_full, full, empty, dk_rows,
                        dk_head_rows, dk_columns, dk_sn, split_stride, partial_size, item, is_part, kv_head, j,
                        num_steps, H // GROUP, N_KV, T, splits, scale, CAP, SPLITS)),
            (fetch_for_keys, (q_tiles, grad_tiles, k_tiles, v_tiles, rows_tiles, dk_tiles, dv_tiles, lists_ptr,
                              q_smem, grad_smem, k_smem, v_smem, rows_smem, cap_smem, k_full, full, empty, q_rows,
                              q_head_rows, q_columns, grad_rows, grad_head_rows, grad_columns, k_rows, k_head_rows,
                              k_columns, v_rows, v_head_rows, v_columns, dk_rows, dk_head_rows, dk_columns, is_part,
                              kv_head, j, first, num_steps, H, M, capacity, GROUP, CAP, correction_ptr is not None)),
        ],
        [1],
        [24],
    )  # fmt: skip


def key_gradients(
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: InverseIndex,
    rows: Rows,
    n: Tensor,
    dk_bar: Tensor | None,
    dv_bar: Tensor | None,
    correction: Tensor | None,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
) -> bool:
    """Write dk and dv as its namesake in Triton and return True, or False where this kernel cannot do it."""
    if not is_eligible(q, real, order, k.shape[2], settings):
        return False
    tiles = [token_tiles(x) for x in (q, grad_out, k, v)]
    if None in tiles:
        return False
    (_, heads, _, dim), (batch, key_heads, kv_len, _) = q.shape, k.shape
    T, max_parts, cap = index.count.shape[1], index.part_key.shape[1], settings.qk_format is not None
    partial = empty_parts(k, index, settings)
    splits = 1 if dk_bar is None else dk_bar.shape[0]
    launch(
        _keys_kernel, (batch * key_heads * (max_parts + T),),
        *tiles, statistics_tiles(rows), token_tiles(dk), token_tiles(dv),
        dk_bar, dv_bar, index.count, index.start, index.lists, index.first_part, index.part_key, correction, partial,
        dk, dv, *(step for x in (q, grad_out, k, v, dk) for step in matrix_steps(x)), dk.stride(2),
        0 if dk_bar is None else dk_bar.stride(0), partial.stride(0),
        heads, kv_len, index.bits.shape[1], T, batch * key_heads, index.lists.shape[1], max_parts, index.part_length,
        splits, settings.scale,
        GROUP=heads // key_heads, CAP=cap, SPLITS=next_power_of_two(splits),
        STAGES=half_stages(dim), num_warps=4, maxnreg=HALF_REGISTERS,
    )  # fmt: skip
    add_parts(dk, dv, q, index, n, dk_bar, dv_bar, correction, real, order, partial, 32, settings)
    return True
