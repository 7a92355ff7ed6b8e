"""States of the linear tail for each query block: H_i and Z_i over the key blocks that it does not keep.

One batched matmul of the 0/1 tail mask with all h_j: exact where the tail is empty, and it costs less than reading h_j
again for each kept block (0.05 TFLOP for shape (1, 12, 32760, 128)).
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from sla2_compile.kernels.settings import Settings
from sla2_compile.kernels.triton_attention import LinearStates
from sla2_compile.kernels.triton_backward_linear_keys import key_block_states
from sla2_compile.kernels.triton_inverse_index import _tail_mask_kernel


def linear_states(
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    n: Tensor,
    k_mean: Tensor,
    real: Tensor | None,
    order: Tensor | None,
    settings: Settings,
) -> LinearStates:
    """H and Z of every query block, times a common factor that brings sums over all tokens to the size of v.

    Args:
        k, v: (B, G, N_kv, D), last stride 1.
        bits: (B, H, M, W) int32 kept key blocks.
        n: (B, T) float32 real tokens of each key block.
        k_mean: (B, G, D) float32 what smoothing subtracts.
        real: (B, N_kv) bool or None.
        order: (N_kv,) int32 or None.
        settings: the op's.
    """
    (batch, key_heads, kv_len, dim), (_, heads, blocks, words), T = k.shape, bits.shape, n.shape[1]
    factor = 2.0 ** -max(0, round(math.log2(kv_len / dim)))
    h, z = key_block_states(k, v, k_mean, real, order, factor, settings)
    mask = k.new_empty(batch * key_heads, heads // key_heads * blocks, T)
    _tail_mask_kernel[batch * heads * blocks, triton.cdiv(T, 512)](
        bits, n, mask, 1.0, heads, blocks, T, words, TILE=512, num_warps=4
    )
    state = torch.bmm(mask, h.flatten(2)).view(batch * heads, blocks, dim, dim)
    # In the full float32 of elementwise sums: matmul may run as TF32.
    normalizer = torch.bmm(mask.double(), z.double()).float().view(batch * heads, blocks, dim)
    return LinearStates(state, normalizer)
