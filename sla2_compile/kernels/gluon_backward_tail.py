"""Gradients of the pooled keys and values for Hopper, warp-specialised: the fast path of `triton_backward_tail.py`.

As `gluon_backward_keys.py` with 64 block means for keys and some part of all query rows for a list.

For shape (1, 12, 32760, 128): 49,000 steps of 64 rows and 64 means, of 1,024 cycles of tensor cores each, so 0.22 ms
with 132 multiprocessors at 1.75 GHz.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_backward_fetch import fetch_for_tail
from sla2_compile.kernels.gluon_backward_rows import add_rows
from sla2_compile.kernels.gluon_stream import MEAN_BIAS, out_layout, scores_layout
from sla2_compile.kernels.gluon_tiles import (
    BLOCK_K,
    HALF_REGISTERS,
    half_stages,
    is_eligible,
    matrix_tiles,
    phase_of,
    slot_of,
    statistics_tiles,
    token_tiles,
)
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps
from sla2_compile.kernels.triton_backward_rows import Rows
from sla2_compile.kernels.triton_backward_tail import split_steps
from sla2_compile.kernels.triton_statistics import Statistics

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _write(ptr, x, j, T):
    """Write the rows (64, D) float32 of those means from j on that exist."""
    layout: gl.constexpr = x.type.layout
    D: gl.constexpr = x.shape[1]
    mean = j + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + mean[:, None] * D + channel[None, :], x, mask=(mean < T)[:, None])


@gluon.jit
def _consume(
    bits_ptr, dk_bar_ptr, dv_bar_ptr, q_smem, grad_smem, k_smem, v_smem, rows_smem, cap_smem, k_full, full, empty, j,
    num_steps, N_KV, T, words, scale, VALUES: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """The warps that compute; pointers are to its first query block's bits and to its sums."""
    D: gl.constexpr = q_smem.shape[2]
    STAGES: gl.constexpr = q_smem.shape[0]
    o_layout: gl.constexpr = out_layout(D, 2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, scores_layout(2)))
    last_size = (N_KV - (T - 1) * 64).to(gl.float32)
    log_n = gl.where(row < T - 1 - j, MEAN_BIAS, gl.where(row == T - 1 - j, gl.log2(last_size), float("-inf")))
    # The words of one query block that hold its means' bits.
    place = j // 32 + row // 32
    word = gl.load(bits_ptr + place, mask=place < words, other=0)
    dk = gl.zeros([64, D], gl.float32, layout=o_layout)
    dv = gl.zeros([64, D], gl.float32, layout=o_layout)
    mbarrier.wait(k_full, 0)
    for step in range(num_steps):
        slot = slot_of(step, STAGES)
        bias = gl.where(((word >> (row & 31)) & 1) == 0, log_n, float("-inf"))
        # One step ahead: whoever waits for memory does not issue products.
        ahead = (step + 1) // 2 * words + place
        word = gl.load(bits_ptr + ahead, mask=(place < words) & (step + 1 < num_steps), other=0)
        mbarrier.wait(full.index(slot), phase_of(step, STAGES))
        q, grad, rows = q_smem.index(slot), grad_smem.index(slot), rows_smem.index(slot)
        cap = cap_smem.index(slot) if CAP else None
        dk, dv = add_rows(dk, dv, k_smem, v_smem, q, grad, rows, cap, bias, scale * LOG2_E, VALUES)
        mbarrier.arrive(empty.index(slot), count=1)
    _write(dk_bar_ptr, dk, j, T)
    if VALUES:
        _write(dv_bar_ptr, dv, j, T)


@gluon.jit
def _tail_kernel(
    q_tiles, grad_tiles, k_bar_tiles, v_bar_tiles, rows_tiles, bits_ptr, dk_bar_ptr, dv_bar_ptr, q_rows, q_head_rows,
    q_columns, grad_rows, grad_head_rows, grad_columns, H, N_KV, M, T, words, blocks_per_split, scale,
    GROUP: gl.constexpr, VALUES: gl.constexpr, CAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (T / 64, splits, B G). VALUES: the tail's values are the means; dv_bar is not written otherwise."""
    D: gl.constexpr = q_tiles.block_type.shape[1]
    j, split, kv_head = gl.program_id(0) * 64, gl.program_id(1), gl.program_id(2)
    # Heads of a group are neighbours, and so are their query blocks.
    first = split * blocks_per_split
    num_steps = 2 * gl.minimum(blocks_per_split, GROUP * M - first)
    bits_ptr += (kv_head.to(gl.int64) * GROUP * M + first) * words
    target = (split * gl.num_programs(2) + kv_head).to(gl.int64) * T * D
    dk_bar_ptr += target
    if VALUES:
        dv_bar_ptr += target
    q_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, 64, D], q_tiles.layout)
    grad_smem = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, 64, D], q_tiles.layout)
    k_smem = gl.allocate_shared_memory(q_tiles.dtype, [64, D], q_tiles.layout)
    v_smem = gl.allocate_shared_memory(q_tiles.dtype, [64, D], q_tiles.layout)
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
            (_consume, (bits_ptr, dk_bar_ptr, dv_bar_ptr, q_smem, grad_smem, k_smem, v_smem, rows_smem, cap_smem,
                        k_full, full, empty, j, num_steps, N_KV, T, words, scale, VALUES, CAP)),
            (fetch_for_tail, (q_tiles, grad_tiles, k_bar_tiles, v_bar_tiles, rows_tiles, q_smem, grad_smem, k_smem,
                              v_smem, rows_smem, cap_smem, k_full, full, empty, q_rows, q_head_rows, q_columns,
                              grad_rows, grad_head_rows, grad_columns, kv_head, j, first, num_steps, H, M, T, GROUP,
                              CAP)),
        ],
        [1],
        [24],
    )  # fmt: skip


def tail_gradient(
    grad_out: Tensor,
    q: Tensor,
    bits: Tensor,
    means: Statistics,
    rows: Rows,
    real: Tensor | None,
    order: Tensor | None,
    kv_len: int,
    settings: Settings,
) -> tuple[Tensor, Tensor | None] | None:
    """What its namesake in Triton returns, or None where this kernel cannot do it."""
    if not is_eligible(q, real, order, kv_len, settings):
        return None
    tiles = [token_tiles(x) for x in (q, grad_out)]
    if None in tiles:
        return None
    (batch, heads, _, dim), (key_heads, T) = q.shape, means.k_bar.shape[1:3]
    blocks, group, values = bits.shape[1], heads // key_heads, settings.tail == "pooled"
    num_tiles = num_blocks(T, BLOCK_K)
    splits, blocks_per_split = split_steps(group * blocks, num_tiles * batch * key_heads)
    dk_bar = q.new_empty(splits, batch, key_heads, T, dim, dtype=torch.float32)
    dv_bar = torch.empty_like(dk_bar) if values else None
    launch(
        _tail_kernel, (num_tiles, splits, batch * key_heads),
        *tiles, matrix_tiles(means.k_bar, BLOCK_K), matrix_tiles(means.v_bar if values else means.k_bar, BLOCK_K),
        statistics_tiles(rows), bits, dk_bar, dv_bar, *(step for x in (q, grad_out) for step in matrix_steps(x)),
        heads, kv_len, blocks, T, bits.shape[2], blocks_per_split, settings.scale,
        GROUP=group, VALUES=values, CAP=values and settings.qk_format is not None,
        STAGES=half_stages(dim), num_warps=4, maxnreg=HALF_REGISTERS,
    )  # fmt: skip
    return dk_bar, dv_bar
