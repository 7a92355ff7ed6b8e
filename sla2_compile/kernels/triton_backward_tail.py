"""Gradients of the pooled keys and values: every block mean over all query rows that do not keep its block.

Split over query rows so that the GPU is full; the sums of the splits are added up, in order, where they are spread to
tokens (`triton_backward_keys.py`). Shape (1, 12, 32760, 128): 0.21 TFLOP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch import launch
from sla2_compile.kernels.launch_arguments import max_registers, padded_dim, token_strides
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_loads import in_elements, load_rows, load_tile
from sla2_compile.kernels.triton_backward_rows import LOG2_E, Rows
from sla2_compile.kernels.triton_statistics import Statistics

# Programs wanted in all: a few per multiprocessor. A constant, so that sums do not depend on the GPU.
TARGET_PROGRAMS = 768
MAX_SPLITS = 16


@dataclass(frozen=True)
class TailConfig:
    means: int  # block means of a program
    rows: int  # query rows of a step
    num_warps: int
    num_stages: int


def tail_config(dim: int, itemsize: int, shared_memory: int, *, gathers: bool) -> TailConfig:
    """For a head dim and a GPU with so many bytes of shared memory per program.

    gathers: whether tokens are visited in another order than the model's, which takes registers.
    """
    large = shared_memory >= 200 * 1024
    if itemsize == 4:
        return TailConfig(32, 16, 8, 1) if dim <= 128 else TailConfig(16, 16, 8, 1)
    if (dim <= 64 and (large or not gathers)) or (dim == 128 and large and not gathers):
        return TailConfig(64, 64, 4, 2)
    if dim <= 128:
        return TailConfig(64, 32, 4, 3) if large else TailConfig(64, 32, 8, 2)
    return TailConfig(64, 32, 8, 2) if large else TailConfig(32, 32, 4, 1)


@triton.jit
def _tail_kernel(
    q_ptr, grad_ptr, k_bar_ptr, v_bar_ptr, n_ptr, bits_ptr, order_ptr,
    lse_ptr, offset_ptr, cap_ptr, dk_bar_ptr, dv_bar_ptr,
    q_sb, q_sh, q_sn, grad_sb, grad_sh, grad_sn, H, N, M, T, words, steps_per_split, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    MEANS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (T / MEANS, splits, B G). Scores and their gradients are (MEANS, ROWS); neither goes through memory."""
    q_sb, q_sh, q_sn = in_elements((q_sb, q_sh, q_sn), UNIT)
    grad_sb, grad_sh, grad_sn = in_elements((grad_sb, grad_sh, grad_sn), UNIT)
    PARTS: tl.constexpr = BLOCK_Q // ROWS
    j = tl.program_id(0) * MEANS + tl.arange(0, MEANS)
    split = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    G = H // GROUP
    b = kv_head // G
    head = b * H + kv_head % G * GROUP  # the group's first query head
    q_ptr += b * q_sb + kv_head % G * GROUP * q_sh
    grad_ptr += b * grad_sb + kv_head % G * GROUP * grad_sh
    lse_ptr += head * M * BLOCK_Q
    offset_ptr += head * M * BLOCK_Q
    if cap_ptr is not None:
        cap_ptr += head * M * BLOCK_Q
    bits_ptr += head * M * words

    k_bar = load_tile(k_bar_ptr + kv_head * T * D, j.to(tl.int64), j < T, D, D, BLOCK_D)
    n = tl.load(n_ptr + b * T + j, mask=j < T, other=0.0)
    log_n = tl.where(n > 0, tl.log2(tl.maximum(n, 1.0)), float("-inf"))
    scale_log2 = scale * LOG2_E
    dk_bar = tl.zeros([MEANS, BLOCK_D], tl.float32)
    if VALUES:
        v_bar = load_tile(v_bar_ptr + kv_head * T * D, j.to(tl.int64), j < T, D, D, BLOCK_D)
        dv_bar = tl.zeros([MEANS, BLOCK_D], tl.float32)
    first = split * steps_per_split
    for i in tl.range(first, tl.minimum(first + steps_per_split, GROUP * M * PARTS), num_stages=STAGES):
        block = i // PARTS
        in_group = (block // M).to(tl.int64) if GROUP > 1 else 0
        m = block % M if GROUP > 1 else block
        position = m * BLOCK_Q + i % PARTS * ROWS
        statistics = block * BLOCK_Q + i % PARTS * ROWS + tl.arange(0, ROWS)
        lse = tl.load(lse_ptr + statistics)
        word = tl.load(bits_ptr + block * words + (j >> 5), mask=j < T, other=-1)
        bias = tl.where((word >> (j & 31)) & 1 == 0, log_n, float("-inf"))
        q = load_rows(q_ptr + in_group * q_sh, order_ptr, position, N, q_sn, ROWS, D, BLOCK_D)
        scores = tl.dot(k_bar, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]
        scores += bias[:, None]
        if cap_ptr is not None:
            scores = tl.minimum(scores, tl.load(cap_ptr + statistics)[None, :])
        probs = tl.exp2(scores)
        d_probs = tl.zeros([MEANS, ROWS], tl.float32)
        if VALUES:
            grad = load_rows(grad_ptr + in_group * grad_sh, order_ptr, position, N, grad_sn, ROWS, D, BLOCK_D)
            dv_bar = tl.dot(probs.to(q.dtype), grad, dv_bar, input_precision=PRECISION)
            d_probs = tl.dot(v_bar, tl.trans(grad), input_precision=PRECISION)
        # Read as late as this for want of registers.
        offset = tl.load(offset_ptr + statistics)
        d_scores = probs * (d_probs - offset[None, :])
        dk_bar = tl.dot(d_scores.to(q.dtype), q, dk_bar, input_precision=PRECISION)
    target = (split * tl.num_programs(2) + kv_head) * T * D
    store_rows = j.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    mask = (j < T)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(dk_bar_ptr + target + store_rows, dk_bar, mask=mask)
    if VALUES:
        tl.store(dv_bar_ptr + target + store_rows, dv_bar, mask=mask)


def split_steps(steps: int, programs: int) -> tuple[int, int]:
    """Into how many splits of how many steps to divide the rows, where so many programs see all of them."""
    splits = min(MAX_SPLITS, steps, num_blocks(TARGET_PROGRAMS, programs))
    steps_per_split = num_blocks(steps, splits)
    return num_blocks(steps, steps_per_split), steps_per_split


def tail_gradient(
    grad_out: Tensor,
    q: Tensor,
    bits: Tensor,
    means: Statistics,
    rows: Rows,
    order: Tensor | None,
    settings: Settings,
    config: TailConfig,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of k_bar (before `scale`) and v_bar, each (splits, B, G, T, D) float32 to be summed over the splits.

    The second is None where the tail's values are not the means.
    """
    (batch, heads, q_len, dim), (key_heads, T) = q.shape, means.k_bar.shape[1:3]
    blocks, group, values = bits.shape[1], heads // means.k_bar.shape[1], settings.tail == "pooled"
    row_size = min(config.rows, settings.block_q)
    steps, tiles = group * blocks * (settings.block_q // row_size), num_blocks(T, config.means)
    splits, steps_per_split = split_steps(steps, tiles * batch * key_heads)
    unit, strides = token_strides(q, grad_out)
    dk_bar = q.new_empty(splits, batch, key_heads, T, dim, dtype=torch.float32)
    dv_bar = torch.empty_like(dk_bar) if values else None
    launch(
        _tail_kernel, (tiles, splits, batch * key_heads),
        q, grad_out, means.k_bar, means.v_bar, means.n, bits, order,
        rows.tail_lse, rows.tail_offset, rows.tail_cap if values and settings.qk_format is not None else None,
        dk_bar, dv_bar,
        *strides, heads, q_len, blocks, T, bits.shape[2], steps_per_split,
        settings.scale, GROUP=group, D=dim, BLOCK_D=padded_dim(dim),
        BLOCK_Q=settings.block_q, ROWS=row_size,
        MEANS=config.means, VALUES=values, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=config.num_stages, UNIT=unit, num_warps=config.num_warps, maxnreg=max_registers(config.num_warps),
    )  # fmt: skip
    return dk_bar, dv_bar
