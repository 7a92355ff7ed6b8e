"""What is known of each block of tokens, from one pass over q, k and v in their strided storage.

Means for the router and the pooled tail, counts of real tokens, and for low bit the scale of q's blocks and the largest
values of v. Then, where keys are smoothed or values stored in FP8, one small kernel over the blocks' results.

For shape (1, 12, 32760, 128) 0.3 GB are read: a floor of 0.07 ms at 4.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.hardware import capability
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import MAX_REGISTERS, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import heads_fastest, in_elements, is_real, load_tile, token_of
from sla2_compile.kernels.triton_one_pass import KeyPass, ValuePass
from sla2_compile.quant.formats import FP8_MAX, INT8_MAX


@dataclass(frozen=True)
class Statistics:
    q_mean: Tensor  # (B, H, M, D) float32; empty where q was not read
    k_mean: Tensor  # (B, G, T, D) float32, over the real tokens, not smoothed
    k_bar: Tensor  # (B, G, T, D) the same in the inputs' dtype, smoothed where the tail sees smoothed keys
    v_bar: Tensor  # (B, G, T, D) in the inputs' dtype, float32 where codes are made of it; k_bar where v was not read
    n: Tensor  # (B, T) float32 real tokens of each key block
    center: Tensor | None  # (B, G, D) float32 what smoothing subtracts, mean of all keys or some; None: no smoothing
    q_scale: Tensor | None  # (B, H, M) float32 what a code of q stands for, with a low-bit qk_format
    v_scale: Tensor | None  # (B, G, D) float32 what a code of v stands for, with a low-bit pv_format


@triton.jit
def _block_sums(
    x_ptr, real_ptr, order_ptr, first_token, N, sn, peak_over_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """Sum (BLOCK_D,) of a block's real tokens, how many there are, and with PEAK the largest absolute values."""
    total = tl.zeros([BLOCK_D], tl.float32)
    n = tl.zeros([], tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        position = first_token + first + tl.arange(0, ROWS)
        token = token_of(order_ptr, position, N)
        real = is_real(real_ptr, token, position, N)
        x = load_tile(x_ptr, token, real, sn, D, BLOCK_D).to(tl.float32)
        total += tl.sum(x, 0)
        if real_ptr is not None:
            n += tl.sum(real.to(tl.float32), 0)
        if PEAK:
            peak_over_rows = tl.maximum(peak_over_rows, tl.max(tl.abs(x), 0))
    if real_ptr is None:
        n += tl.minimum(BLOCK, N - first_token)
    return total, n, peak_over_rows


@triton.jit
def _statistics_kernel(
    q_ptr, k_ptr, v_ptr, real_ptr, order_ptr, q_mean_ptr, q_scale_ptr, k_mean_ptr, k_bar_ptr, v_bar_ptr, v_peak_ptr,
    n_ptr, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, real_sb, H, G, N, N_KV, M, T, num_q, num_k,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (num_q + num_k + num_v,): blocks of q, of k, of v; heads vary fastest, as they do in memory.

    All but q_mean_ptr, k_mean_ptr, v_bar_ptr and n_ptr may be None. LIMIT: largest code of q.
    """
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    k_sb, k_sh, k_sn = in_elements((k_sb, k_sh, k_sn), UNIT)
    v_sb, v_sh, v_sn = in_elements((v_sb, v_sh, v_sn), UNIT)
    pid = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    peak = tl.zeros([BLOCK_D], tl.float32)
    if pid < num_q:
        b, h, block = heads_fastest(pid, H, M)
        row = (b * H + h) * M + block
        if q_ptr is not None:
            total, n, peak = _block_sums(
                q_ptr + b * q_sb + h * q_sh, None, order_ptr, block * BLOCK_Q, N, q_sn, peak,
                D, BLOCK_D, BLOCK_Q, ROWS if ROWS < BLOCK_Q else BLOCK_Q, q_scale_ptr is not None,
            )  # fmt: skip
            tl.store(q_mean_ptr + row * D + d, total / n, mask=d < D)
            if q_scale_ptr is not None:
                largest = tl.max(peak, 0)
                tl.store(q_scale_ptr + row, tl.where(largest > 0, tl.div_rn(largest, LIMIT), 1.0))
    else:
        pid -= num_q
        is_value = pid >= num_k
        pid = tl.where(is_value, pid - num_k, pid)
        b, g, block = heads_fastest(pid, G, T)
        row = (b * G + g) * T + block
        if real_ptr is not None:
            real_ptr += b * real_sb
        if not is_value:
            if k_ptr is not None:
                total, n, peak = _block_sums(
                    k_ptr + b * k_sb + g * k_sh, real_ptr, order_ptr, block * BLOCK_K, N_KV, k_sn, peak,
                    D, BLOCK_D, BLOCK_K, ROWS if ROWS < BLOCK_K else BLOCK_K, False,
                )  # fmt: skip
                mean = total / tl.maximum(n, 1.0)
                tl.store(k_mean_ptr + row * D + d, mean, mask=d < D)
                if k_bar_ptr is not None:
                    tl.store(k_bar_ptr + row * D + d, mean.to(k_bar_ptr.dtype.element_ty), mask=d < D)
                if g == 0:
                    tl.store(n_ptr + b * T + block, n)
        else:
            if v_ptr is not None:
                total, n, peak = _block_sums(
                    v_ptr + b * v_sb + g * v_sh, real_ptr, order_ptr, block * BLOCK_K, N_KV, v_sn, peak,
                    D, BLOCK_D, BLOCK_K, ROWS if ROWS < BLOCK_K else BLOCK_K, v_peak_ptr is not None,
                )  # fmt: skip
                mean = total / tl.maximum(n, 1.0)
                tl.store(v_bar_ptr + row * D + d, mean.to(v_bar_ptr.dtype.element_ty), mask=d < D)
                if v_peak_ptr is not None:
                    tl.store(v_peak_ptr + row * D + d, peak, mask=d < D)


@triton.jit
def _over_blocks_kernel(
    k_mean_ptr, n_ptr, v_peak_ptr, center_ptr, k_bar_ptr, v_scale_ptr, G, T,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Grid (B G, D / CHANNELS): the mean of all keys, smoothed block means, the scale of v's channels.

    center_ptr None: it is not asked for. k_bar_ptr, v_peak_ptr and v_scale_ptr may be None. LIMIT: v's largest code.
    """
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n_ptr += head // G * T
    rows = head * T * D + d[None, :]
    if center_ptr is not None:
        total = tl.zeros([CHANNELS], tl.float32)
        count = tl.zeros([], tl.float32)
        for first in range(0, T, BLOCKS):
            j = first + tl.arange(0, BLOCKS)
            inside = (j < T)[:, None] & (d < D)[None, :]
            n = tl.load(n_ptr + j, mask=j < T, other=0.0)
            mean = tl.load(k_mean_ptr + rows + j[:, None] * D, mask=inside, other=0.0)
            total += tl.sum(mean * n[:, None], 0)
            count += tl.sum(n, 0)
        center = total / tl.maximum(count, 1.0)
        tl.store(center_ptr + head * D + d, center, mask=d < D)
        if k_bar_ptr is not None:
            for first in range(0, T, BLOCKS):
                j = first + tl.arange(0, BLOCKS)
                inside = (j < T)[:, None] & (d < D)[None, :]
                mean = tl.load(k_mean_ptr + rows + j[:, None] * D, mask=inside, other=0.0)
                # An empty block's mean is not 0 after smoothing; nothing reads it.
                smoothed = (mean - center[None, :]).to(k_bar_ptr.dtype.element_ty)
                tl.store(k_bar_ptr + rows + j[:, None] * D, smoothed, mask=inside)
    if v_scale_ptr is not None:
        peak = tl.zeros([CHANNELS], tl.float32)
        for first in range(0, T, BLOCKS):
            j = first + tl.arange(0, BLOCKS)
            inside = (j < T)[:, None] & (d < D)[None, :]
            peak = tl.maximum(peak, tl.max(tl.load(v_peak_ptr + rows + j[:, None] * D, mask=inside, other=0.0), 0))
        tl.store(v_scale_ptr + head * D + d, tl.where(peak > 0, tl.div_rn(peak, LIMIT), 1.0), mask=d < D)


def block_statistics(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    *,
    needs_v_bar: bool,
    smooth_k_bar: bool,
    needs_v_scale: bool = True,
    of_keys: KeyPass | None = None,
    of_values: ValuePass | None = None,
) -> Statistics:
    """Statistics of blocks in visiting order.

    Args:
        q: (B, H, N, D), last stride 1, or None where neither its means nor any scale of a code is wanted.
        k, v: (B, G, N_kv, D), last stride 1.
        real: (B, N_kv) bool, True where a key is real; None: all are.
        order: (N,) int32 the model's token at each visited position; None keeps the model's order.
        settings: the op's.
        needs_v_bar: whether the means of v are wanted; they come along where its scales are.
        smooth_k_bar: whether `k_bar` is to be of the smoothed keys, where keys are smoothed at all.
        needs_v_scale: whether the scales of v are wanted, with a low-bit pv_format.
        of_keys, of_values: what is known of k or v, which then is not read; nor is `k_bar` written.
    """
    (batch, key_heads, kv_len, dim), T = k.shape, num_blocks(k.shape[2], settings.block_k)
    heads, q_len = (0, 0) if q is None else q.shape[1:3]
    M, smooths = num_blocks(q_len, settings.block_q), settings.smooths_keys
    scales_q, scales_v = (q is not None and x is not None for x in (settings.qk_format, settings.pv_format))
    scales_v = scales_v and needs_v_scale and of_values is None
    new, reads_v = k.new_empty, of_values is None and (needs_v_bar or scales_v)
    float32 = torch.float32
    q_mean, k_bar = new(batch, heads, M, dim, dtype=float32), new(batch, key_heads, T, dim)
    if of_keys is None:
        k_mean, n = new(batch, key_heads, T, dim, dtype=float32), new(batch, T, dtype=float32)
        center = new(batch, key_heads, dim, dtype=float32) if smooths else None
    else:
        k_mean, n, center = of_keys.mean, of_keys.n, of_keys.center
    # To codes from float32, not by way of 16 bits.
    v_bar_type = float32 if scales_v and settings.rounds_means_values else k.dtype
    v_bar = new(batch, key_heads, T, dim, dtype=v_bar_type) if reads_v else k_bar
    q_scale = new(batch, heads, M, dtype=float32) if scales_q else None
    v_peak = new(batch, key_heads, T, dim, dtype=float32) if scales_v else None
    finds_center = smooths and of_keys is None
    late_k_bar = finds_center and smooth_k_bar
    num_q, block_d = batch * heads * M, padded_dim(dim)
    num_k, num_v = (batch * key_heads * T * int(reads) for reads in (of_keys is None, reads_v))
    unit, strides = token_strides(k if q is None else q, k, v)
    # Many small programs were tuned on Hopper, in 16 bit at the default block sizes; elsewhere one warp gathers loads
    # until it spills.
    small = block_d <= 128 and max(settings.block_q, settings.block_k) <= 128
    tuned = capability(k.device)[0] in (0, 9) and k.element_size() == 2 and small
    num_warps, elements, max_registers = k.element_size(), 4096, MAX_REGISTERS
    if tuned:
        # Of one head alone a few more: to the compiler its number is a constant, which costs some.
        few = 104 if k.shape[0] * k.shape[1] == 1 else 96
        num_warps, elements, max_registers = 1, 2048, few if real is None else MAX_REGISTERS
    launch(
        _statistics_kernel, (num_q + num_k + num_v,),
        q, k if of_keys is None else None, v if reads_v else None, real, order, q_mean, q_scale, k_mean,
        None if late_k_bar else k_bar, v_bar, v_peak, n, *strides, 0 if real is None else real.stride(0),
        heads, key_heads, q_len, kv_len, M, T, num_q, num_k,
        D=dim, BLOCK_D=block_d, BLOCK_Q=settings.block_q, BLOCK_K=settings.block_k, ROWS=max(16, elements // block_d),
        LIMIT=FP8_MAX if settings.qk_format == "fp8" else INT8_MAX, UNIT=unit, num_warps=num_warps,
        maxnreg=max_registers,
    )  # fmt: skip
    v_scale = None if v_peak is None else new(batch, key_heads, dim, dtype=float32)
    if finds_center or v_scale is not None:
        launch(
            _over_blocks_kernel, (batch * key_heads, num_blocks(dim, 32)),
            k_mean, n, v_peak, center if finds_center else None, k_bar if late_k_bar else None, v_scale, key_heads, T,
            D=dim, CHANNELS=32, BLOCKS=512, LIMIT=FP8_MAX, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    if of_values is not None:
        v_bar, v_scale = of_values.mean, of_values.scale
    return Statistics(q_mean, k_mean, k_bar, v_bar, n, center, q_scale, v_scale)
