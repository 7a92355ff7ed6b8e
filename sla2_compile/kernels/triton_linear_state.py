"""States of the linear tail for each query block: H_i and Z_i over the key blocks that it does not keep.

H is one batched matmul of the 0/1 tail mask with all h_j: exact where the tail is empty, and it costs less than reading
h_j again for each kept block (0.05 TFLOP for shape (1, 12, 32760, 128)). The kernel that writes the mask adds up Z.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sla2_compile.kernels.attention_stage import LinearStates
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch_arguments import padded_dim
from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_backward_linear_keys import LinearConfig, key_block_states, linear_config


@triton.jit
def _tail_sums_kernel(
    bits_ptr, n_ptr, z_ptr, mask_ptr, sum_ptr, value, H, GROUP, M, T, W, mask_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid (B H, M / ROWS, BLOCK_D / CHANNELS): `value` where a block is in the tail, else 0, and that times z."""
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // H * (H // GROUP) + head % H // GROUP
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row = head * M + m
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, T, KEYS):
        j = first + tl.arange(0, KEYS)
        inside = (m < M)[:, None] & (j < T)[None, :]
        words = tl.load(bits_ptr + row[:, None] * W + (j >> 5)[None, :], mask=inside, other=-1)
        n = tl.load(n_ptr + head // H * T + j, mask=j < T, other=0.0)
        in_tail = ((words >> (j & 31)[None, :]) & 1 == 0) & (n > 0)[None, :]
        mask = tl.where(in_tail, value, 0.0)
        if tl.program_id(2) == 0:
            tl.store(mask_ptr + row[:, None] * mask_stride + j[None, :], mask.to(mask_ptr.dtype.element_ty), mask=inside)
        z = tl.load(
            z_ptr + (kv_head * T + j)[:, None] * D + d[None, :], mask=(j < T)[:, None] & (d < D)[None, :], other=0.0
        )
        # As exact as float32 sums: the mask's power of two has one bit.
        total = tl.dot(mask, z, total, input_precision="tf32x3")
    tl.store(sum_ptr + row[:, None] * D + d[None, :], total, mask=(m < M)[:, None] & (d < D)[None, :])


def tail_sums(bits: Tensor, n: Tensor, z: Tensor, value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which key blocks a query block's tail holds, and the sum of their z.

    Args:
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        z: (B G, T, D) float32.
        value: a power of two that stands for True.
        dtype: of the mask.

    Returns:
        mask (B G, H / G M, T): `value` where the query block does not keep the key block and that is not empty, else 0.
        sums (B H, M, D) float32: its product with z.
    """
    (batch, heads, blocks, words), (key_heads, T, dim) = bits.shape, z.shape
    rows, channels, block_d = 64, min(64, padded_dim(dim)), padded_dim(dim)
    # The copy engine needs rows that begin at multiples of 16 bytes; without it a matmul takes several times as long.
    mask_stride = num_blocks(T, 16) * 16
    mask = n.new_empty(key_heads, batch * heads // key_heads * blocks, mask_stride, dtype=dtype)[:, :, :T]
    sums = n.new_empty(batch * heads, blocks, dim)
    _tail_sums_kernel[batch * heads, num_blocks(blocks, rows), block_d // channels](
        bits, n, z, mask, sums, value, heads, batch * heads // key_heads, blocks, T, words, mask_stride,
        D=dim, BLOCK_D=block_d, ROWS=rows, KEYS=32, CHANNELS=channels, num_warps=8,
    )  # fmt: skip
    return mask, sums


def linear_states(
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    n: Tensor,
    center: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
    shared_memory: int,
) -> LinearStates:
    """H and Z of every query block, times a common factor that brings sums over all tokens to the size of v.

    Args:
        k, v: (B, G, N_kv, D), last stride 1.
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        center: (B, G, D) float32 what smoothing subtracts.
        real: (B, N_kv) bool or None.
        order: (N_kv,) int32 or None.
        settings: the op's.
        shared_memory: bytes of it that a program may use.
    """
    (kv_len, dim), (batch, heads, blocks, _) = k.shape[2:], bits.shape
    factor = 2.0 ** -max(0, round(math.log2(kv_len / dim)))
    config = linear_config(dim, k.element_size(), shared_memory)
    if dim == 128 and k.element_size() == 2 and shared_memory >= 200 * 1024:
        # All of v at once measures fastest: phi is made once.
        config = LinearConfig(64, 128, 8)
    h, z = key_block_states(k, v, center, real, order, factor, settings, config)
    mask, normalizer = tail_sums(bits, n, z, 1.0, k.dtype)
    state = torch.bmm(mask, h.flatten(2)).view(batch * heads, blocks, dim, dim)
    return LinearStates(state, normalizer)
