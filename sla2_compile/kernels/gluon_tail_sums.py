"""Sums of states over a linear tail on Hopper, from FP8: H_i of every query block is the sum of h_j it does not keep.

It costs half of what it does in 16 bits: 0.05 TFLOP, 0.1 GB of states read and 0.1 GB of sums written for shape
(1, 12, 32760, 128), 0.05 ms. What FP8 rounds hardly shows in a sum over nearly all blocks: see `gluon_states.py`.

8-bit tensor cores want both operands contiguous along what is summed, here key blocks, and a state's elements are so
along channels. Operands in registers have no such order: two neighbouring elements are loaded transposed as one of 16
bits, and taken apart into the operands of two products, one of even and one of odd elements. The 0/1 matrix of tails
stays in shared memory for 128 query blocks, while states pass by; two groups of warps take a state's rows in turn, so
that one multiplies while the other's sums leave.

Each key block's codes have a scale of their own, a power of two, and the matrix holds it in place of 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_codes import halves, in_stored_order
from sla2_compile.kernels.gluon_states import FP8States
from sla2_compile.kernels.gluon_stream import group_barrier, left_operand, next_slot, out_layout
from sla2_compile.kernels.gluon_tiles import ELEMENTS, matrix_tiles
from sla2_compile.kernels.hardware import num_multiprocessors, shared_memory
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import next_power_of_two
from sla2_compile.kernels.triton_value_codes import in_stored_order as in_stored_order_of_triton

# Query blocks of a program, key blocks of a tile, elements of a state that go together, query blocks that leave
# together.
QUERIES, KEYS, COLUMNS, ROWS_OUT = 128, 64, 128, 32
# Of the ring of a group, at least.
MIN_STAGES = 3
# Of key blocks at most one in so many may be kept: what they lose to the others' codes is not to be seen.
MIN_SPARSITY = 8
# The largest scale in FP8 e5m2, 2^15, without the two bits of its mantissa; the smallest is 1.
TOP_EXPONENT, TOP_SCALE = 15, tl.constexpr(30)


@triton.jit
def _tail_scales_kernel(
    bits_ptr, unit_ptr, z_ptr, scales_ptr, reach_ptr, states_ptr, rows, T, T_PADDED,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_T: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Grid (B G, rows / ROWS): Z of tails, and their blocks' scales in FP8 e5m2 over a head's largest, in stored order.

    reach_ptr: (B G,) float32 what a sum of codes by such scales is multiplied with.
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    t, d, key = tl.arange(0, BLOCK_T), tl.arange(0, D), tl.arange(0, KEYS)
    word, bit = tl.arange(0, KEYS // 32), tl.arange(0, 32)
    exists, num_words = row < rows, 2 * tl.cdiv(T, 64)
    largest = tl.max(tl.load(unit_ptr + head * T + t, mask=t < T, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(reach_ptr + head, largest * TOP)
    top = largest.to(tl.int32, bitcast=True) >> 23
    bits_ptr += head * rows * num_words
    scales_ptr += head * rows * T_PADDED
    total = tl.zeros([ROWS, D], tl.float32)
    for first in tl.range(0, T_PADDED, KEYS, num_stages=3):
        j, index = first + key, first // 32 + word
        words = tl.load(bits_ptr + row * num_words + index, mask=exists & (index < num_words), other=-1)
        tail = tl.reshape(1 - ((words[:, :, None] >> bit) & 1), [ROWS, KEYS])
        unit = tl.load(unit_ptr + head * T + j, mask=j < T, other=0.0)
        # Of much smaller blocks nothing is left in the sum.
        scale = tl.maximum((unit.to(tl.int32, bitcast=True) >> 23) - top + TOP_SCALE, 0) << 2
        scales = in_stored_order_of_triton((tail * tl.where(j < T, scale, 0)).to(tl.int8), ROWS, KEYS)
        tl.store(scales_ptr + row * T_PADDED + j, scales, mask=exists & (j < T_PADDED))
        z = tl.load(z_ptr + (head * T + j)[:, None] * D + d, mask=(j < T)[:, None], other=0.0)
        total = tl.dot(tail.to(tl.float32).to(z.dtype), z, total)
    ptrs = states_ptr + ((head * rows + row) * (D + 1) + D) * D + d
    tl.store(ptrs, total.to(states_ptr.dtype.element_ty), mask=exists)


@gluon.jit
def _operands(ring, full, empty, slot, phase):
    """Even and odd elements of states, (64, KEYS) FP8 in stored order each, of the next tile of pairs (KEYS, 64).

    Returns the slot and phase of the tile after it too.
    """
    mbarrier.wait(full.index(slot), phase)
    pairs = ring.index(slot).permute((1, 0)).load(left_operand(out_layout(128, 2), 2))
    mbarrier.arrive(empty.index(slot), count=1)
    pairs = gl.convert_layout(in_stored_order(pairs), left_operand(out_layout(128, 1), 1), assert_trivial=True)
    even, odd = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;", "=r,=r,r,r", [pairs],
        dtype=(gl.float8e4nv, gl.float8e4nv), is_pure=True, pack=4,
    )  # fmt: skip
    slot, phase = next_slot(slot, phase, ring.shape[0])
    return even, odd, slot, phase


@gluon.jit
def _pack(low, high, dtype: gl.constexpr):
    """Two float32 as numbers of 16 bits in one word."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $2; // one word", "=r,f,f", [high, low], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2; // one word", "=r,f,f", [high, low], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def _write(words, out_tiles, out_ptr, smem, row, column, num_rows, pitch):
    """Write the words (64 pairs, ROWS_OUT query blocks) of the query blocks that exist, by way of `smem`."""
    ROWS_OUT: gl.constexpr = smem.shape[0]
    # Pairs from stored order to their own.
    words = gl.permute(gl.reshape(words, [8, 4, 2, ROWS_OUT]), (0, 2, 1, 3))
    tma.store_wait(0)
    group_barrier()
    smem.permute((1, 0)).store(gl.reshape(words, [64, ROWS_OUT]))
    fence_async_shared()
    if num_rows >= ROWS_OUT:
        tma.async_copy_shared_to_global(out_tiles, [row, column], smem)
    elif num_rows > 0:
        # The copy engine would write over the next head's.
        layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        q = gl.arange(0, ROWS_OUT, layout=gl.SliceLayout(1, layout))
        word = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
        ptrs = out_ptr + (row + q).to(gl.int64)[:, None] * pitch + (column + word)[None, :]
        gl.store(ptrs, smem.load(layout), mask=(q < num_rows)[:, None])


@gluon.jit
def _write_half(words, out_tiles, out_ptr, smem, row, column, num_rows, pitch):
    """The same of twice as many query blocks."""
    ROWS_OUT: gl.constexpr = smem.shape[0]
    left, right = halves(words)
    _write(left, out_tiles, out_ptr, smem, row, column, num_rows, pitch)
    _write(right, out_tiles, out_ptr, smem, row + ROWS_OUT, column, num_rows - ROWS_OUT, pitch)


@gluon.jit
def _consume(
    part: gl.constexpr, ring, full, empty, out_smem, scales_smem, scales_full, scales_empty, reach_ptr, out_tiles,
    out_ptr, first, last, first_q, rows, dtype: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """A group of warps: every other row of the states from number `first` to `last`, of all heads' rows."""
    CHUNKS: gl.constexpr = scales_smem.shape[0]
    layout: gl.constexpr = out_layout(128, 1)
    pitch = (D + 1) * (D // 2)
    slot, phase = 0, 0
    turn = 0
    for head in range(first // D, (last + D - 1) // D):
        mbarrier.wait(scales_full, turn & 1)
        reach = gl.load(reach_ptr + head)
        begin = gl.maximum(first, head * D)
        end = gl.minimum(last, (head + 1) * D)
        for item in range(begin + part, end, 2):
            d = item - head * D
            zero = gl.zeros([64, 128], gl.float32, layout=layout)
            even, odd, slot, phase = _operands(ring, full, empty, slot, phase)
            tails = scales_smem.index(0).permute((1, 0))
            even_sum = warpgroup_mma(even, tails, zero, is_async=True, use_acc=False)
            odd_sum = warpgroup_mma(odd, tails, zero, is_async=True, use_acc=False)
            for chunk in range(1, CHUNKS):
                # Before the next operands, which take the registers that are being multiplied: nobody keeps them
                # apart.
                even_sum, odd_sum = warpgroup_mma_wait(0, deps=[even_sum, odd_sum])
                even, odd, slot, phase = _operands(ring, full, empty, slot, phase)
                tails = scales_smem.index(chunk).permute((1, 0))
                even_sum = warpgroup_mma(even, tails, even_sum, is_async=True)
                odd_sum = warpgroup_mma(odd, tails, odd_sum, is_async=True)
            even_sum, odd_sum = warpgroup_mma_wait(0, deps=[even_sum, odd_sum])
            left, right = halves(_pack(even_sum * reach, odd_sum * reach, dtype))
            row, column, num_rows = head * rows + first_q, d * (D // 2), rows - first_q
            _write_half(left, out_tiles, out_ptr, out_smem, row, column, num_rows, pitch)
            _write_half(right, out_tiles, out_ptr, out_smem, row + 64, column, num_rows - 64, pitch)
        mbarrier.arrive(scales_empty, count=1)
        turn += 1
    tma.store_wait(0)


@gluon.jit
def _fetch(
    part: gl.constexpr, code_tiles, scale_tiles, ring, full, empty, scales_smem, scales_full, scales_empty, first, last,
    first_q, rows, T_PADDED, D: gl.constexpr,
):  # fmt: skip
    """The warp that fetches states for a group; the first group's fetches each head's matrix of tails too."""
    STAGES: gl.constexpr = ring.shape[0]
    CHUNKS: gl.constexpr = scales_smem.shape[0]
    KEYS: gl.constexpr = scales_smem.shape[2]
    slot, phase = 0, 1
    turn = 0
    for head in range(first // D, (last + D - 1) // D):
        if part == 0:
            mbarrier.wait(scales_empty, (turn & 1) ^ 1)
            mbarrier.expect(scales_full, CHUNKS * scale_tiles.block_type.nbytes)
            for chunk in range(CHUNKS):
                tma.async_copy_global_to_shared(
                    scale_tiles, [head * rows + first_q, chunk * KEYS], scales_full, scales_smem.index(chunk)
                )
        begin = gl.maximum(first, head * D)
        end = gl.minimum(last, (head + 1) * D)
        for item in range(begin + part, end, 2):
            column = (item - head * D) * (D // 2)
            for chunk in range(CHUNKS):
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), code_tiles.block_type.nbytes)
                # Past a head's last block come other heads', which the matrix leaves out.
                tma.async_copy_global_to_shared(
                    code_tiles, [head * T_PADDED + chunk * KEYS, column], full.index(slot), ring.index(slot)
                )
                slot, phase = next_slot(slot, phase, STAGES)
        turn += 1


@gluon.jit
def _tail_sums_kernel(
    code_tiles, scale_tiles, out_tiles, out_ptr, reach_ptr, heads, rows, T_PADDED, Q_TILES,
    dtype: gl.constexpr, D: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: teams of Q_TILES programs, of 128 query blocks each; a team takes a share of all heads' rows of states.

    The programs of a team come to the same states at about the same time, and all but one of them find them in L2.
    """
    scales_smem = gl.allocate_shared_memory(
        scale_tiles.dtype, [CHUNKS] + scale_tiles.block_type.shape, scale_tiles.layout
    )
    ring_0 = gl.allocate_shared_memory(code_tiles.dtype, [STAGES] + code_tiles.block_type.shape, code_tiles.layout)
    ring_1 = gl.allocate_shared_memory(code_tiles.dtype, [STAGES] + code_tiles.block_type.shape, code_tiles.layout)
    out_smem = gl.allocate_shared_memory(out_tiles.dtype, [2] + out_tiles.block_type.shape, out_tiles.layout)
    full_0 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_1 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_0 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_1 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scales_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    scales_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full_0.index(i), count=1)
        mbarrier.init(full_1.index(i), count=1)
        mbarrier.init(empty_0.index(i), count=1)
        mbarrier.init(empty_1.index(i), count=1)
    mbarrier.init(scales_full, count=1)
    mbarrier.init(scales_empty, count=2)
    fence_async_shared()
    teams = gl.num_programs(0) // Q_TILES
    team = gl.program_id(0) // Q_TILES
    first_q = gl.program_id(0) % Q_TILES * 128
    first = team * heads * D // teams
    last = (team + 1) * heads * D // teams
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), ring_0, full_0, empty_0, out_smem.index(0), scales_smem, scales_full,
                        scales_empty, reach_ptr, out_tiles, out_ptr, first, last, first_q, rows, dtype, D)),
            (_consume, (gl.constexpr(1), ring_1, full_1, empty_1, out_smem.index(1), scales_smem, scales_full,
                        scales_empty, reach_ptr, out_tiles, out_ptr, first, last, first_q, rows, dtype, D)),
            (_fetch, (gl.constexpr(0), code_tiles, scale_tiles, ring_0, full_0, empty_0, scales_smem, scales_full,
                      scales_empty, first, last, first_q, rows, T_PADDED, D)),
            (_fetch, (gl.constexpr(1), code_tiles, scale_tiles, ring_1, full_1, empty_1, scales_smem, scales_full,
                      scales_empty, first, last, first_q, rows, T_PADDED, D)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def _num_stages(padded: int, device: torch.device) -> int:
    """Slots of each group's ring beside the matrix of so many key blocks."""
    held = num_blocks(padded, KEYS) * QUERIES * KEYS + 2 * ROWS_OUT * COLUMNS * 2 + 2048
    return min(6, (shared_memory(device) - held) // (2 * KEYS * COLUMNS))


def can_sum(slots: int, T: int, padded: int, rows: int, device: torch.device) -> bool:
    """Whether these kernels sum states for `rows` query blocks of a head of keys, which keep at most `slots` of T."""
    few = slots * MIN_SPARSITY <= T and num_blocks(rows, QUERIES) <= num_multiprocessors(device)
    return few and _num_stages(padded, device) >= MIN_STAGES


def tail_states(states: FP8States, bits: Tensor) -> Tensor:
    """Sums of the states over the blocks that are not kept, and of z below them: (B H, M, D + 1, D) in k's dtype.

    bits: (B, H, M, W) int32 kept key blocks, W even.
    """
    (heads, padded, dim, _), T, programs = states.codes.shape, states.unit.shape[1], num_multiprocessors(bits.device)
    rows = bits[..., 0].numel() // heads
    scales = bits.new_empty(heads, rows, padded, dtype=torch.float8_e5m2)
    reach, out = states.unit.new_empty(heads), states.z.new_empty(heads * rows, dim + 1, dim)
    block_rows = 32 if heads * num_blocks(rows, 64) < 2 * programs else 64
    launch(
        _tail_scales_kernel, (heads, num_blocks(rows, block_rows)),
        bits, states.unit, states.z, scales.view(torch.int8), reach, out, rows, T, padded,
        D=dim, ROWS=block_rows, KEYS=2 * KEYS, BLOCK_T=next_power_of_two(T), TOP=2.0**-TOP_EXPONENT, num_warps=4,
    )  # fmt: skip
    q_tiles, words = num_blocks(rows, QUERIES), out.view(torch.int32).view(heads * rows, -1)
    launch(
        _tail_sums_kernel, (min(programs // q_tiles, heads * dim) * q_tiles,),
        matrix_tiles(states.codes.view(torch.int16).view(heads * padded, -1), KEYS, COLUMNS // 2),
        matrix_tiles(scales.view(heads * rows, -1), QUERIES, KEYS), matrix_tiles(words, ROWS_OUT, COLUMNS // 2),
        words, reach, heads, rows, padded, q_tiles, dtype=ELEMENTS[out.dtype], D=dim,
        CHUNKS=num_blocks(padded, KEYS), STAGES=_num_stages(padded, bits.device), num_warps=4,
    )  # fmt: skip
    return out.view(bits.shape[0] * bits.shape[1], bits.shape[2], dim + 1, dim)
