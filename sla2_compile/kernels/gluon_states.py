"""States of key blocks on Hopper: h_j = phi(k_j)^T v_j and z_j = sum phi(k_j), in 16 bits or in FP8.

The fast path of `triton_backward_linear_keys.key_block_states`. The copy engine fetches keys and values two blocks
ahead and takes states to memory; phi takes the keys' place. Three programs of four warps share a multiprocessor.

In FP8 (`gluon_tail_sums.py` says what for) each block's codes have a scale of their own, a power of two, and what is
lost by rounding one block's state is added to the next one's before that is rounded: so a sum over nearly all blocks is
off by little more than the states it leaves out are. With the states come the codes of the keys, and the scales of
values where those are low-bit too, for which k and v would be read once more otherwise.

For shape (1, 12, 32760, 128) 0.2 GB are read, and 0.2 GB written in 16 bits, 0.15 in FP8: 0.1 ms or 0.08 at 4.2 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.gluon_codes import halves, in_stored_order, quarters, to_code_words
from sla2_compile.kernels.gluon_feature_map import feature_map
from sla2_compile.kernels.gluon_stream import group_barrier, left_operand, out_layout
from sla2_compile.kernels.gluon_tiles import keys_suit_hopper, matrix_tiles, token_tiles
from sla2_compile.kernels.hardware import num_multiprocessors
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import max_registers
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.tensor_rows import matrix_steps
from sla2_compile.kernels.triton_key_codes import KeyCodes, empty_key_codes
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX

# What was tuned.
DIM, BLOCK_K, PROGRAMS = 128, 64, 3
# Of a state in FP8, at most 64 times the largest value since no feature exceeds 1: 64 * 7 = 448, the largest code.
LARGEST_VALUE = gl.constexpr(7.0)
# How much smaller a block's unit may be than that of the block before: so what is left of that one is no larger than a
# code.
SMALLER_UNIT = gl.constexpr(1 / 16)


@dataclass(frozen=True)
class FP8States:
    """States of key blocks, all of them times the factor that they were asked for with."""

    codes: Tensor  # (B G, padded T, D, D) FP8 e4m3 of h_j, channels of v in the order of `stored_key`
    unit: Tensor  # (B G, T) float32 what a code stands for, a power of two
    z: Tensor  # (B G, T, D) in k's dtype
    key_codes: KeyCodes
    v_scale: Tensor | None  # (B, G, D) float32 what a code of v stands for


@gluon.jit
def _fetch(
    k_tiles, v_tiles, k_slot, v_slot, full, index, k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, G, T
):  # fmt: skip
    """Send for a block of keys and values, counted over all heads."""
    head = index // T
    j = index - head * T
    b, g = head // G, head % G
    mbarrier.expect(full, k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
    k_row, v_row = b * k_rows + g * k_head_rows + j * 64, b * v_rows + g * v_head_rows + j * 64
    tma.async_copy_global_to_shared(k_tiles, [k_row, g * k_columns], full, k_slot)
    tma.async_copy_global_to_shared(v_tiles, [v_row, g * v_columns], full, v_slot)


@gluon.jit
def _power_of_two_above(x):
    """The smallest one that is not below `x`, a float32 that is not negative; at least 2^-126."""
    bits = (x.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    return gl.maximum(bits, 0x00800000).to(gl.float32, bitcast=True)


@gluon.jit
def _over_power_of_two(x, power):
    """x / power of powers of two, or 0 where x is 0 or the quotient too small."""
    bits = x.to(gl.int32, bitcast=True) - power.to(gl.int32, bitcast=True) + 0x3F800000
    return gl.where(x > 0, gl.maximum(bits, 0), 0).to(gl.float32, bitcast=True)


@triton.jit
def _value_scales_kernel(
    v_peaks_ptr, v_scale_ptr, T, num_states, num_programs, D: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G, D / CHANNELS): scales of a head's values from the peaks that `_states_kernel` has found."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # Of the programs that have the head's first and last block, and two rows for each of a program's heads.
    first = head + ((head * T + 1) * num_programs - 1) // num_states
    last = head + ((head + 1) * T * num_programs - 1) // num_states
    peak = tl.zeros([CHANNELS], tl.float32)
    for row in range(first * 2, (last + 1) * 2, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        peaks = tl.load(v_peaks_ptr + rows * D + d, mask=rows < (last + 1) * 2, other=0.0)
        peak = tl.maximum(peak, tl.max(peaks, 0))
    tl.store(v_scale_ptr + head * D + d, tl.where(peak > 0, tl.div_rn(peak, LIMIT), 1.0))


@gluon.jit
def _write_peaks(v_peaks_ptr, head, peaks):
    """The largest values (2, D) of this program's blocks of a head; programs and heads only ever go up together."""
    D: gl.constexpr = peaks.shape[1]
    row = gl.arange(0, 2, layout=gl.SliceLayout(1, peaks.type.layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, peaks.type.layout))
    first_row = (gl.program_id(0) + head).to(gl.int64) * 2
    gl.store(v_peaks_ptr + (first_row + row)[:, None] * D + channel[None, :], peaks)


@gluon.jit
def _larger(a, b, c, d):
    return gl.maximum(a, c), gl.maximum(b, d)


@gluon.jit
def _round_state(state, rest, ratio):
    """Words of four codes of a state in FP8 e4m3, and what they leave for the next one, in FP8 e5m2: (64, D / 4) int32.

    state: (64, D) float32, in units of a code. rest: what the last one left, `ratio` times as large in these units.
    In float16, of which e5m2 is the upper byte.
    """
    a, b, c, d = quarters(state)
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 code_0, code_1;
        .reg .b32 x_0, x_1, y_0, y_1, scale;
        cvt.rn.f16x2.f32 x_0, $3, $2;
        cvt.rn.f16x2.f32 x_1, $5, $4;
        cvt.rn.f16x2.f32 scale, $7, $7;
        prmt.b32 y_0, $6, 0, 0x1404;
        prmt.b32 y_1, $6, 0, 0x3424;
        fma.rn.f16x2 x_0, y_0, scale, x_0;
        fma.rn.f16x2 x_1, y_1, scale, x_1;
        cvt.rn.satfinite.e4m3x2.f16x2 code_0, x_0;
        cvt.rn.satfinite.e4m3x2.f16x2 code_1, x_1;
        mov.b32 $0, {code_0, code_1};
        cvt.rn.f16x2.e4m3x2 y_0, code_0;
        cvt.rn.f16x2.e4m3x2 y_1, code_1;
        sub.f16x2 x_0, x_0, y_0;
        sub.f16x2 x_1, x_1, y_1;
        prmt.b32 $1, x_0, x_1, 0x7531;
        }""",
        "=r,=r,f,f,f,f,r,f", [a, b, c, d, rest, ratio], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _send(tiles, row, column, smem, x):
    """Write a tile by way of `smem`, when what was there has left."""
    tma.store_wait(0)
    group_barrier()
    smem.store(x)
    fence_async_shared()
    tma.async_copy_shared_to_global(tiles, [row, column], smem)


@gluon.jit
def _states_kernel(
    k_tiles, v_tiles, state_tiles, code_tiles, center_ptr, unit_ptr, z_ptr, k_scale_ptr, v_peaks_ptr,
    k_rows, k_head_rows, k_columns, v_rows, v_head_rows, v_columns, G, N_KV, T, T_PADDED, num_states, factor, limit,
    MAP: gl.constexpr, FP8_KEYS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as there is room for; each takes a stretch of key blocks, head by head.

    unit_ptr None: states go to memory in 16 bits, z as their last row. v_peaks_ptr may be None. limit: the largest code
    of a key.
    """
    FP8: gl.constexpr = unit_ptr is not None
    dtype: gl.constexpr = k_tiles.dtype
    D: gl.constexpr = k_tiles.block_type.shape[1]
    # Four neighbouring channels a thread: four codes of a key, or of a state in stored order.
    layout: gl.constexpr = left_operand(out_layout(D, 1), 1)
    # A row for two warps: few channels a thread.
    v_layout: gl.constexpr = gl.BlockedLayout([1, D // 64], [1, 32], [2, 2], [1, 0])
    state_layout: gl.constexpr = out_layout(D, 2)
    z_layout: gl.constexpr = out_layout(16, 2)
    k_smem = gl.allocate_shared_memory(dtype, [2] + k_tiles.block_type.shape, k_tiles.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2] + v_tiles.block_type.shape, v_tiles.layout)
    out_smem = gl.allocate_shared_memory(state_tiles.dtype, state_tiles.block_type.shape, state_tiles.layout)
    # What phi is multiplied with for z, 16 keys at a time: more would leave room for two programs only.
    ones = gl.allocate_shared_memory(dtype, [16, 16], gl.NVMMASharedLayout.get_default_for([16, 16], dtype))
    ones.store(gl.full([16, 16], 1.0, dtype, layout=gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(full.index(1), count=1)
    fence_async_shared()
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, D, layout=gl.SliceLayout(1, z_layout))
    program = gl.program_id(0).to(gl.int64)
    first = (program * num_states // gl.num_programs(0)).to(gl.int32)
    last = ((program + 1) * num_states // gl.num_programs(0)).to(gl.int32)
    for i in gl.static_range(2):
        if first + i < last:
            _fetch(
                k_tiles, v_tiles, k_smem.index(i), v_smem.index(i), full.index(i), first + i, k_rows, k_head_rows,
                k_columns, v_rows, v_head_rows, v_columns, G, T,
            )  # fmt: skip
    upper_rest = quarters(gl.zeros([D // 2, D], gl.int32, layout=layout))[0]
    lower_rest = upper_rest
    unit = 0.0
    largest = gl.max(gl.reshape(gl.zeros([64, D], gl.float32, layout=v_layout), [32, 2, D]), 0)
    for index in range(first, last):
        slot = (index - first) & 1
        head = index // T
        j = index - head * T
        k_slot, v_slot = k_smem.index(slot), v_smem.index(slot)
        is_real = j * 64 + key < N_KV
        mbarrier.wait(full.index(slot), ((index - first) >> 1) & 1)
        if FP8:
            # Before the keys, which take most registers.
            v_peaks = gl.max(gl.abs(v_slot.load(layout)), 1).to(gl.float32)
            if v_peaks_ptr is not None:
                if j == 0:
                    if index > first:
                        _write_peaks(v_peaks_ptr, head - 1, largest)
                    largest = largest * 0.0
                # Of a channel, those of the 32 rows that a thread has.
                values = gl.reshape(gl.abs(v_slot.load(v_layout)), [32, 2, D])
                largest = gl.maximum(largest, gl.max(values, 0).to(gl.float32))
        center = gl.load(center_ptr + head * D + channel)
        x = gl.where(is_real[:, None], k_slot.load(layout).to(gl.float32) - center[None, :], 0.0)
        ratio, inverse, k_scale = 0.0, 1.0, 1.0
        if FP8:
            k_peak, v_peak = gl.reduce((gl.max(gl.abs(x), 1), v_peaks), 0, _larger)
            # Another head's first block has nothing to make up for.
            before = gl.where(j == 0, 0.0, unit)
            unit = gl.maximum(_power_of_two_above(v_peak * (1 / LARGEST_VALUE)), before * SMALLER_UNIT)
            ratio = _over_power_of_two(before, unit)
            inverse = _over_power_of_two(gl.to_tensor(1.0), unit)
            k_scale = gl.where(k_peak > 0, gl.div_rn(k_peak, limit), 1.0)
            _send(code_tiles, index * 64, 0, out_smem, to_code_words(x, k_scale, FP8_KEYS))
        phi, size = feature_map(x, MAP)
        k_slot.store((phi * gl.where(is_real, 1 / size, 0.0)[:, None]).to(dtype))
        fence_async_shared()
        group_barrier()
        z_token = gl.zeros([D, 16], gl.float32, layout=z_layout)
        for step in gl.static_range(4):
            phi_keys = k_slot.slice(16 * step, 16).permute((1, 0))
            z_token = warpgroup_mma(phi_keys, ones, z_token, is_async=True, use_acc=step > 0)
        row = head * T_PADDED + j
        z = gl.zeros([D], gl.float32, layout=gl.SliceLayout(1, z_layout))
        # By halves, for which there are registers.
        for half in gl.static_range(2):
            phi_half = k_slot.slice(half * (D // 2), D // 2, dim=1).permute((1, 0))
            empty = gl.zeros([D // 2, D], gl.float32, layout=state_layout)
            token = warpgroup_mma(phi_half, v_slot, empty, is_async=True, use_acc=False)
            if half == 0:
                z = gl.max(warpgroup_mma_wait(1, deps=[z_token]), 1) * factor
            state = warpgroup_mma_wait(0, deps=[token])
            if FP8:
                state = gl.convert_layout(in_stored_order(state * inverse), layout, assert_trivial=True)
                if half == 0:
                    codes, upper_rest = _round_state(state, upper_rest, ratio)
                else:
                    codes, lower_rest = _round_state(state, lower_rest, ratio)
                _send(state_tiles, row * D + half * (D // 2), 0, out_smem, codes)
            else:
                left, right = halves((state * factor).to(dtype))
                _send(state_tiles, row * (D + 1) + half * (D // 2), 0, out_smem, left)
                _send(state_tiles, row * (D + 1) + half * (D // 2), D // 2, out_smem, right)
        # All have left this slot: they have met since its last product.
        if index + 2 < last:
            _fetch(
                k_tiles, v_tiles, k_slot, v_slot, full.index(slot), index + 2, k_rows, k_head_rows, k_columns, v_rows,
                v_head_rows, v_columns, G, T,
            )  # fmt: skip
        if FP8:
            gl.store(unit_ptr + index, unit * factor)
            gl.store(k_scale_ptr + index, k_scale)
            gl.store(z_ptr + gl.cast(index, gl.int64) * D + d, z.to(dtype))
        else:
            gl.store(z_ptr + (gl.cast(row, gl.int64) * (D + 1) + D) * D + d, z.to(dtype))
    if v_peaks_ptr is not None:
        _write_peaks(v_peaks_ptr, (last - 1) // T, largest)
    tma.store_wait(0)


def tiles_of(
    k: Tensor, v: Tensor, real: Tensor | None, order: Tensor | None, settings: Settings
) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Descriptors of k and v (B, G, N_kv, D) for this kernel; None where it cannot make their states."""
    kv_len, dim = k.shape[2:]
    if not keys_suit_hopper(k, settings) or dim != DIM:
        return None
    if real is not None or order is not None or kv_len < BLOCK_K:
        return None
    # Past the last key come zeros at the end of the matrix, but what others store there elsewhere: 0 times their NaN.
    if kv_len % BLOCK_K and any(rows for x in (k, v) for rows in matrix_steps(x)[:2]):
        return None
    k_tiles, v_tiles = token_tiles(k), token_tiles(v)
    return None if k_tiles is None or v_tiles is None else (k_tiles, v_tiles)


def stream_states(
    states: Tensor,
    tiles: tuple[TensorDescriptor, TensorDescriptor],
    k: Tensor,
    v: Tensor,
    center: Tensor,
    factor: float,
    settings: Settings,
) -> None:
    """Write `states` (B G, padded T, D + 1, D), as `key_block_states` says; `tiles` are those of k and v."""
    # One descriptor serves the whole tensor: rows of z are among the others.
    state_tiles = matrix_tiles(states, DIM // 2, DIM // 2)
    outputs = (None, states, None, None)
    _launch(*tiles, state_tiles, None, outputs, k, v, center, states.shape[1], 0.0, factor, settings)


def fp8_states(
    tiles: tuple[TensorDescriptor, TensorDescriptor],
    k: Tensor,
    v: Tensor,
    center: Tensor,
    padded: int,
    factor: float,
    settings: Settings,
    *,
    scales_values: bool,
) -> FP8States:
    """States in FP8 and the keys' codes, where keys have low-bit codes.

    Args:
        tiles: of k and v.
        k, v: (B, G, N_kv, D), last stride 1.
        center: (B, G, D) float32 what smoothing subtracts.
        padded: key blocks of the codes, those past the last one 0.
        factor: of all states.
        settings: the op's, with softmax as the feature map.
        scales_values: whether the scales of v are wanted.
    """
    (batch, heads, _, dim), T = k.shape, num_blocks(k.shape[2], BLOCK_K)
    codes = k.new_empty(batch * heads, padded, dim, dim, dtype=torch.float8_e4m3fn)
    if padded > T:
        codes.view(torch.int8)[:, T:] = 0
    z, unit = k.new_empty(batch * heads, T, dim), k.new_empty(batch * heads, T, dtype=torch.float32)
    key_codes = empty_key_codes(k, T, settings)
    programs, num_states = _num_programs(batch * heads * T, k.device), batch * heads * T
    v_peaks = v_scale = None
    if scales_values:
        v_peaks = k.new_empty(programs + batch * heads, 2, dim, dtype=torch.float32)
    _launch(
        *tiles, matrix_tiles(codes.view(torch.int32), BLOCK_K),
        matrix_tiles(key_codes.codes.view(torch.int32), BLOCK_K), (unit, z, key_codes.scale, v_peaks),
        k, v, center, padded, FP8_MAX if settings.qk_format == "fp8" else INT8_MAX, factor, settings,
    )  # fmt: skip
    if v_peaks is not None:
        v_scale = k.new_empty(batch, heads, dim, dtype=torch.float32)
        launch(
            _value_scales_kernel, (batch * heads, dim // 32), v_peaks, v_scale, T, num_states, programs,
            D=dim, CHANNELS=32, ROWS=128, LIMIT=FP8_MAX, num_warps=4,
        )  # fmt: skip
    return FP8States(codes, unit, z, key_codes, v_scale)


def _num_programs(num_states: int, device: torch.device) -> int:
    return min(PROGRAMS * num_multiprocessors(device), num_states)


def _launch(
    k_tiles: TensorDescriptor,
    v_tiles: TensorDescriptor,
    state_tiles: TensorDescriptor,
    code_tiles: TensorDescriptor | None,
    outputs: tuple[Tensor | None, ...],
    k: Tensor,
    v: Tensor,
    center: Tensor,
    padded: int,
    limit: float,
    factor: float,
    settings: Settings,
) -> None:
    (batch, heads, kv_len, _), T = k.shape, num_blocks(k.shape[2], BLOCK_K)
    num_states = batch * heads * T
    launch(
        _states_kernel, (_num_programs(num_states, k.device),),
        k_tiles, v_tiles, state_tiles, code_tiles, center, *outputs,
        *matrix_steps(k), *matrix_steps(v), heads, kv_len, T, padded, num_states, factor, limit,
        MAP=settings.feature_map, FP8_KEYS=settings.qk_format == "fp8", num_warps=4,
        maxnreg=max_registers(4 * PROGRAMS) // 8 * 8,
    )  # fmt: skip
